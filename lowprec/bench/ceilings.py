"""The best that a device does with plain operations, measured in the same run: what a row's time is
held against.

    copy    bytes read plus bytes written per second, by a copy
    bf16    FLOP per second of torch.matmul on bf16 operands of the same shape
    fp8     FLOP per second of torch._scaled_mm on e4m3 operands of the same shape, one scale per tensor, fast accumulation; the bf16 rate
            where the device has no such product

A row's floor is its work over its ceiling: the FLOPs of its products, and for quantisers the bytes
that they must read and write.
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
"""M, N, K of a_MK . b_NK^T; of a linear layer: tokens, output features, input features."""

MATRICES = {
    "x": (("fprop", "a"), ("wgrad", "b")),
    "w": (("fprop", "b"), ("dgrad", "b")),
    "g": (("dgrad", "a"), ("wgrad", "a")),
}
"""A linear layer's matrices, and which operands (gemm, side) are made of each."""

_LEAST_COPY = {"cpu": 4096, "cuda": 256 << 20}
"""Bytes of the smallest copy that is timed: a smaller one would measure the call."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """One measured rate."""

    kind: str
    """copy, bf16 or fp8."""
    of: tuple[int, ...]
    """The bytes copied, or M, N, K."""
    time: Timing
    per_second: float
    """Bytes read and written, or FLOPs."""

    def floor(self, work: float) -> float:
        """Milliseconds that `work`, bytes or FLOPs, takes at this rate."""
        return 1e3 * work / self.per_second


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least time of a row, in ms."""

    products: float = 0.0
    quantisers: float = 0.0
    ceilings: tuple[str, ...]
    """The kinds of ceiling that it rests on."""

    @property
    def total(self) -> float:
        return self.products + self.quantisers

    def beside(self, time: Timing | None) -> dict[str, Any]:
        """{"floor": {"ms", "products_ms", "quantisers_ms", "ceilings"}, "of_floor": floor / median
        or None}."""
        parts = {
            "ms": self.total,
            "products_ms": self.products,
            "quantisers_ms": self.quantisers,
            "ceilings": list(self.ceilings),
        }
        return {"floor": parts, "of_floor": None if time is None else self.total / time.median}


class Ceilings:
    """The ceilings of one device, each measured when it is first asked for."""

    def __init__(self, device: torch.device, seconds: float = 0.5) -> None:
        self.device, self.seconds = device, seconds
        self._measured: dict[Any, Ceiling | None] = {}

    def copy(self, nbytes: int) -> Ceiling:
        """Of a copy of `nbytes`, on a GPU of at least 256 MiB."""
        words = max(nbytes, _LEAST_COPY[self.device.type]) // 4
        found = self._once(("copy", words), lambda: self._copy(words))
        assert found is not None
        return found

    def product(self, shape: Shape, kind: str) -> Ceiling:
        """Of a product; `kind`: "bf16", or "fp8", which gives the bf16 one where there is no
        fp8."""
        found = self._once(
            (kind, shape), lambda: self._bf16(shape) if kind == "bf16" else self._fp8(shape)
        )
        return found if found is not None else self.product(shape, "bf16")

    def product_floor(self, shape: Shape, kind: str) -> Floor:
        """Of one product."""
        ceiling = self.product(shape, kind)
        return Floor(products=ceiling.floor(flops(shape)), ceilings=(ceiling.kind,))

    def layer_floor(
        self, shape: Shape, recipe: Recipe | None, matrices: Iterable[str] = MATRICES
    ) -> Floor:
        """Of a linear layer's forward and backward; in bf16 without a recipe.

        matrices: those of x, w and g that are quantised, each read once in bf16 and written as the
            recipe's operands.
        """
        found = [
            self.product(
                gemm_shape(gemm, shape), "bf16" if recipe is None else product_kind(recipe, gemm)
            )
            for gemm in GEMMS
        ]
        products = sum(ceiling.floor(flops(shape)) for ceiling in found)
        kinds = dict.fromkeys(ceiling.kind for ceiling in found)
        moved = (
            0.0
            if recipe is None
            else sum(quantiser_bytes(recipe, shape, name) for name in matrices)
        )
        if not moved:
            return Floor(products=products, ceilings=tuple(kinds))
        return Floor(
            products=products,
            quantisers=self.copy(int(moved / 2)).floor(moved),
            ceilings=(*kinds, "copy"),
        )

    def to_list(self) -> list[dict[str, Any]]:
        """All that was measured, as plain data."""
        return [asdict(ceiling) for ceiling in self._measured.values() if ceiling is not None]

    def _once(self, key: Any, make: Callable[[], Ceiling | None]) -> Ceiling | None:
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
        a, b = random_operands(shape, self.device)
        return self._measure("bf16", shape, flops(shape), lambda: torch.matmul(a, b.t()))

    def _fp8(self, shape: Shape) -> Ceiling | None:
        if self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) < (8, 9):
            return None
        a, b = (t.to(torch.float8_e4m3fn) for t in random_operands(shape, self.device))
        one = torch.ones((), device=self.device)

        def product() -> object:
            return torch._scaled_mm(
                a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        try:
            product()
        except (RuntimeError, ValueError):  # a shape that it does not take
            return None
        return self._measure("fp8", shape, flops(shape), product)


def flops(shape: Shape) -> float:
    """Of one product."""
    return 2.0 * shape[0] * shape[1] * shape[2]


def gemm_shape(gemm: str, shape: Shape) -> Shape:
    """The product that fprop, dgrad or wgrad of a linear layer of this shape is."""
    M, N, K = shape
    return {"fprop": (M, N, K), "dgrad": (M, K, N), "wgrad": (N, K, M)}[gemm]


def random_operands(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Normally distributed a [M, K] and b [N, K] in bf16, the same each time."""
    M, N, K = shape
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(rows, K, generator=generator, device=device, dtype=torch.bfloat16)
        for rows in (M, N)
    )
    return a, b


def product_kind(recipe: Recipe, gemm: str) -> str:
    """The ceiling that fits a recipe's GEMM: "fp8" where both operands are, else "bf16"."""
    operands = recipe.operands(gemm)
    return (
        "fp8"
        if all(spec is not None and spec.element in (E4M3, E5M2) for spec in operands)
        else "bf16"
    )


def quantiser_bytes(recipe: Recipe, shape: Shape, matrix: str) -> float:
    """Bytes that quantising x, w or g in bf16 must move, once read and once written for each
    operand made of it; 0 if none is scaled."""
    M, N, K = shape
    elements = {"x": M * K, "w": N * K, "g": M * N}[matrix]
    specs = [operand_spec(recipe, gemm, side) for gemm, side in MATRICES[matrix]]
    written = sum(
        _code_bytes(spec) for spec in specs if spec is not None and spec.scaling is not None
    )
    return elements * (2 + written) if written else 0.0


def _code_bytes(spec: OperandSpec) -> float:
    """Of an element's code and its share of the scale."""
    assert spec.scaling is not None
    rows, cols = spec.scaling.block
    scale = (
        0.0
        if ALL in (rows, cols)
        else (4 if spec.scaling.scale_format == "fp32" else 1) / (rows * cols)
    )
    return spec.element.bits / 8 + scale
