"""Measure the error of a Hopper GPU's FP8 accumulator, and of the emulated one.

The e4m3 products go through torch._scaled_mm, with fast accumulation on and off.

python benchmarks/accumulate_hopper.py        # needs a GPU of compute capability 9.0

The errors are relative to fp64, in units of the results' rms: the largest error, its rms, and its
mean towards zero. The last is positive for an accumulator that cuts bits, because sums shrink.
"""

import torch

from lowprec.formats.element import E4M3
from lowprec.formats.rounding import round_to_format
from lowprec.gemm import Accumulation
from lowprec.gemm.reference import ReferenceBackend

ROWS = 256


def operands(kind: str, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two matrices [ROWS, k] of e4m3 values, fp32 on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if kind == "uniform [0, 1)" else torch.randn
    a, b = (round_to_format(draw(ROWS, k, generator=generator), E4M3).cuda() for _ in range(2))
    return a, b


def on_hardware(a: torch.Tensor, b: torch.Tensor, fast: bool) -> torch.Tensor:
    """Return a . b^T by the GPU's FP8 tensor cores, fp32."""
    one = torch.ones((), device="cuda")
    a, b = (t.to(torch.float8_e4m3fn) for t in (a, b))
    # [M, K] . [N, K]^T -> [M, N]
    return torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=fast
    )


def errors(got: torch.Tensor, exact: torch.Tensor) -> str:
    """Return the cells of a table row: largest error, rms error, mean error towards zero."""
    rms = exact.square().mean().sqrt()
    error = (got.double() - exact) / rms
    shrink = -(error * exact.sign()).mean()
    return f"{error.abs().max():.3%} | {error.square().mean().sqrt():.4%} | {shrink:+.4%}"


def main() -> None:
    reference = ReferenceBackend()
    print(torch.cuda.get_device_name(), torch.__version__)
    print(
        "| operands | K | sums | largest | rms | towards zero |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for kind in ("gaussian", "uniform [0, 1)"):
        for k in (1024, 4096, 16384):
            a, b = operands(kind, k, 0)
            exact = a.double() @ b.double().t()  # [M, K] . [N, K]^T -> [M, N]
            rows = {
                "H100, fast accumulation": on_hardware(a, b, True),
                "H100, promoted by cuBLASLt": on_hardware(a, b, False),
            }
            for bits in (12, 13, 14, 15):
                rows[f"emulated, {bits} bits"] = reference.mm(
                    a, b, torch.float32, Accumulation(bits=bits)
                )
            rows["emulated, 14 bits, promoted every 128"] = reference.mm(
                a, b, torch.float32, Accumulation(bits=14, promote_every=128)
            )
            for name, got in rows.items():
                print(f"| {kind} | {k} | {name} | {errors(got, exact)} |")


if __name__ == "__main__":
    main()
