"""What a plain block-scaled layer gives on a Hopper GPU, beside bf16 and ours: the bar that kernels
of one's own have to clear.

python benchmarks/plain_layer.py MxNxK [--one-after-the-other [SECONDS]]

The plain layer is what one writes in an hour: a Triton kernel that quantises tiles of 128 x 128
along rows and columns from one read, and `torch.nn.functional.scaled_mm` for the three products;
the weight's codes are kept, as in a second micro-batch. Forward + backward:

* in turns: each layer runs for 150 ms, half of it again before without being timed, seven times
  round; the median. A card in a long run;
* --one-after-the-other: `do_bench` with 25 ms to warm up and 100 ms to measure, bf16 first and
  again at the end, after SECONDS of rest (default 5). Layers that take 10 ms and more are measured
  while the card still heats up, so the figure depends on what ran before.
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
ROWS, BLOCKS = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128


@triton.jit
def _quantize(x, rows, row_scales, cols, col_scales, M, K, TILE: tl.constexpr):
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
    """Codes of x and of x^T, each with 1x128 scales as cuBLASLt reads them. M and K are multiples
    of 128."""
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
    """Codes of w and of w^T, each with 128x128 scales as cuBLASLt reads them."""
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
        return F.scaled_mm(rows, w.t(), scale, ROWS, scale_w, BLOCKS, output_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale_x, w, scale_w = ctx.saved_tensors
        rows, scale, cols, scale_cols = quantize(grad)
        dgrad = F.scaled_mm(rows, w.t(), scale, ROWS, scale_w, BLOCKS, output_dtype=grad.dtype)
        return (
            dgrad,
            F.scaled_mm(cols, x.t(), scale_cols, ROWS, scale_x, ROWS, output_dtype=grad.dtype),
            None,
        )


class PlainLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.codes = quantize_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.codes)


def in_turns(step: Callable[[nn.Module], object], layers: dict[str, nn.Module]) -> dict[str, float]:
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
    linear = nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)
    layers: dict[str, nn.Module] = {"bf16": linear, "plain": PlainLinear(linear)}
    for name in RECIPES:
        other = nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)
        other.load_state_dict(linear.state_dict())
        layers[name] = LowPrecisionLinear.from_linear(other, lowprec.recipes.get(name))

    def step(layer: nn.Module) -> list[Tensor]:
        y = layer(
            x.view_as(x)
        )  # a new tensor each time: layers called with one tensor share its codes
        y.backward(grad)
        weight: Any = layer.weight
        found = [y, x.grad, weight.grad]
        x.grad = weight.grad = None
        return found

    exact = [t.float() for t in step(linear)]
    for name, layer in layers.items():
        errors = [
            ((t.float() - e).norm() / e.norm()).item()
            for t, e in zip(step(layer), exact, strict=True)
        ]
        print(
            f"{name}: relative errors of y, dx, dw against bf16 "
            + ", ".join(f"{error:.4f}" for error in errors)
        )
    del exact
    for layer in layers.values():
        step(layer)
    torch.cuda.synchronize()
    if args.one_after_the_other is None:
        times = in_turns(step, layers)
    else:
        time.sleep(args.one_after_the_other)
        once = {**layers, "bf16 again": linear}
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
