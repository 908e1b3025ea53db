"""What a Hopper GPU's FP8 accumulator loses, beside the emulated one: e4m3 products through
torch._scaled_mm, fast accumulation on and off.

python benchmarks/accumulate_hopper.py        # needs a GPU of compute capability 9.0

Errors against fp64, in units of the results' rms: the largest, the rms, and the mean towards zero
(an accumulator that cuts shrinks sums).
"""

import torch

from lowprec.formats.element import E4M3
from lowprec.formats.rounding import round_to_format
from lowprec.gemm import Accumulation
from lowprec.gemm.reference import ReferenceBackend

ROWS = 256


def operands(kind: str, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if kind == "uniform [0, 1)" else torch.randn
    a, b = (round_to_format(draw(ROWS, k, generator=generator), E4M3).cuda() for _ in range(2))
    return a, b


def on_hardware(a: torch.Tensor, b: torch.Tensor, fast: bool) -> torch.Tensor:
    one = torch.ones((), device="cuda")
    codes = (t.to(torch.float8_e4m3fn) for t in (a, b))
    left, right = codes
    return torch._scaled_mm(
        left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=fast
    )


def errors(got: torch.Tensor, exact: torch.Tensor) -> str:
    rms = exact.square().mean().sqrt()
    error = (got.double() - exact) / rms
    shrink = -(error * exact.sign()).mean()
    return f"{error.abs().max():.3%} | {error.square().mean().sqrt():.4%} | {shrink:+.4%}"


def main() -> None:
    reference = ReferenceBackend()
    print(torch.cuda.get_device_name(), torch.__version__)
    print(
        "| operands | K | sums | largest | rms | towards zero |\n| --- | --- | --- | --- | --- | "
        "--- |"
    )
    for kind in ("gaussian", "uniform [0, 1)"):
        for k in (1024, 4096, 16384):
            a, b = operands(kind, k, 0)
            exact = a.double() @ b.double().t()
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
