"""What emulation costs on a CPU: the passes of a quantiser over fp32 [4096, 512], and 16-bit
products against fp32. Medians, ms.

python benchmarks/cpu_emulation.py            # the allocator as it is
python benchmarks/cpu_emulation.py --keep     # with lowprec.training.run.machine.keep_freed_memory, as a CPU run has it
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
    x, w = torch.randn(4096, 512), torch.randn(512, 512)
    rows, columns = x.view(4096, 1, 4, 128), x.t().view(512, 1, 32, 128)
    codes = round_to_format(100 * x, E4M3).to(torch.float8_e4m3fn)
    half, half_w = x.bfloat16(), w.bfloat16()
    ieee, ieee_w = x.half(), w.half()
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
        "fp32 product, 4096 x 512 x 512": lambda: x @ w.t(),
        "bf16 product, the same": lambda: half @ half_w.t(),
        "fp16 product, the same": lambda: ieee @ ieee_w.t(),
    }.items():
        print(f"{name:45s} {median_ms(function):8.2f}")


if __name__ == "__main__":
    main()
