"""Damage that shows in the form of a file: for checkpoints and models without a manifest, which
earlier versions and other programs wrote.

The checks find a file that is empty, cut short, of another kind or missing. They can't find a
changed weight, or a file of another checkpoint.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lowprec.training.checkpoint.manifest import not_a_file

_MAX_HEADER = 100_000_000
"""Bytes of the longest header that safetensors reads."""

_WEIGHTS = re.compile(
    r"model\.safetensors|pytorch_model\.bin|.*\.index\.json|(.*/)?adapter_model\.(safetensors|bin)"
    r"|pytorch_model_fsdp.*|model-\d+-of-\d+\.safetensors|global_step\d+/.*"
)
_TRAINER_PARTS = {
    "optimizer.pt": re.compile(r"(.*-)?optimizer(\.pt|\.bin|_\d+/.*)|global_step\d+/.*"),
    "scheduler.pt": re.compile(r"scheduler\.pt"),
    "rng_state.pth": re.compile(r"rng_state(_\d+)?\.pth"),
}
"""The files that the Trainer writes together, or none of them (`save_only_model`)."""

_SUFFIXES = (".json", ".safetensors", ".pt", ".pth", ".bin")
"""Ends of the names that belong to files; a folder of such a name takes the place of one."""

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files of a model and its tokenizer, each of which is a mapping."""

_RANK = re.compile(r"rng_state_(\d+)\.pth")


def damage(folder: Path, *, content: bool = True) -> str | None:
    """Return the first damage in the form of a file in a checkpoint or a model, as "<file>: <what
    is wrong>"; None if nothing is found.

    Args:
        folder: Folder of the checkpoint or the model.
        content: Flag: the checksums that torch keeps in its own files are compared, too. This reads
            each of those files once.
    """
    try:
        names = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_symlink() or not path.is_dir() or path.suffix in _SUFFIXES
        }
        return _damaged(names, content=content) or _missing(names) or _missing_shard(names)
    except OSError as error:
        return _unreadable(folder, error)


def damage_of_model(folder: Path) -> str | None:
    """Return the first damage in the form of a file that transformers reads from the folder of a
    model or a tokenizer; None if nothing is found. Weights are not read."""
    try:
        names = {
            path.name: path
            for path in sorted(folder.iterdir())
            if path.name in MODEL_FILES or path.name.endswith((".safetensors", ".index.json"))
        }
        return _damaged(names, content=False) or _missing_shard(names)
    except OSError as error:
        return _unreadable(folder, error)


def _damaged(names: dict[str, Path], *, content: bool) -> str | None:
    for name, path in names.items():
        problem = not_a_file(path) or _check_of(path, content)(path)
        if problem is not None:
            return f"{name}: {problem}"
    return None


def _unreadable(folder: Path, error: OSError) -> str:
    name = Path(error.filename).name if error.filename else folder.name
    return f"{name}: can't be read: {error.strerror}"


def _check_of(path: Path, content: bool) -> Callable[[Path], str | None]:
    if path.suffix == ".json":
        return _check_json
    if path.suffix == ".safetensors":
        return check_safetensors
    if path.suffix in (".pt", ".pth"):
        return _check_zip_content if content else _check_zip
    return _check_not_empty if path.suffix in (".bin", ".distcp") else _accept


def _accept(path: Path) -> str | None:
    return None


def _check_not_empty(path: Path) -> str | None:
    return None if path.stat().st_size else "is empty"


def _check_json(path: Path) -> str | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return "is no JSON; it is cut short or damaged" if path.stat().st_size else "is empty"
    if path.name in (*MODEL_FILES, "trainer_state.json") and not isinstance(data, dict):
        return f"is no mapping but a {type(data).__name__}"
    return None


def check_safetensors(path: Path) -> str | None:
    """Return what is wrong with the header of a safetensors file, or with the size that the header
    gives the file; None if nothing is."""
    if (problem := not_a_file(path)) is not None:
        return problem
    size = path.stat().st_size
    if not size:
        return "is empty"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            return f"is cut short or no safetensors file: {size} bytes, a header of {length}"
        text = file.read(length)
    try:
        header = json.loads(text)
        ends = [
            int(entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "is no safetensors file: its header is damaged"
    whole = 8 + length + max(ends, default=0)
    return None if size == whole else f"has {size} bytes, its header describes {whole}"


def _check_zip(path: Path) -> str | None:
    """Return what is wrong with the directory of a file of torch.save."""
    if not path.stat().st_size:
        return "is empty"
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x80\x02":  # torch's format before 1.6
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "is cut short or no file of torch.save"
    return None


def _check_zip_content(path: Path) -> str | None:
    """Return what is wrong with a file of torch.save, whose entries have checksums."""
    problem = _check_zip(path)
    if problem is not None or not zipfile.is_zipfile(path):
        return problem
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, RuntimeError):
        return "is damaged"
    return None if damaged is None else f"is damaged in {damaged}"


def _missing(names: Iterable[str]) -> str | None:
    """Return the part that a checkpoint of the Trainer lacks."""
    others = [name for name in names if name != "trainer_state.json"]
    if "trainer_state.json" not in names or not others:
        return None
    if not any(map(_WEIGHTS.fullmatch, others)):
        return "model.safetensors: is missing, and so are weights under any other name"
    held = {
        part: [name for name in others if pattern.fullmatch(name)]
        for part, pattern in _TRAINER_PARTS.items()
    }
    for part, found in held.items():
        if not found and any(held.values()):
            return f"{part}: is missing"
    ranks = sorted(int(match[1]) for match in map(_RANK.fullmatch, others) if match)
    gap = next((number for number, rank in enumerate(ranks) if rank != number), None)
    return None if gap is None else f"rng_state_{gap}.pth: is missing"


def _missing_shard(names: dict[str, Path]) -> str | None:
    """Return the shard that an index names and that is not there."""
    for name, path in names.items():
        if not name.endswith(".index.json"):
            continue
        index: Any = json.loads(path.read_text(encoding="utf-8"))
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict):
            return f"{name}: has no weight_map"
        folder = name.rpartition("/")[0]
        for shard in sorted(set(map(str, shards.values()))):
            full = f"{folder}/{shard}" if folder else shard
            if full not in names:
                return f"{full}: is missing; {name} names it"
    return None
