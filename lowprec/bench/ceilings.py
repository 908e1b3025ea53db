"""Ceilings: the best rates of a device with plain operations, measured in the same run.

    copy    bytes read plus bytes written per second, by a copy
    bf16    FLOP per second of torch.matmul on bf16 operands of the same shape
    fp8     FLOP per second of torch._scaled_mm on e4m3 operands of the same shape, with one scale
            per tensor and fast accumulation; the bf16 rate if the device has no such product

Each row of a benchmark is compared with its floor, which is its work divided by the ceiling. The
work is the FLOPs of the products and the bytes that the quantisers must read and write.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lowprec.bench.timing import Timing, measure
from lowprec.formats.element import E4M3, E5M2
from lowprec.formats.scaling import ALL
from lowprec.quant import OperandSpec
from lowprec.recipe import GEMMS, Recipe
from lowprec.recipe.state import operand_spec

Shape = tuple[int, int, int]
"""M, N, K of a_MK . b_NK^T. For a linear layer: tokens, output features, input features."""

_Key = tuple[str, int | Shape]
"""Kind of a ceiling with its size: the words that are copied, or M, N, K."""

MATRICES = {
    "x": (("fprop", "a"), ("wgrad", "b")),
    "w": (("fprop", "b"), ("dgrad", "b")),
    "g": (("dgrad", "a"), ("wgrad", "a")),
}
"""The matrices of a linear layer, each with the operands (gemm, side) that are made of it."""

_LEAST_COPY = {"cpu": 4096, "cuda": 256 << 20}
"""Bytes of the smallest copy that is timed. A smaller copy would measure the call itself."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """One measured rate."""

    kind: str
    """Kind of the operation: copy, bf16 or fp8."""
    of: tuple[int, ...]
    """Size of the operation: the bytes copied, or M, N, K."""
    time: Timing
    """Time of one operation."""
    per_second: float
    """Rate: bytes read and written, or FLOPs, per second."""

    def floor(self, work: float) -> float:
        """Return the milliseconds that `work` (bytes or FLOPs) takes at this rate."""
        return 1e3 * work / self.per_second


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A lower bound on the time of a row, in ms."""

    products: float = 0.0
    """Time of the products, in ms."""
    quantisers: float = 0.0
    """Time of the quantisers, in ms."""
    ceilings: tuple[str, ...]
    """Kinds of the ceilings from which the floor is computed."""

    @property
    def total(self) -> float:
        """Time of products and quantisers, in ms."""
        return self.products + self.quantisers

    def beside(self, time: Timing | None) -> dict[str, Any]:
        """Return the floor as plain data, compared with a measured time.

        {"floor": {"ms", "products_ms", "quantisers_ms", "ceilings"}, "of_floor": floor / median, or
        None without a time}.
        """
        parts = {
            "ms": self.total,
            "products_ms": self.products,
            "quantisers_ms": self.quantisers,
            "ceilings": list(self.ceilings),
        }
        return {"floor": parts, "of_floor": None if time is None else self.total / time.median}


