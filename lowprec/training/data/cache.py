"""A cache of folders. A folder's name is a hash of everything that determines its contents.

An entry is complete or absent. It is built in a temporary folder next to its final place, and then
renamed. A rename within one folder is atomic, so no process ever sees half an entry. If two
processes build the same entry at the same time, the second rename fails, because the target is not
empty, and the second process uses the first one's entry. Equal names mean equal contents.

`manifest.json` of an entry lists its files with their sizes and checksums. `check_entry` compares
them: a file that is missing, damaged or foreign is a UserError, before anything is read from it.

A builder that is killed leaves its temporary folder. A living builder holds a lock on its own
(flock on the folder, which the system releases at the end of the process), so the next builder
knows the others and deletes them. Some network file systems keep such locks within one machine, so
the folder of another machine must also be a day old.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lowprec.errors import UserError
from lowprec.files import to_json

MANIFEST = "manifest.json"
_BLOCK = 4 * 2**20
"""Bytes of a file that share a checksum."""
_MOST_BLOCKS = 256
"""Blocks of a file that are read to check it: all of a file up to 1 GiB, some of a larger one."""
_UNFINISHED = re.compile(r"\..+\.([\w-]+)-\d+\.[0-9a-f]{8}\.tmp")
"""Name of a temporary folder: the entry, the machine and the process, and a random number."""
_HOST = re.sub(r"\W", "_", socket.gethostname()) or "_"
_OLD_S = 24 * 3600
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def content_key(identity: Any) -> str:
    """Return a hash of `identity`, any tree of JSON values, as 32 hex digits."""
    text = to_json(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def build_once(entry: Path, build: Callable[[Path], None]) -> bool:
    """Make the folder `entry` by calling `build` on an empty folder, unless `entry` exists.

    Return True if this call made it. If `build` raises, nothing stays on disk.

    Raises:
        UserError: the cache can't be written to, or its disk is full.
    """
    delete_abandoned(entry.parent)
    if entry.is_dir():
        return False
    if os.path.lexists(entry):
        raise _damaged(entry, "it is no folder")
    # tempfile.mkdtemp would make a folder that is private to the user; a cache may be shared.
    builder = f"{_HOST}-{os.getpid()}"
    unfinished = entry.parent / f".{entry.name}.{builder}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = _make_locked(unfinished)
    except OSError as error:
        raise _not_writable(entry.parent, error.strerror) from None
    try:
        build(unfinished)
        _write_manifest(unfinished)
        try:
            os.rename(unfinished, entry)
        except OSError:
            if not entry.is_dir():
                raise
            return False  # Another process was first.
        return True
    except Exception as error:
        # The Rust library of the tokenizers reports a full disk by a plain Exception.
        full = isinstance(error, OSError) and error.errno in _NO_SPACE
        if full or "os error 28" in str(error):
            raise _not_writable(entry.parent, "no space left on the disk") from None
        raise
    finally:
        # After a successful rename this folder no longer exists.
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)


def check_entry(entry: Path) -> None:
    """Raise UserError if the files of an entry are not those that its builder wrote."""
    listed = _read_manifest(entry)
    found = {path.name for path in entry.iterdir() if not path.name.startswith(".")}
    for name in sorted(found - {*listed, MANIFEST}):
        raise _damaged(entry, f"{name} is not of it")
    for name, (size, sums) in listed.items():
        path = entry / name
        if not path.is_file():
            raise _damaged(entry, f"{name} is missing")
        if path.stat().st_size != size:
            raise _damaged(entry, f"{name} has {path.stat().st_size} bytes instead of {size}")
        blocks = range(0, len(sums), -(-len(sums) // _MOST_BLOCKS) or 1)
        if any(
            _block_sum(path, block) != sums[block] for block in (*blocks, *range(len(sums))[-1:])
        ):
            raise _damaged(entry, f"the contents of {name} have changed")


def delete_abandoned(cache: Path) -> None:
    """Delete the temporary folders of builders that no longer run."""
    with contextlib.suppress(OSError), _locked(cache):
        for path in cache.iterdir():
            match = _UNFINISHED.fullmatch(path.name)
            if match is None or (match[1] != _HOST and not _is_old(path)):
                continue
            with contextlib.suppress(OSError), _locked(path, wait=False):
                shutil.rmtree(path, ignore_errors=True)


def _is_old(folder: Path) -> bool:
    """Return True if nothing in a folder has changed for a day."""
    newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return time.time() - newest > _OLD_S


def _make_locked(folder: Path) -> int:
    """Make `folder` and lock it. Return the descriptor that holds the lock."""
    # Nobody may look for abandoned folders between the two steps.
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # A file system without locks: nothing is deleted there.
            stack.enter_context(_locked(folder.parent))
        folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder. Without `wait`, raise OSError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError(f"an entry of the cache holds files only, not {path}")
        size = path.stat().st_size
        files[path.name] = [size, [_block_sum(path, block) for block in range(-(-size // _BLOCK))]]
    manifest = {"files": files, "key": content_key(files)}
    (folder / MANIFEST).write_text(to_json(manifest) + "\n", encoding="utf-8")


def _read_manifest(entry: Path) -> dict[str, tuple[int, list[int]]]:
    """Return size and checksums by the name of each file of an entry."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if content_key(files) != manifest["key"]:
            raise ValueError
        return {name: (size, sums) for name, (size, sums) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(entry, f"{MANIFEST} can't be read") from None


def _block_sum(path: Path, block: int) -> int:
    with path.open("rb") as file:
        file.seek(block * _BLOCK)
        return zlib.crc32(file.read(_BLOCK))


def _damaged(entry: Path, problem: str) -> UserError:
    return UserError(f"data.cache_dir: {entry} is damaged: {problem}; remove it")


def _not_writable(cache: Path, reason: str | None) -> UserError:
    return UserError(
        f"data.cache_dir: cannot write to {cache}: {reason}; set it to a writable folder with space"
    )
