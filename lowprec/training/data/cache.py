"""A cache whose entries are folders: named by what determines their contents, and there whole or
not at all.

An entry is built in a temporary folder beside its final place and renamed into it. A rename within
one folder is atomic, so nobody ever sees half an entry, and when two processes build the same entry
at once, the second rename fails (the target is not empty) and its process takes the first one's
entry. Both computed the same contents: the name says so.
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
    """32 hex digits that stand for `identity`, any tree of JSON values."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def build_once(entry: Path, build: Callable[[Path], None]) -> bool:
    """Make the folder `entry` by calling `build` on an empty folder, unless `entry` exists; True
    when this call made it.

    An exception of `build` leaves nothing behind.
    """
    if entry.is_dir():
        return False
    # Not tempfile.mkdtemp: its folders are private to the user, and a cache may be shared.
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
            return False  # another process was first
        return True
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # renamed away when all went well
