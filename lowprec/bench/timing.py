"""Timing a function on a device.

On a GPU the calls are queued without waiting for each other, as in training, and the L2 cache is
overwritten before each of them: otherwise a small matrix would be read from there, which it is not
in a model.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_FLUSHED = 256 << 20
"""Bytes that are overwritten to empty the L2 cache; larger than any GPU's."""

_TURNS = 4


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one call: the median, and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


def summarise(times: Sequence[float]) -> Timing:
    """The Timing of at least two measured times."""
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(median=statistics.median(times), p20=p20, p80=p80)


def measure(
    function: Callable[[], object], device: torch.device, *, seconds: float = 0.5, most: int = 200
) -> Timing:
    """Time `function` for about `seconds`, at least 7 and at most `most` calls, after three to warm
    up, on a GPU a fifth of `seconds`."""
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
    """Time two functions as `measure` does, in turns: what a device loses as it heats up, both lose
    alike.

    On a GPU half of each turn is not timed: at its power limit it takes some hundredths of a second
    to settle on a clock, which is another for each function, and in training it is settled.
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
    """Time a training step by the clock on the wall, each step to its end, after `warmup` of them
    (the first compiles). `steps` >= 2."""
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
    """Times calls of functions on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.empty(
            _FLUSHED if device.type == "cuda" else 0, dtype=torch.uint8, device=device
        )

    def warm_up(self, function: Callable[[], object], seconds: float, most: int) -> int:
        """How many calls take about `seconds`."""
        for _ in range(3):
            once = _time_on_cpu(function)
        if self.device.type == "cuda":
            once = statistics.median(self.times(function, 5))
            self.times(function, _calls(once, seconds / 5, most))
        return _calls(once, seconds, most)

    def times(self, function: Callable[[], object], calls: int) -> list[float]:
        """Milliseconds of each of `calls` calls; on a GPU all are queued before the first is waited
        for."""
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
    return max(7, min(most, int(seconds * 1e3 / max(once, 1e-3))))


def _time_on_cpu(function: Callable[[], object]) -> float:
    before = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - before)