class Ceilings:
    """The ceilings of one device. Each is measured at its first use.

    Args:
        device: the device to measure.
        seconds: the time that each measurement takes.
    """

    def __init__(self, device: torch.device, seconds: float = 0.5) -> None:
        self.device = device
        self.seconds = seconds
        self._measured: dict[_Key, Ceiling | None] = {}

    def copy(self, nbytes: int) -> Ceiling:
        """Return the ceiling of a copy of `nbytes`; on a GPU, the copy is at least 256 MiB."""
        words = max(nbytes, _LEAST_COPY[self.device.type]) // 4
        found = self._once(("copy", words), lambda: self._copy(words))
        assert found is not None
        return found

    def product(self, shape: Shape, kind: str) -> Ceiling:
        """Return the ceiling of a product of kind "bf16" or "fp8".

        For "fp8", the result is the bf16 ceiling if the device has no fp8 product.
        """
        found = self._once(
            (kind, shape), lambda: self._bf16(shape) if kind == "bf16" else self._fp8(shape)
        )
        return found if found is not None else self.product(shape, "bf16")

    def product_floor(self, shape: Shape, kind: str) -> Floor:
        """Return the floor of one product."""
        ceiling = self.product(shape, kind)
        return Floor(products=ceiling.floor(flops(shape)), ceilings=(ceiling.kind,))

    def layer_floor(
        self, shape: Shape, recipe: Recipe | None, matrices: Iterable[str] = MATRICES
    ) -> Floor:
        """Return the floor of a linear layer's forward and backward.

        Args:
            shape: the layer's shape.
            recipe: the layer's recipe; None for bf16.
            matrices: the matrices among x, w and g that are quantised. Each is read once in bf16
                and written as the recipe's operands.
        """
        found = [
            self.product(gemm_shape(gemm, shape), product_kind(recipe, gemm)) for gemm in GEMMS
        ]
        products = sum(ceiling.floor(flops(shape)) for ceiling in found)
        kinds = dict.fromkeys(ceiling.kind for ceiling in found)
        moved = 0.0
        if recipe is not None:
            moved = sum(quantiser_bytes(recipe, shape, name) for name in matrices)
        if not moved:
            return Floor(products=products, ceilings=tuple(kinds))
        return Floor(
            products=products,
            quantisers=self.copy(int(moved / 2)).floor(moved),
            ceilings=(*kinds, "copy"),
        )

    def to_list(self) -> list[dict[str, Any]]:
        """Return all measured ceilings as plain data."""
        return [asdict(ceiling) for ceiling in self._measured.values() if ceiling is not None]

    def _once(self, key: _Key, make: Callable[[], Ceiling | None]) -> Ceiling | None:
        if key not in self._measured:
            self._measured[key] = make()
        return self._measured[key]

    def _measure(
        self, kind: str, of: tuple[int, ...], work: float, function: Callable[[], object]
    ) -> Ceiling:
        time = measure(function, self.device, seconds=self.seconds)
        return Ceiling(kind=kind, of=of, time=time, per_second=1e3 * work / time.median)

    def _copy(self, words: int) -> Ceiling:
        source = torch.zeros(words, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        return self._measure("copy", (4 * words,), 8 * words, lambda: target.copy_(source))

    def _bf16(self, shape: Shape) -> Ceiling:
        a_MK, b_NK = random_operands(shape, self.device)
        # [M, K] . [N, K]^T -> [M, N]
        return self._measure("bf16", shape, flops(shape), lambda: torch.matmul(a_MK, b_NK.t()))

    def _fp8(self, shape: Shape) -> Ceiling | None:
        if self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) < (8, 9):
            return None
        a_MK, b_NK = (t.to(torch.float8_e4m3fn) for t in random_operands(shape, self.device))
        one = torch.ones((), device=self.device)

        def product() -> object:
            # [M, K] . [N, K]^T -> [M, N]
            return torch._scaled_mm(
                a_MK, b_NK.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        try:
            product()
        except (RuntimeError, ValueError):  # _scaled_mm does not support this shape.
            return None
        return self._measure("fp8", shape, flops(shape), product)


def flops(shape: Shape) -> float:
    """Return the number of FLOPs of one product."""
    return 2.0 * shape[0] * shape[1] * shape[2]


def gemm_shape(gemm: str, shape: Shape) -> Shape:
    """Return the M, N, K of the fprop, dgrad or wgrad product of a linear layer of this shape."""
    M, N, K = shape
    return {"fprop": (M, N, K), "dgrad": (M, K, N), "wgrad": (N, K, M)}[gemm]


def random_operands(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normally distributed a [M, K] and b [N, K] in bf16, the same values each time."""
    M, N, K = shape
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(rows, K, generator=generator, device=device, dtype=torch.bfloat16)
        for rows in (M, N)
    )
    return a, b


def product_kind(recipe: Recipe | None, gemm: str) -> str:
    """Return the kind of ceiling for a GEMM: "fp8" if the recipe makes both operands fp8, else
    "bf16"."""
    if recipe is None:
        return "bf16"
    operands = recipe.operands(gemm)
    fp8 = all(spec is not None and spec.element in (E4M3, E5M2) for spec in operands)
    return "fp8" if fp8 else "bf16"


def quantiser_bytes(recipe: Recipe, shape: Shape, matrix: str) -> float:
    """Return the bytes that quantising x, w or g must move.

    The matrix is read once in bf16 and written once for each operand that is made of it. The result
    is 0 if no such operand has scales.
    """
    M, N, K = shape
    elements = {"x": M * K, "w": N * K, "g": M * N}[matrix]
    specs = [operand_spec(recipe, gemm, side) for gemm, side in MATRICES[matrix]]
    written = sum(
        _code_bytes(spec) for spec in specs if spec is not None and spec.scaling is not None
    )
    return elements * (2 + written) if written else 0.0


def _code_bytes(spec: OperandSpec) -> float:
    """Return the bytes of one element: its code and its share of the block's scale."""
    assert spec.scaling is not None
    rows, cols = spec.scaling.block
    scale = 0.0
    if ALL not in (rows, cols):
        scale = (4 if spec.scaling.scale_format == "fp32" else 1) / (rows * cols)
    return spec.element.bits / 8 + scale
