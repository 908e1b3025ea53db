"""Timing a function on a device."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one call: the median, and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


def measure(function: Callable[[], object], device: torch.device, *, seconds: float = 0.5, most: int = 200) -> Timing:
    """Time `function` after three calls to warm up, for about `seconds`, at least 7 and at most `most` calls."""
    for _ in range(3):
        once = _time(function, device)
    runs = max(7, min(most, int(seconds * 1e3 / max(once, 1e-3))))
    times = [_time(function, device) for _ in range(runs)]
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(median=statistics.median(times), p20=p20, p80=p80)


def _time(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    before = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - before)
