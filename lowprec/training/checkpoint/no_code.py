"""Files of checkpoints and models are data: no code in a file is executed.

A pickle names the functions that its reader calls, so a file can hold any program. torch reads the
files of `torch.save` as data alone if it is asked to. But the libraries that load a checkpoint do
not always ask: Accelerate does not for `custom_checkpoint_N.pkl`, and torch.distributed.checkpoint
reads `.metadata`, and the values in a sharded checkpoint that are no tensors, as any pickle. So
every file that a library may read as a pickle is read here first, by a reader that knows a few
types of data and no function of a file's choice. A file that needs more is refused in one line.

    *.pt, *.pth, *.bin, *.pkl   files of torch.save, read as data
    .metadata                   a pickle of the classes in `_IN_METADATA`
    *.distcp                    values that are no tensors are read as data
    *.index.json                names of files inside of the folder
    *.safetensors               data by its form, which is checked
"""

import functools
import io
import json
import pickle
import zipfile
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from lowprec.errors import UserError
from lowprec.training.checkpoint.structure import check_safetensors

_NEVER_READ = "training_args.bin"
"""File that the Trainer writes and that nothing reads again. It holds classes of transformers."""

_PICKLES = (".pt", ".pth", ".bin", ".pkl")

_ZIP = b"PK\x03\x04"
"""First bytes of what `torch.save` writes."""

_IN_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}
"""The names in the metadata of a sharded checkpoint, by module. `_get_layout` looks a name up in a
table. Names of torch's dtypes are allowed, too."""


def check_no_code(folder: Path) -> None:
    """Raise UserError if a file of a checkpoint holds code, or names files outside of its folder.

    Nothing in the files is executed. The best checkpoint of a run is checked, too, because the
    Trainer loads it at the end.

    Args:
        folder: Folder of a checkpoint, of the Trainer or of Accelerate.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        if path.name.endswith(".metadata"):
            _check_sharded(path)
        elif path.name.endswith(".index.json"):
            check_index(path)
        elif path.suffix == ".safetensors":
            # Another program may have written it, and the manifest beside it.
            if (problem := check_safetensors(path)) is not None:
                raise UserError(f"{path}: {problem}")
        elif path.suffix in _PICKLES and path.name != _NEVER_READ:
            load_data(path)
    best = _best_checkpoint(folder)
    if best is not None and best.is_dir() and best.resolve() != folder.resolve():
        check_no_code(best)


def load_data(path: Path) -> Any:
    """Return the contents of a file of `torch.save`, on the CPU. Raise UserError if it holds
    anything but data."""
    return _read(path, path)


def check_index(path: Path) -> None:
    """Raise UserError if the index of a model's files names a file outside of its folder."""
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        outside = sorted(name for name in names if _leaves(name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no index of a model's files: {_one_line(error)}") from None
    if outside:
        raise UserError(
            f"{path}: names {outside[0]!r}, a file outside of its folder; it is not read"
        )


def _best_checkpoint(folder: Path) -> Path | None:
    """Return the best checkpoint of a run that trainer_state.json names; None without one."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    best = state.get("best_model_checkpoint") if isinstance(state, dict) else None
    return Path(best) if isinstance(best, str) and best else None


def _read(path: Path, file: Any) -> Any:
    """Return the contents of `file`, which is `path` or a part of it, read as data."""
    # Tensors are mapped into memory instead of read. Only zip archives can be.
    mapped = isinstance(file, Path) and zipfile.is_zipfile(file)
    try:
        with torch.serialization.safe_globals(list(_random_states())):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {_what_it_names(error)}; it is not read") from None
    except Exception as error:  # A damaged file can raise an exception of any class.
        raise UserError(f"{path}: can't be read as data: {_one_line(error)}") from None


@functools.cache
def _random_states() -> tuple[Any, ...]:
    """Return the types of numpy in which the Trainer and Accelerate keep random states."""
    import numpy as np
    from accelerate.utils.other import TORCH_SAFE_GLOBALS

    return (*TORCH_SAFE_GLOBALS, np.ndarray, type(np.dtype(np.uint32)))


def _what_it_names(error: Exception) -> str:
    """Return a description of what torch found in a file instead of data."""
    text = str(error)
    if "GLOBAL " in text:
        name = text.partition("GLOBAL ")[2].split()[0]
        return f"holds {name}, which is code, not data"
    return "is a pickle that holds code, not data"


class _MetadataReader(pickle.Unpickler):
    """A reader of pickles that knows the names in `_IN_METADATA` alone."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _IN_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"Unsupported GLOBAL {module}.{name}")
        return super().find_class(module, name)


def _check_sharded(path: Path) -> None:
    """Check the metadata of a sharded checkpoint, and the values in it that are no tensors."""
    try:
        with path.open("rb") as file:
            metadata = _MetadataReader(file).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {_what_it_names(error)}; it is not read") from None
    except Exception as error:  # A damaged pickle can raise an exception of any class.
        raise UserError(f"{path}: can't be read: {_one_line(error)}") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path}: holds no metadata of a sharded checkpoint")
    for index, info in (metadata.storage_data or {}).items():
        if _leaves(info.relative_path):
            raise UserError(
                f"{path}: names {info.relative_path!r}, a file outside of its folder; it is not "
                "read"
            )
        shard = path.parent / info.relative_path
        begins = _read_part(shard, info.offset, min(info.length, len(_ZIP)))
        if begins != _ZIP:
            raise UserError(f"{shard}: is not the file that {path.name} beside it describes")
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            _read(shard, io.BytesIO(_read_part(shard, info.offset, info.length)))


def _read_part(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {_one_line(error)}") from None


def _leaves(name: Any) -> bool:
    """Return True if a relative path in a file leads out of the file's folder."""
    path = PurePath(name)
    return path.is_absolute() or ".." in path.parts


def _one_line(error: BaseException) -> str:
    """Return the message of `error` as one short line, or the name of its class."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."
