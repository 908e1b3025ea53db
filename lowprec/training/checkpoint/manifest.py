"""The manifest of a folder: a JSON file that names the other files, with their sizes and checksums.

It is written when all of them are there, so a folder that matches its manifest is complete:

    {"format": 1, "step": 200, "files": {"optimizer.pt": {"size": 3172, "crc32": "1c291ca3"}, ...}}

`step` is None for a model that is no checkpoint. CRC-32 is the fastest checksum of the standard
library (docs/decisions.md). It finds damage; it is no protection against forgery.
"""

import json
import os
import stat
import zlib
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lowprec.files import to_json, write_atomically

MANIFEST = "lowprec_manifest.json"
_FORMAT = 1
_PIECE = 1 << 20
"""Bytes that are read at once."""

_THREADS = min(8, os.cpu_count() or 1)
"""Number of files that are read at once. A sharded checkpoint has many, and one thread is slower
than a fast disk."""

READ_IF_PRESENT = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "lowprec_state.safetensors",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "pytorch_model_fsdp.bin",
)
"""Files that the Trainer reads from a checkpoint wherever it finds them. One that the manifest does
not name changes the run."""


def write_manifest(
    folder: Path, step: int | None = None, *, names: Container[str] | None = None
) -> None:
    """Write the manifest of `folder`. All other files must be complete; they are flushed to the
    disk first.

    Args:
        folder: Folder of the files.
        step: Step of a checkpoint.
        names: Names of the files that the manifest may name; None: all of them.
    """
    files = {name: path for name, path in sorted(_files(folder)) if names is None or name in names}
    entries = {
        name: {"size": size, "crc32": crc32}
        for name, (size, crc32) in _checksums(files, flush=True).items()
    }
    content = {"format": _FORMAT, "step": step, "files": entries}
    write_atomically(folder / MANIFEST, to_json(content, indent=1) + "\n")


def has_manifest(folder: Path) -> bool:
    """Return whether `folder` has a manifest, readable or not."""
    return os.path.lexists(folder / MANIFEST)


def step_in(folder: Path) -> int | None:
    """Return the step in the manifest of `folder`, which must be readable."""
    return _read(folder / MANIFEST)["step"]


def damage(
    folder: Path, *, content: bool = True, names: Container[str] | None = None
) -> str | None:
    """Return the first difference between `folder` and its manifest, as "<file>: <what is wrong>";
    None if they agree.

    Args:
        folder: A folder that has a manifest.
        content: Flag: checksums are compared, too. This reads each file once.
        names: Names of the files to look at; None: all of them.
    """
    try:
        entries = _read(folder / MANIFEST)["files"]
        if names is not None:
            entries = {name: entry for name, entry in entries.items() if name in names}
        present = dict(_files(folder))
        problem = _differs_in_size(folder, entries, present)
        if problem is None and names is None:
            problem = _strange(entries, present)
        if problem is not None or not content:
            return problem
        return _differs_in_content(entries, present)
    except ValueError as error:
        return f"{MANIFEST}: {error}"
    except OSError as error:
        return f"{_name_in(folder, error)}: can't be read: {error.strerror}"


def unlisted(folder: Path) -> list[str]:
    """Return the names of the files in `folder` that its manifest, which must be readable, does not
    name."""
    entries = _read(folder / MANIFEST)["files"]
    return sorted(name for name, _ in _files(folder) if name not in entries)


def state_of_files(folder: Path) -> frozenset[Any]:
    """Return a value that changes when a file in `folder` is written, replaced or removed: a set of
    tuples, each with the name of a file first. Raise OSError if a file can't be found."""
    found = []
    for path in folder.rglob("*"):
        leads_to_nothing = path.is_symlink() and not path.exists()
        status = path.lstat() if leads_to_nothing else path.stat()
        name = path.relative_to(folder).as_posix()
        times = status.st_mtime_ns, status.st_ctime_ns
        found.append((name, status.st_ino, status.st_size, *times))
    return frozenset(found)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the path of each file below `folder`, without the manifest. A link that
    leads to a folder counts as a file, too."""
    unfinished = f".{MANIFEST}."
    for parent, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in (*files, *links):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if relative != MANIFEST and not relative.startswith(unfinished):
                yield relative, path


def _raise(error: OSError) -> None:
    raise error


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a manifest. Raise ValueError if it is none."""
    if not path.is_file():
        raise ValueError("is no file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("is no JSON; it is cut short or damaged") from None
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError("is no manifest")
    if content["format"] != _FORMAT:
        raise ValueError(
            f"has format {content['format']!r}, this version of lowprec reads {_FORMAT}"
        )
    files = content.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise ValueError("is damaged: it does not name files with their size and crc32")
    step = content.get("step")
    if "step" not in content or not (step is None or type(step) is int):
        raise ValueError("is damaged: its step is no number")
    return content


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("size")) is int
        and isinstance(entry.get("crc32"), str)
    )


def _differs_in_size(folder: Path, entries: dict[str, Any], present: dict[str, Path]) -> str | None:
    for name, entry in entries.items():
        if name not in present:
            is_folder = name and ".." not in name and (folder / name).is_dir()
            return f"{name}: is a folder" if is_folder else f"{name}: is missing"
        problem = not_a_file(present[name])
        if problem is not None:
            return f"{name}: {problem}"
        size = present[name].stat().st_size
        if size != entry["size"]:
            return f"{name}: has {size} bytes, {entry['size']} were written"
    return None


def _strange(entries: dict[str, Any], present: dict[str, Path]) -> str | None:
    for name in READ_IF_PRESENT:
        if name in present and name not in entries:
            return f"{name}: does not belong to this checkpoint: {MANIFEST} does not name it"
    return None


def not_a_file(path: Path) -> str | None:
    """Return what is wrong if `path`, which is in a folder's listing, leads to no regular file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "is a link that leads to nothing"
    except OSError as error:  # a link that leads to itself
        return f"can't be read: {error.strerror}"
    if stat.S_ISDIR(mode):
        return "is a folder"
    return None if stat.S_ISREG(mode) else "is no regular file"


def _differs_in_content(entries: dict[str, Any], present: dict[str, Path]) -> str | None:
    found = _checksums({name: present[name] for name in entries})
    for name, entry in entries.items():
        _, crc32 = found[name]
        if crc32 != entry["crc32"]:
            return (
                f"{name}: its content is not what was written (CRC-32 {crc32}, "
                f"{entry['crc32']} in {MANIFEST})"
            )
    return None


def _checksums(files: dict[str, Path], *, flush: bool = False) -> dict[str, tuple[int, str]]:
    """Return the result of `_checksum` for each file. Several files are read at once."""
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(lambda path: _checksum(path, flush=flush), files.values())
        return dict(zip(files, results, strict=True))


def _checksum(path: Path, *, flush: bool = False) -> tuple[int, str]:
    """Return the size of a file and its CRC-32 as eight hexadecimal digits.

    Args:
        path: Path of the file.
        flush: Flag: the file's content must be on the disk when this returns.
    """
    crc32 = 0
    size = 0
    piece = memoryview(bytearray(_PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            crc32 = zlib.crc32(piece[:count], crc32)
            size += count
        if flush:
            os.fsync(file.fileno())
    return size, f"{crc32:08x}"


def _name_in(folder: Path, error: OSError) -> str:
    """Return the name, inside of `folder`, of the file that an error is about."""
    if not isinstance(error.filename, str | os.PathLike):
        return MANIFEST
    if Path(error.filename) == folder:
        return folder.name
    try:
        return Path(error.filename).relative_to(folder).as_posix()
    except ValueError:
        return str(error.filename)
