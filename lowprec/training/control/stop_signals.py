"""Signals that ask a run to stop: it finishes its step, saves a checkpoint, and ends.

SIGINT (Ctrl-C), SIGTERM (a cluster that ends a job) and SIGUSR1 (a cluster's warning before that)
are only noted when they arrive, so nothing is cut short: a save, an evaluation or a step goes on.
All ranks then agree after which step they stop.

    with StopSignals() as signals:
        callback.train(trainer, signals=signals)

A second SIGINT or SIGTERM ends the process at once, as without this module. A run that has stopped
raises `StoppedBySignal`, with which Python exits as a shell reports a death by the signal: 128 plus
its number (130, 143, 138). So a script can tell a run that was stopped from one that has finished.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from lowprec.distributed.agree import sum_over_ranks

logger = logging.getLogger("lowprec")

_ORDERS = (signal.SIGTERM, signal.SIGINT)
"""Signals that are an order: the second one ends the process at once."""
_SIGNALS = (*_ORDERS, signal.SIGUSR1)

_SAME = 1.0
"""Time [s] in which two orders count as one, below a launcher. A Ctrl-C reaches torchrun and its
workers, and torchrun sends them the signal once more."""

_WORKERS_END = 60
"""Time [s] after which a data loader's process ends that was told to; until then the step that is
running may need its batches."""


class StoppedBySignal(SystemExit):
    """The run has stopped because of a signal. The exit code is 128 plus the signal's number."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.signal = number


class StopSignals:
    """Handlers of the signals while the `with` block runs; the handlers from before come back
    after it.

    A signal that the program ignores stays ignored. In another thread than the main one Python
    can't handle signals: a warning says so, and they act as before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that this process has got; None if there is none."""
        self.agreed: signal.Signals | None = None
        """The signal that all ranks know of; None if there is none."""
        self._before: dict[signal.Signals, Any] = {}
        self._ordered: float | None = None
        """Time of the first order."""
        self._process = os.getpid()

    def __enter__(self) -> "StopSignals":
        self._process = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "signals: this is not the main thread, so SIGINT, SIGTERM and SIGUSR1 don't save "
                "the run"
            )
            return self
        for number in _SIGNALS:
            before = signal.getsignal(number)
            # None is a handler that Python did not install and could not bring back.
            if before is not None and before is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def stops(self) -> bool:
        """Return True if the run has to stop now. All ranks call it together, and all of them get
        the same answer."""
        if self.agreed is None:
            counts = sum_over_ranks([int(self.received == number) for number in _SIGNALS])
            found = [number for number, count in zip(_SIGNALS, counts, strict=True) if count]
            self.agreed = found[0] if found else None
        return self.agreed is not None

    def stop(self, message: str, *, main: bool = True) -> NoReturn:
        """End the program because of the signal.

        Args:
            message: what has been saved, and how to go on.
            main: whether this rank prints it.
        Raises:
            StoppedBySignal: always.
        """
        assert self.agreed is not None
        if main:
            print(f"lowprec: {self.agreed.name}: {message}", file=sys.stderr, flush=True)
        raise StoppedBySignal(self.agreed)

    def _receive(self, number: int, frame: Any) -> None:
        name = signal.Signals(number)
        if os.getpid() != self._process:
            _end_worker_later(name)
            return
        if self._is_second_order(name):
            signal.signal(name, signal.SIG_DFL)
            os.kill(self._process, name)
            return
        if self.received is not None:
            return
        self.received = name
        # The handler runs between any two lines of the program, maybe inside of a print.
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):
                os.write(2, f"\nlowprec: {name.name}: the run saves and ends\n".encode())

    def _is_second_order(self, name: signal.Signals) -> bool:
        if name not in _ORDERS:
            return False
        now = time.monotonic()
        if self._ordered is None:
            self._ordered = now
            return False
        has_launcher = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return not has_launcher or now - self._ordered > _SAME


def _end_worker_later(name: signal.Signals) -> None:
    """Let a data loader's process, a copy of the one with the handlers, work on for a while.

    A signal that goes to all processes of a job would otherwise take away the batches of the step
    that the run still finishes.
    """
    if name == signal.SIGTERM:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_WORKERS_END)
