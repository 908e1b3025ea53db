"""A cache of folders. A folder's name is a hash of everything that determines its contents.

An entry is complete or absent. It is built in a temporary folder next to its final place, and then
renamed. A rename within one folder is atomic, so no process ever sees half an entry. If two
processes build the same entry at the same time, the second rename fails, because the target is not
empty, and the second process uses the first one's entry. Equal names mean equal contents.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowprec.errors import UserError


def content_key(identity: Any) -> str:
    """Return a hash of `identity`, any tree of JSON values, as 32 hex digits."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def build_once(entry: Path, build: Callable[[Path], None]) -> bool:
    """Make the folder `entry` by calling `build` on an empty folder, unless `entry` exists.

    Return True if this call made it. If `build` raises, nothing stays on disk.
    """
    if entry.is_dir():
        return False
    # tempfile.mkdtemp would make a folder that is private to the user; a cache may be shared.
    unfinished = entry.parent / f".{entry.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write to {entry.parent}: {error.strerror}; set it to a "
            "writable folder"
        ) from None
    try:
        build(unfinished)
        try:
            os.rename(unfinished, entry)
        except OSError:
            if not entry.is_dir():
                raise
            return False  # Another process was first.
        return True
    finally:
        # After a successful rename this folder no longer exists.
        shutil.rmtree(unfinished, ignore_errors=True)
