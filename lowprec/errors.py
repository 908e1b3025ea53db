"""The exceptions of wrong input and of a training that can't continue, and how a program reports
them."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """An error in the user's input. The message is one line: what, where, and the nearest right
    thing.

    Programs print it without a traceback and exit with 2 (`reported`). To Python code it is a
    ValueError.
    """


class TrainingStopped(RuntimeError):  # noqa: N818  (not every reason to stop is an error)
    """A training that can't continue. The message is one line: the reason, and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known word closest to `word`, else the whole list."""
    known = sorted(known)
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


@contextlib.contextmanager
def reported(program: str) -> Iterator[None]:
    """Report a UserError or TrainingStopped of the enclosed block as one line on stderr, and exit
    with 2 or 1.

        with reported("lowprec"):
            ...
    """
    try:
        yield
    except UserError as error:
        status = 2
        message = str(error)
    except TrainingStopped as error:
        status = 1
        message = f"stopped: {error}"
    else:
        return
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
