"""The logger "lowprec", and lines that the user sees in any program.

A program decides where logs go. Many set up logging at the level WARNING, or for a file, and then
nobody sees which precision a model got. `tell` therefore writes its line to stderr as well, unless
the logger shows it on the terminal already. A program that sets a level for the logger "lowprec"
itself has decided: `logging.getLogger("lowprec").setLevel(logging.ERROR)` silences all of it.
"""

import logging
import os
import sys
from collections.abc import Iterator

logger = logging.getLogger("lowprec")


def tell(line: str, level: int = logging.INFO) -> None:
    """Log a line, and write it to stderr if the log does not show it on the terminal. Of a run's
    processes, only the first does so."""
    if os.environ.get("RANK", "0") != "0":
        return
    logger.log(level, "%s", line)
    write_unless_shown(line, level)


def write_unless_shown(line: str, level: int) -> None:
    """Write a line to stderr, unless logs of this level are shown on the terminal or the program
    has silenced them."""
    if not is_shown(level) and not _is_silenced(level):
        print(f"lowprec: {line}", file=sys.stderr, flush=True)


def is_shown(level: int) -> bool:
    """Return whether the logger shows records of this level on the terminal."""
    if not logger.isEnabledFor(level):
        return False
    handlers = list(_handlers())
    if not handlers:  # Python's last resort writes to stderr
        return logging.lastResort is not None and level >= logging.lastResort.level
    return any(level >= handler.level and _is_terminal(handler) for handler in handlers)


def _is_silenced(level: int) -> bool:
    return logger.level != logging.NOTSET and level < logger.level


def _handlers() -> Iterator[logging.Handler]:
    """Yield the handlers that get the logger's records."""
    place: logging.Logger | None = logger
    while place is not None:
        yield from place.handlers
        place = place.parent if place.propagate else None


def _is_terminal(handler: logging.Handler) -> bool:
    """Return whether a handler writes to the program's own output: one of logging's for a stream,
    or one of Rich's."""
    if hasattr(handler, "console"):
        return True
    outputs = (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
    return getattr(handler, "stream", None) in outputs
