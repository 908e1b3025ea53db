"""Timing of a function on a device.

On a GPU the calls are queued without waiting for each other, as in training. The L2 cache is
overwritten before each call. Otherwise a small matrix would be read from the cache, which does not
happen in a model.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_FLUSHED = 256 << 20
"""Bytes that are overwritten to empty the L2 cache: more than the L2 cache of any GPU."""

_TURNS = 4
"""Number of turns of each function in `measure_in_turns`."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The distribution of the time of one call, in milliseconds."""

    median: float
    """Median."""
    p20: float
    """20th percentile."""
    p80: float
    """80th percentile."""


def summarise(times: Sequence[float]) -> Timing:
    """Return the Timing of at least two measured times (ms)."""
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(median=statistics.median(times), p20=p20, p80=p80)


def measure(
    function: Callable[[], object], device: torch.device, *, seconds: float = 0.5, most: int = 200
) -> Timing:
    """Time `function` for about `seconds`, with at least 7 and at most `most` calls.

    Three calls come first to warm up; on a GPU, the warm-up lasts a fifth of `seconds` more.
    """
    clock = _Clock(device)
    return summarise(clock.times(function, clock.warm_up(function, seconds, most)))


def measure_in_turns(
    first: Callable[[], object],
    second: Callable[[], object],
    device: torch.device,
    *,
    seconds: float = 0.5,
    most: int = 200,
) -> tuple[Timing, Timing]:
    """Time two functions in turns, each as `measure` does. A device that slows down as it heats up
    then slows down both alike.

    On a GPU, half of each turn is not timed. At its power limit, a GPU takes some hundredths of a
    second to settle on a clock rate, which differs between the functions. In training it is
    settled.
    """
    clock = _Clock(device)
    contenders = [
        (function, -(-clock.warm_up(function, seconds, most) // _TURNS), [])
        for function in (first, second)
    ]
    for turn in range(_TURNS):
        for function, calls, times in contenders if turn % 2 == 0 else reversed(contenders):
            if device.type == "cuda":
                clock.times(function, calls)
            times += clock.times(function, calls)
    return summarise(contenders[0][2]), summarise(contenders[1][2])


def measure_steps(
    step: Callable[[], object], device: torch.device, *, steps: int = 10, warmup: int = 4
) -> Timing:
    """Time `steps` training steps by wall clock, at least two, each until the device has finished.

    `warmup` steps come first; the first of them compiles.
    """
    times = []
    for number in range(warmup + steps):
        before = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= warmup:
            times.append(1e3 * (time.perf_counter() - before))
    return summarise(times)


class _Clock:
    """A timer of function calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.empty(
            _FLUSHED if device.type == "cuda" else 0, dtype=torch.uint8, device=device
        )

    def warm_up(self, function: Callable[[], object], seconds: float, most: int) -> int:
        """Warm up `function` and return the number of calls that take about `seconds`."""
        for _ in range(3):
            once = _time_on_cpu(function)
        if self.device.type == "cuda":
            once = statistics.median(self.times(function, 5))
            self.times(function, _calls(once, seconds / 5, most))
        return _calls(once, seconds, most)

    def times(self, function: Callable[[], object], calls: int) -> list[float]:
        """Return the milliseconds of each of `calls` calls. On a GPU, all calls are queued before
        the first wait."""
        if self.device.type != "cuda":
            return [_time_on_cpu(function) for _ in range(calls)]
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(calls)
        ]
        for start, end in events:
            self.cache.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]


def _calls(once: float, seconds: float, most: int) -> int:
    """Return the number of calls of `once` milliseconds that fit into `seconds`, 7 to `most`."""
    return max(7, min(most, int(seconds * 1e3 / max(once, 1e-3))))


def _time_on_cpu(function: Callable[[], object]) -> float:
    """Return the milliseconds of one call, by wall clock."""
    before = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - before)
