"""Compare the speed-ups that lowprec/conversion/cost_model.py predicts with measured ones.

The benchmark measures forward + backward of layers of many shapes over bf16, on a Hopper GPU.

python benchmarks/payoff_grid.py [RECIPE ...]

Each shape is measured twice. Eager: the host launches each kernel, and small layers wait for the
host. Ahead: the device is kept busy while the host launches all kernels, so that the kernels follow
each other without gaps, as in a compiled model. Each step quantises the weight again. The last
columns are the model's predictions; `!` marks a layer that `auto` would convert and that is slower
than bf16 by more than 3%.
"""

import sys
from collections.abc import Callable
from itertools import product
from statistics import median

import torch
from torch import nn

import lowprec
from lowprec.conversion.cost_model import SMALLEST, payoff
from lowprec.nn import LowPrecisionLinear, codes

TOKENS = (2048, 4096, 8192, 16384)
FEATURES = (1024, 2048, 4096)
WORST = 0.97
"""Smallest speed-up that is not marked."""
WARMUP = 40
"""Steps before the timing. They also visit all addresses that the allocator gives out in turn,
because a launch is prepared once for each address."""
STEPS = 10
ROUNDS = 5


def seconds(step: Callable[[], None], *, ahead: bool) -> float:
    """Return the time of one step: the median of `ROUNDS` rounds of `STEPS` steps."""
    for _ in range(WARMUP):
        step()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(int(STEPS * 1.5e-3 * 1.7e9))
        start.record()
        for _ in range(STEPS):
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / STEPS * 1e-3)
    return median(times)


def measure(M: int, N: int, K: int, recipe: str) -> tuple[float, float]:
    """Return the speed-up over bf16: eager, and with the host ahead."""
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
    plain, other = (
        nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    layer = LowPrecisionLinear.from_linear(other, lowprec.recipes.get(recipe))

    def step(module: nn.Module) -> None:
        codes.forget_weights()
        module(x.view_as(x)).backward(g)
        x.grad = None
        module.zero_grad()

    speedups = [
        seconds(lambda: step(plain), ahead=ahead) / seconds(lambda: step(layer), ahead=ahead)
        for ahead in (False, True)
    ]
    return speedups[0], speedups[1]


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    for recipe in sys.argv[1:] or ("fp8_blockwise",):
        wgrad = lowprec.recipes.get(recipe).wgrad.b
        kind = wgrad.kind if wgrad is not None and hasattr(wgrad, "kind") else ""
        print(f"{recipe}: M x N x K, eager, ahead; modelled eager, ahead")
        wrong = 0
        for M, N, K in product(TOKENS, FEATURES, FEATURES):
            found = measure(M, N, K, recipe)
            modelled = [payoff(N, K, kind, M, compiled).speedup for compiled in (False, True)]
            bad = [
                model >= SMALLEST and real < WORST
                for model, real in zip(modelled, found, strict=True)
            ]
            wrong += sum(bad)
            marks = " ".join(
                f"{model:.2f}{'!' if b else ' '}" for model, b in zip(modelled, bad, strict=True)
            )
            print(f"{M}x{N}x{K}  {found[0]:.2f} {found[1]:.2f}  {marks}", flush=True)
        print(f"{wrong} that would be converted are slower than bf16 by more than 3%")


if __name__ == "__main__":
    main()
