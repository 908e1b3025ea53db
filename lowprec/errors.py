"""The exceptions of wrong input and of a training that can't go on, and the words that their
messages use."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user's input is wrong. The message is one line: what, where, and the nearest right thing.

    The command line prints it without a traceback and exits with 2; from Python it is a ValueError.
    """


class TrainingStopped(RuntimeError):  # noqa: N818  (not every reason to stop is an error of the program)
    """Training can't go on. The message is one line: why, and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the known word closest to `word`, else the whole list."""
    known = sorted(known)
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""
