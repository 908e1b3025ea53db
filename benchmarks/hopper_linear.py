"""The FP8 path of a linear layer on a Hopper GPU, in parts and whole: quantisers over the copy rate, forward + backward over bf16.

python benchmarks/hopper_linear.py [MxNxK ...]

Every step quantises x anew, as a training step does (`x.view_as(x)`: layers that are called with one tensor share its codes). The weight's
codes are kept, as in a second micro-batch, or dropped before each step (uncached). bf16 is measured before and after; its mean counts.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from triton.testing import do_bench

import lowprec
from lowprec.nn import LowPrecisionLinear, codes
from lowprec.quant import OperandSpec
from lowprec.quant.triton_quantize import directions, quantize_both

SHAPES = ("8192x4096x4096", "8192x14336x4096", "8192x4096x14336", "8192x8192x8192", "16384x28672x4096")
RECIPES = ("fp8_blockwise", "fp8_blockwise_wgrad2d")
TILE, BLOCK = OperandSpec.parse("e4m3[1x128 fp32]"), OperandSpec.parse("e4m3[128x128 fp32]")


def median(function: Callable[[], object]) -> float:
    return do_bench(function, warmup=100, rep=150, return_mode="median")


def quantisers(rows: int = 16384, cols: int = 8192) -> None:
    x, up = (torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    y = torch.empty_like(x)
    copy = 4 * x.numel() / median(lambda: y.copy_(x)) / 1e6
    print(f"copy of {rows}x{cols} bf16: {copy:.0f} GB/s")
    cases: list[tuple[str, OperandSpec | None, OperandSpec | None, dict[str, Tensor], int]] = [
        ("1x128, x and x^T", TILE, TILE, {}, 4),
        ("128x128, w and w^T", BLOCK, BLOCK, {}, 4),
        ("1x128 x, 128x128 x^T", TILE, BLOCK, {}, 4),
        ("1x128, x alone", TILE, None, {}, 3),
        ("silu(x) * y, both directions", TILE, TILE, {"times_silu_of": up}, 6),
    ]
    for name, a, b, more, bytes_each in cases:
        wanted = directions(a, b)
        assert not isinstance(wanted, str)
        time = median(lambda wanted=wanted, more=more: quantize_both(x, wanted, **more))
        rate = bytes_each * x.numel() / time / 1e6
        print(f"{name:30s} {time:.4f} ms, {rate:.0f} GB/s at {bytes_each} bytes an element, {rate / copy:.3f} of the copy's", flush=True)


def layers(M: int, N: int, K: int) -> None:
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)

    def step(layer: nn.Module) -> None:
        layer(x.view_as(x)).backward(g)
        x.grad = None
        layer.zero_grad()

    def uncached(layer: nn.Module) -> None:
        codes.forget_weights()
        step(layer)

    def linear() -> nn.Linear:
        return nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)

    plain = linear()
    before = median(lambda: step(plain))
    times = []
    for recipe in RECIPES:
        layer = LowPrecisionLinear.from_linear(linear(), lowprec.recipes.get(recipe))
        times += [(recipe, median(lambda layer=layer: step(layer))), (f"{recipe}, uncached", median(lambda layer=layer: uncached(layer)))]
    bf16 = (before + median(lambda: step(plain))) / 2
    print(f"{M}x{N}x{K}  bf16 {bf16:.3f} ms  " + "  ".join(f"{name} {time:.3f} ms {bf16 / time:.3f}" for name, time in times), flush=True)


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    quantisers()
    for shape in sys.argv[1:] or SHAPES:
        layers(*map(int, shape.split("x")))


if __name__ == "__main__":
    main()
