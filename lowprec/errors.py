"""The exceptions of wrong input and of a training that can't continue, and how a program reports
them."""

import contextlib
import difflib
import errno
import reprlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

_LONGEST = 4000
"""Most characters of a message."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of the system that say that a disk can't be written to."""


class _Short(reprlib.Repr):
    """A repr of bounded length and time, also of nested, huge and recursive values."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 12
        self.maxstring = self.maxlong = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write an integer of more than 4300 digits.
        return f"a number of {x.bit_length()} bits" if x.bit_length() > 400 else repr(x)


_SHORT = _Short()


def shown(value: Any, limit: int = 200) -> str:
    """Return the repr of a value of the user's, cut to about `limit` characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= limit else f"{text[:limit]} ..."


def one_line(text: object, limit: int = _LONGEST) -> str:
    """Return a text as one line of at most about `limit` characters, without characters that
    control a terminal."""
    line = str(text).strip()
    if len(line) > limit:
        half = limit // 2
        line = f"{line[:half]} ... {line[-half:]}"
    if line.isprintable():
        return line
    line = " ".join(line.split())
    return "".join(each if each.isprintable() else _escaped(each) for each in line)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


class UserError(ValueError):
    """An error in the user's input. The message is one line: what, where, and the nearest right
    thing.

    Programs print it without a traceback and exit with 2 (`reported`). To Python code it is a
    ValueError. A long message is cut.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class TrainingStopped(RuntimeError):  # noqa: N818  (not every reason to stop is an error)
    """A training that can't continue. The message is one line: the reason, and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known word closest to `word`, else the whole list."""
    known = sorted(known)
    close = difflib.get_close_matches(str(word)[:200], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


@contextlib.contextmanager
def reported(program: str) -> Iterator[None]:
    """Report a UserError, a TrainingStopped, or a limit of the machine that the enclosed block met
    as one line on stderr, and exit with 2 or 1; Ctrl-C with 130.

    Limits are memory and the space of a disk. Any other exception is a bug of this program or of a
    library, and keeps its traceback.

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
    except KeyboardInterrupt:
        status = 130  # as a shell reports a death by SIGINT
        message = "interrupted"
    except (MemoryError, OSError, RuntimeError) as error:
        limit = _limit_of_the_machine(error)
        if limit is None:
            raise
        status = 1
        message = f"stopped: {limit}"
    else:
        return
    print(f"{program}: {one_line(message)}", file=sys.stderr)
    sys.exit(status)


def _limit_of_the_machine(error: Exception) -> str | None:
    """Return the limit that `error` reports, in words; None if it reports something else."""
    if isinstance(error, OSError):
        if error.errno not in _NO_SPACE:
            return None
        return f"can't write {error.filename or 'a file'}: {error.strerror}"
    # torch.OutOfMemoryError, without an import of torch; on a CPU torch raises a RuntimeError.
    is_of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if isinstance(error, MemoryError) or is_of_torch:
        reason = str(error).strip().partition("\n")[0]
        return f"out of memory: {reason or 'Python could not allocate'}"
    return None
