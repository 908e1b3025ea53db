"""Compare our layers with bf16 and with a plain block-scaled layer on a Hopper GPU.

python benchmarks/plain_layer.py MxNxK [--one-after-the-other [SECONDS]]

The plain layer is what one can write in an hour: a Triton kernel that quantises tiles of 128 x 128
along rows and columns from one read, and `torch.nn.functional.scaled_mm` for the three products.
Our own kernels must be faster than it. The codes of the weight are cached, as in a second
micro-batch. Forward + backward are timed in one of two ways:

* By default, the layers run in turns, seven rounds, as on a GPU in a long run. In each round, each
  layer runs for 150 ms, after half of that time without timing. The result is the median.
* With --one-after-the-other, `do_bench` runs with 25 ms to warm up and 100 ms to measure, after
  SECONDS of rest (default 5). bf16 comes first, and again at the end. Layers that take 10 ms or
  more are measured while the GPU still heats up, so their times depend on what ran before.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F
from triton.testing import do_bench

import lowprec
from lowprec.nn import LowPrecisionLinear

RECIPES = ("fp8_blockwise", "fp8_blockwise_wgrad2d")
ROWS = F.ScalingType.BlockWise1x128
BLOCKS = F.ScalingType.BlockWise128x128


@triton.jit
def _quantize(x, rows, row_scales, cols, col_scales, M, K, TILE: tl.constexpr):
    # One program quantises one tile, along its rows and along its columns.
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    at = m[:, None].to(tl.int64) * K + k[None, :]
    value = tl.load(x + at).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 1), 1e-12) / 448.0
    tl.store(rows + at, (value / scale[:, None]).to(tl.float8e4nv))
    tl.store(row_scales + tl.program_id(1) * M + m, scale)
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / 448.0
    tl.store(
        cols + k[:, None].to(tl.int64) * M + m[None, :],
        tl.trans((value / scale[None, :]).to(tl.float8e4nv)),
    )
    tl.store(col_scales + tl.program_id(0) * K + k, scale)


def quantize(x_MK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the codes and scales of x, then those of x^T.

    Both have 1x128 scales in cuBLASLt's layout. M and K are multiples of 128.
    """
    M, K = x_MK.shape
    rows, cols = (x_MK.new_empty(shape, dtype=torch.float8_e4m3fn) for shape in ((M, K), (K, M)))
    row_scales, col_scales = (
        x_MK.new_empty(shape, dtype=torch.float32) for shape in ((K // 128, M), (M // 128, K))
    )
    _quantize[(M // 128, K // 128)](
        x_MK, rows, row_scales, cols, col_scales, M, K, 128, num_warps=4
    )
    return rows, row_scales.t(), cols, col_scales.t()


def quantize_weight(w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the codes and scales of w, then those of w^T.

    Both have 128x128 scales in cuBLASLt's layout.
    """
    N, K = w_NK.shape
    blocks = w_NK.float().view(N // 128, 128, K // 128, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).view(N, K).to(torch.float8_e4m3fn)

    def laid_out(scales: Tensor) -> Tensor:
        padded = scales.new_zeros(scales.shape[0], -(-scales.shape[1] // 4) * 4)
        padded[:, : scales.shape[1]] = scales
        return padded[:, : scales.shape[1]].t()

    return codes, laid_out(scales), codes.t().contiguous(), laid_out(scales.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, codes: tuple[Tensor, ...]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        w, scale_w, *transposed = codes
        rows, scale, *cols = quantize(x)
        ctx.save_for_backward(*cols, *transposed)
        # [M, K] . [N, K]^T -> [M, N]
        return F.scaled_mm(rows, w.t(), scale, ROWS, scale_w, BLOCKS, output_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale_x, w, scale_w = ctx.saved_tensors
        rows, scale, cols, scale_cols = quantize(grad)
        # dgrad: [M, N] . [K, N]^T -> [M, K]
        dx = F.scaled_mm(rows, w.t(), scale, ROWS, scale_w, BLOCKS, output_dtype=grad.dtype)
        # wgrad: [N, M] . [K, M]^T -> [N, K]
        dw = F.scaled_mm(cols, x.t(), scale_cols, ROWS, scale_x, ROWS, output_dtype=grad.dtype)
        return dx, dw, None


class PlainLinear(nn.Module):
    """A block-scaled FP8 linear layer that quantises its weight once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.codes = quantize_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.codes)


def in_turns(step: Callable[[nn.Module], object], layers: dict[str, nn.Module]) -> dict[str, float]:
    """Return the median time of a step of each layer, in ms."""
    times: dict[str, list[float]] = {name: [] for name in layers}

    def timed(layer: nn.Module, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            step(layer)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats

    repeats = max(4, int(150 / timed(layers["bf16"], 1)))
    for _ in range(7):
        for name, layer in layers.items():
            timed(layer, repeats // 2)
            times[name].append(timed(layer, repeats))
    return {name: statistics.median(each) for name, each in times.items()}


def build_layers(N: int, K: int) -> dict[str, nn.Module]:
    """Return the bf16 layer, the plain layer and our layer under each of `RECIPES`, with one
    weight."""
    linear = nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)
    layers: dict[str, nn.Module] = {"bf16": linear, "plain": PlainLinear(linear)}
    for name in RECIPES:
        other = nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)
        other.load_state_dict(linear.state_dict())
        layers[name] = LowPrecisionLinear.from_linear(other, lowprec.recipes.get(name))
    return layers


def print_errors(step: Callable[[nn.Module], list[Tensor]], layers: dict[str, nn.Module]) -> None:
    """Print the errors of each layer's y, dx and dw relative to the bf16 layer."""
    exact = [t.float() for t in step(layers["bf16"])]
    for name, layer in layers.items():
        errors = [
            ((t.float() - e).norm() / e.norm()).item()
            for t, e in zip(step(layer), exact, strict=True)
        ]
        print(
            f"{name}: relative errors of y, dx, dw against bf16 "
            + ", ".join(f"{error:.4f}" for error in errors)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape")
    parser.add_argument(
        "--one-after-the-other", type=float, nargs="?", const=5.0, metavar="SECONDS"
    )
    args = parser.parse_args()
    M, N, K = map(int, args.shape.split("x"))
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
    layers = build_layers(N, K)

    def step(layer: nn.Module) -> list[Tensor]:
        # Layers that are called with one tensor share its codes, so each call gets a new tensor.
        y = layer(x.view_as(x))
        y.backward(grad)
        weight: Any = layer.weight
        found = [y, x.grad, weight.grad]
        x.grad = None
        weight.grad = None
        return found

    print_errors(step, layers)
    for layer in layers.values():
        step(layer)
    torch.cuda.synchronize()
    if args.one_after_the_other is None:
        times = in_turns(step, layers)
    else:
        time.sleep(args.one_after_the_other)
        once = {**layers, "bf16 again": layers["bf16"]}
        times = {
            n: do_bench(lambda layer=layer: step(layer), warmup=25, rep=100, return_mode="median")
            for n, layer in once.items()
        }
    print(
        torch.cuda.get_device_name(),
        args.shape,
        "  ".join(f"{n} {t:.3f} ms {times['bf16'] / t:.3f}" for n, t in times.items()),
    )


if __name__ == "__main__":
    main()
