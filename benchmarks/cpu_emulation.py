"""Measure the cost of emulation on a CPU, as medians in ms.

The rows are the passes of a quantiser over fp32 [4096, 512], and 16-bit products against fp32.

python benchmarks/cpu_emulation.py            # the default allocator
python benchmarks/cpu_emulation.py --keep     # the allocator's setting in a CPU run

The setting is that of `lowprec.training.run.machine.keep_freed_memory`.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from lowprec.formats.element import E4M3
from lowprec.formats.rounding import round_to_format
from lowprec.quant.qtensor import from_storage
from lowprec.training.run.machine import keep_freed_memory


def median_ms(function: Callable[[], object], runs: int = 30) -> float:
    """Return the median time of a call in ms, after three calls to warm up."""
    times = []
    for _ in range(runs + 3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[3:])


def main() -> None:
    if "--keep" in sys.argv:
        assert keep_freed_memory()
    torch.manual_seed(0)
    x = torch.randn(4096, 512)
    w = torch.randn(512, 512)
    rows = x.view(4096, 1, 4, 128)
    columns = x.t().view(512, 1, 32, 128)
    codes = round_to_format(100 * x, E4M3).to(torch.float8_e4m3fn)
    x_bf16 = x.bfloat16()
    w_bf16 = w.bfloat16()
    x_fp16 = x.half()
    w_fp16 = w.half()
    for name, function in {
        "clone": x.clone,
        "round to e4m3": lambda: round_to_format(x, E4M3),
        "amax per 1x128 tile, rows": lambda: rows.abs().amax((1, 3)),
        "amax along columns, as a strided last axis": lambda: columns.abs().amax((1, 3)),
        "amax along columns, in memory order": lambda: (
            columns.permute(2, 3, 0, 1).abs().amax((1, 3))
        ),
        "e4m3 to fp32, torch": codes.float,
        "e4m3 to fp32, decode": lambda: from_storage(codes, E4M3, 512),
        # [M, K] . [N, K]^T -> [M, N]
        "fp32 product, 4096 x 512 x 512": lambda: x @ w.t(),
        "bf16 product, the same": lambda: x_bf16 @ w_bf16.t(),
        "fp16 product, the same": lambda: x_fp16 @ w_fp16.t(),
    }.items():
        print(f"{name:45s} {median_ms(function):8.2f}")


if __name__ == "__main__":
    main()
