"""The lock of a run's directory: one process at a time writes a run.

The process that trains holds an exclusive `flock` on `<directory>/.run.lock`. The operating system
releases it when the process ends, in whatever way, so no stale lock can remain. A child that is
forked closes the file: only the process itself holds the lock. In a run of several ranks the main
process holds it for all of them.

The file names the holder's process and host, for the message to another process. The holder deletes
it when it releases the lock. On NFS, the lock reaches other hosts only if the server and the mount
support locks. Linux does so by default; the mount options `local_lock=flock` and `nolock` switch it
off.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from lowprec.errors import UserError
from lowprec.files import to_json

logger = logging.getLogger("lowprec")

LOCK = ".run.lock"
"""Name of the lock's file."""

_WAIT = 1.0
"""Seconds that a process waits for a lock: another one that only looks holds it for an instant."""

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Errors of a file system that has no locks."""

_held: dict[str, "_Hold"] = {}
"""The locks that this process holds, by the resolved path of their directory."""


class _Hold:
    """A lock that this process holds, with the number of its users in this process."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.users = 1


def hold(directory: Path) -> None:
    """Hold the lock of `directory`, which exists, until `release` is called as often as `hold`.

    Raises:
        UserError: another process holds it.
    """
    key = _key(directory)
    if key in _held:
        _held[key].users += 1
        return
    file = _lock(directory, _WAIT)
    if file is None:
        return
    os.ftruncate(file, 0)
    os.write(file, to_json({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    _held[key] = _Hold(file)


def release(directory: Path) -> None:
    """Release what one call of `hold` in this process holds. Without one, do nothing."""
    key = _key(directory)
    held = _held.get(key)
    if held is None:
        return
    held.users -= 1
    if held.users:
        return
    del _held[key]
    # The file is deleted while it is locked: `_lock` sees that a file it has opened is gone.
    (directory / LOCK).unlink(missing_ok=True)
    os.close(held.file)


def check_not_held(directory: Path) -> None:
    """Raise UserError if another process holds the lock of `directory`, which may not exist."""
    if _key(directory) in _held or not (directory / LOCK).exists():
        return
    file = _lock(directory, _WAIT)
    if file is not None:
        os.close(file)


def _key(directory: Path) -> str:
    return str(directory.resolve())


def _lock(directory: Path, wait: float) -> int | None:
    """Return the locked file of `directory`, None if its file system has no locks.

    Raises:
        UserError: another process holds it, also after `wait` seconds.
    """
    path = directory / LOCK
    deadline = time.monotonic() + wait
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            if time.monotonic() > deadline:
                raise _in_use(directory) from None
            time.sleep(0.05)
            continue
        except OSError as error:
            os.close(file)
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning(
                "%s: this file system has no locks (%s): make sure that no other process writes "
                "this run",
                directory,
                error.strerror,
            )
            return None
        if _is_file(file, path):
            return file
        os.close(file)  # Its holder has deleted it meanwhile.


def _is_file(file: int, path: Path) -> bool:
    """Return True if `path` still names the opened file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _in_use(directory: Path) -> UserError:
    """Return the error for a directory that another process holds."""
    try:
        holder = json.loads((directory / LOCK).read_text(encoding="utf-8"))
        by = f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        by = "another process"
    return UserError(
        f"trainer.output_dir: {by} is writing the run in {directory}; wait for its end or stop it, "
        "or choose another directory"
    )


def _forget_in_child() -> None:
    """Close the files of the parent's locks in a forked child. The parent keeps its locks."""
    for held in _held.values():
        os.close(held.file)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
