"""Files that are written completely or not at all, and JSON that every reader takes.

JSON has no NaN and no infinity. They are written as the strings "NaN", "Infinity" and "-Infinity",
as Protocol Buffers write them in JSON. `float` of Python and `Number` of JavaScript read them.
"""

import json
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any

logger = logging.getLogger("lowprec")

_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any, **settings: Any) -> str:
    """Return `value` as JSON; `settings` are those of `json.dumps`."""
    return json.dumps(plain(value), allow_nan=False, **settings)


def from_json(text: str) -> Any:
    """Return the value that `to_json` wrote as `text`."""
    return with_floats(json.loads(text))


def plain(value: Any) -> Any:
    """Return JSON data with the names of the floats that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # Python's own names, here as a string.
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def with_floats(value: Any) -> Any:
    """Return JSON data with floats in place of the names that `plain` gave them."""
    if isinstance(value, str):
        return _NAMES.get(value, value)
    if isinstance(value, dict):
        return {key: with_floats(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [with_floats(entry) for entry in value]
    return value


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary file beside it, so that no reader sees a part of
    it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def keep_lines_until(path: Path, step: int, *, end: str | None = None) -> None:
    """Drop the lines of a JSON-lines file after `step`. A run that resumes at `step` writes them
    again.

    Args:
        path: Path of the file.
        step: Number of the step.
        end: Key of a record that marks the end of a run. If the run ended at `step`, this record
            and those after it are dropped, too: a run that goes on does not end there.
    """
    if not path.is_file():
        return
    kept = []
    damaged = 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        record = _record(line)
        at = step if record is None else record.get("step", step)
        if record is None or type(at) not in (int, float):
            # A kill cuts the last line short.
            damaged += bool(line.strip()) and number < len(lines)
            continue
        if at == step and end is not None and end in record:
            break
        if at <= step:
            kept.append(line.decode() + "\n")
    if damaged:
        logger.warning("%s: %d damaged lines are dropped", path, damaged)
    write_atomically(path, "".join(kept))


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the mapping in a line of JSON; None if there is none."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
