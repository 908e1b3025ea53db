"""Matrix products of quantised operands, a_MK . b_NK^T -> c_MN, by the fastest backend that
supports them.

To add a backend, write one file with a GemmBackend and add it to `_ALL`.
"""

from lowprec.errors import UserError, nearest
from lowprec.gemm.base import FP32_SUMS, UNSIZED, Accumulation, GemmBackend, Operand, Size, Support
from lowprec.gemm.bf16_exact import ExactInBf16Backend
from lowprec.gemm.cost import Cost, LayerShape
from lowprec.gemm.hopper import HopperBackend
from lowprec.gemm.reference import ReferenceBackend
from lowprec.gemm.scaled_mm import ScaledMMBackend
from lowprec.gemm.torch_mm import TorchBackend
from lowprec.gemm.triton_mm import TritonBackend
from lowprec.quant import OperandSpec

_ALL = (
    TorchBackend(),
    ScaledMMBackend(),
    HopperBackend(),
    TritonBackend(),
    ExactInBf16Backend(),
    ReferenceBackend(),
)
BACKENDS: dict[str, GemmBackend] = {backend.name: backend for backend in _ALL}
"""All backends by name. `auto` takes the first that supports a product: the fastest in this order,
which `rank` overrides."""

__all__ = [
    "BACKENDS",
    "FP32_SUMS",
    "Accumulation",
    "Cost",
    "GemmBackend",
    "LayerShape",
    "Operand",
    "Size",
    "Support",
    "select",
]


def select(
    a: OperandSpec | None,
    b: OperandSpec | None,
    device_type: str,
    backend: str = "auto",
    sums: Accumulation = FP32_SUMS,
    size: Size = UNSIZED,
) -> tuple[GemmBackend, Support]:
    """Return the backend that multiplies operands `a` and `b` with such sums on a device, and its
    answer to whether it supports them.

    The reason of an emulated product also says why no faster backend took it.

    Args:
        backend: the name of a backend, or "auto" for the fastest that supports the product.
        size: size of the product, which decides between backends of about the same speed.
    Raises:
        UserError: there is no such backend, or it does not support the product.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise UserError(
                "precision.backend: unknown backend "
                f"'{backend}'{nearest(backend, ['auto', *BACKENDS])}"
            )
        support = BACKENDS[backend].supports(a, b, device_type, sums)
        if not support.ok:
            raise UserError(
                f"precision.backend: '{backend}' can't multiply {a} by {b} on {device_type}: "
                f"{support.reason}"
            )
        return BACKENDS[backend], support
    refusals: dict[str, list[str]] = {}
    for candidate in sorted(BACKENDS.values(), key=lambda candidate: candidate.rank(a, b, size)):
        support = candidate.supports(a, b, device_type, sums)
        if support.ok:
            return candidate, Support(
                ok=True,
                native=support.native,
                reason="; ".join([support.reason, *format_refusals(refusals)]),
            )
        refusals.setdefault(support.reason, []).append(candidate.name)
    raise AssertionError("the reference backend supports everything")


def format_refusals(refusals: dict[str, list[str]]) -> list[str]:
    """Return a sentence for each reason, with the backends that gave it: "hopper: needs a Hopper
    GPU, not cpu".

    Reasons that begin with "takes" are about the operands. They are left out if another backend
    takes such operands.

    Args:
        refusals: names of backends by the reason that they gave.
    """
    near = {reason: names for reason, names in refusals.items() if not reason.startswith("takes")}
    return [f"{', '.join(names)}: {reason}" for reason, names in (near or refusals).items()]
