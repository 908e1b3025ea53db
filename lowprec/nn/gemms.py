"""The three GEMMs of a linear layer under a recipe, and the backends that multiply them.

    fprop   y_MN  = x_MK   . w_NK^T            [M, K] . [N, K]^T -> [M, N]
    dgrad   dx_MK = g_MN   . (w^T)_KN^T        [M, N] . [K, N]^T -> [M, K]
    wgrad   dw_NK = g^T_NM . (x^T)_KM^T        [N, M] . [K, M]^T -> [N, K]

There is one `LinearGemms` object for all layers with the same recipe and the same backends. They
are held in a table of this module, and layers know them by a key: compiled code that read them off
a layer would make variables of all numbers in them that differ between two layers or phases (blocks
of 32 or 128, a format's largest value), which gives slower code, and for floats an error in PyTorch
2.13.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowprec.gemm import BACKENDS, Accumulation, GemmBackend, Operand, Size, select
from lowprec.quant import OperandSpec
from lowprec.quant.two_way import TwoWaySpec, two_way_spec
from lowprec.recipe import GEMMS, FromFprop, Recipe
from lowprec.recipe.state import new_state

TWO_READERS = {
    "x": (("fprop", "a"), ("wgrad", "b")),
    "w": (("fprop", "b"), ("dgrad", "b")),
    "g": (("dgrad", "a"), ("wgrad", "a")),
}
"""The two GEMMs that read each tensor, as (gemm, side): as it lies, and transposed."""


@dataclass(frozen=True, kw_only=True)
class LinearGemms:
    """A recipe with the backend of each of its GEMMs on one type of device. Made by `on`."""

    recipe: Recipe
    fprop_backend: GemmBackend
    dgrad_backend: GemmBackend
    wgrad_backend: GemmBackend
    two_way: dict[str, TwoWaySpec | None] = field(default_factory=dict)
    """The specs of x, w and g for both GEMMs that read each. None where an operand needs more than
    to be quantised: it is in high precision, taken from fprop, transformed by a Hadamard matrix, or
    its backend takes decoded values."""
    key: str = field(default="", compare=False)
    """Its place in the table of all LinearGemms."""
    # What follows from the recipe, computed once: each layer asks in each pass.
    reuses_fprop_w: bool = field(init=False)
    """Flag: dgrad reads the operand w that fprop read (quantisation-aware training)."""
    reuses_fprop_x: bool = field(init=False)
    """Flag: wgrad reads the operand x that fprop read (quantisation-aware training)."""
    keeps_state: bool = field(init=False)
    """Flag: an operand is rounded stochastically or scaled by a history (`recipe/state.py`)."""
    sums: dict[str, Accumulation] = field(init=False)
    """The accumulation of each GEMM."""

    def __post_init__(self) -> None:
        recipe = self.recipe
        keeps_state = bool(new_state(recipe, torch.device("meta")))
        sums = {gemm: recipe.gemm(gemm).sums for gemm in GEMMS}
        object.__setattr__(self, "reuses_fprop_w", isinstance(recipe.dgrad.b, FromFprop))
        object.__setattr__(self, "reuses_fprop_x", isinstance(recipe.wgrad.b, FromFprop))
        object.__setattr__(self, "keeps_state", keeps_state)
        object.__setattr__(self, "sums", sums)

    @classmethod
    def on(
        cls,
        device_type: str,
        recipe: Recipe,
        backend: str = "auto",
        shape: tuple[int, int] = (0, 0),
    ) -> "LinearGemms":
        """Choose the backends of a recipe's GEMMs.

        Args:
            device_type: "cpu" or "cuda".
            backend: the name of one backend, or "auto" for the fastest that supports each GEMM.
            shape: outputs N and inputs K of the layer; (0, 0) if unknown.
        Raises:
            UserError: the backend can't run the recipe there.
        """
        fprop, dgrad, wgrad = (
            select(
                *recipe.operands(gemm),
                device_type,
                backend,
                recipe.gemm(gemm).sums,
                gemm_size(gemm, *shape),
            )[0]
            for gemm in GEMMS
        )
        gemms = cls(recipe=recipe, fprop_backend=fprop, dgrad_backend=dgrad, wgrad_backend=wgrad)
        two_way = {name: _two_way(gemms, *readers) for name, readers in TWO_READERS.items()}
        return _the_one_equal_to(replace(gemms, two_way=two_way))

    @property
    def fuses_gate(self) -> bool:
        """Flag: a kernel that quantises x can also compute x = silu(gate) * up (`swiglu.py`)."""
        spec = self.two_way["x"]
        return spec is not None and spec.tiles is not None

    # An operand is None only in the direction of a TwoWay that nobody asked for.

    def fprop(self, x_MK: Operand | None, w_NK: Operand | None, out_dtype: torch.dtype) -> Tensor:
        """Return x . w^T: [M, K] . [N, K]^T -> [M, N] of `out_dtype`."""
        assert x_MK is not None
        assert w_NK is not None
        return self.fprop_backend.mm(x_MK, w_NK, out_dtype, self.sums["fprop"])

    def dgrad(self, g_MN: Operand | None, w_KN: Operand | None, out_dtype: torch.dtype) -> Tensor:
        """Return g . w: [M, N] . [K, N]^T -> [M, K] of `out_dtype`."""
        assert g_MN is not None
        assert w_KN is not None
        return self.dgrad_backend.mm(g_MN, w_KN, out_dtype, self.sums["dgrad"])

    def wgrad(self, g_NM: Operand | None, x_KM: Operand | None, out_dtype: torch.dtype) -> Tensor:
        """Return g^T . x: [N, M] . [K, M]^T -> [N, K] of `out_dtype`."""
        assert g_NM is not None
        assert x_KM is not None
        return self.wgrad_backend.mm(g_NM, x_KM, out_dtype, self.sums["wgrad"])

    def backend_of(self, gemm: str) -> GemmBackend:
        """The backend of fprop, dgrad or wgrad."""
        return getattr(self, f"{gemm}_backend")

    def __reduce__(self) -> Any:
        backends = [self.backend_of(gemm).name for gemm in GEMMS]
        return _restore, (self.recipe, backends, self.two_way)


K = TypeVar("K")


class ChosenGemms(MutableMapping[K, LinearGemms]):
    """The LinearGemms that a layer has chosen so far, for each type of device, say."""

    def __init__(self, gemms: Mapping[K, LinearGemms] | None = None) -> None:
        self._keys: dict[K, str] = {}
        self.update(gemms or {})

    def find(self, item: K) -> LinearGemms | None:
        """Return what is chosen for `item`; None if nothing is yet. Layers ask in each pass."""
        key = self._keys.get(item)
        return None if key is None else _TABLE[key]

    def __getitem__(self, item: K) -> LinearGemms:
        return _TABLE[self._keys[item]]

    def __setitem__(self, item: K, gemms: LinearGemms) -> None:
        self._keys[item] = gemms.key

    def __delitem__(self, item: K) -> None:
        del self._keys[item]

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __reduce__(self) -> Any:
        # Keys of the table mean nothing in another process: the objects themselves are pickled.
        return ChosenGemms, (dict(self),)


_TABLE: dict[str, LinearGemms] = {}


def backend_or_auto(recipe: Recipe, backend: str, device_type: str) -> str:
    """Return `backend`, or "auto" where it can't multiply everything that `recipe` asks for.

    A user who asks for a backend means the configured recipe. A recipe that a layer is raised to,
    or evaluates in, may have other operands.
    """
    if backend not in BACKENDS:
        return "auto"
    products = ((*recipe.operands(gemm), device_type, recipe.gemm(gemm).sums) for gemm in GEMMS)
    able = all(BACKENDS[backend].supports(*product).ok for product in products)
    return backend if able else "auto"


def gemm_size(gemm: str, N: int, K: int) -> Size:
    """Return the size of one GEMM of a layer with N outputs and K inputs, as far as it is known."""
    wide = {"fprop": N > K, "dgrad": K > N}.get(gemm, False)
    return Size(weights=N * K, wide=wide)


def _two_way(gemms: LinearGemms, *readers: tuple[str, str]) -> TwoWaySpec | None:
    """Return the specs of a tensor for the two GEMMs that read it; see `LinearGemms.two_way`."""
    specs = []
    for gemm, side in readers:
        gemm_spec = gemms.recipe.gemm(gemm)
        source = getattr(gemm_spec, side)
        takes_codes = not gemms.backend_of(gemm).decoded
        if not isinstance(source, OperandSpec) or gemm_spec.hadamard is not None or not takes_codes:
            return None
        specs.append(source)
    return two_way_spec(*specs)


def _the_one_equal_to(gemms: LinearGemms) -> LinearGemms:
    """Return the object of the table that equals `gemms`, which joins it if there is none."""
    for known in _TABLE.values():
        if known == gemms:
            return known
    key = f"{gemms.recipe.name} {len(_TABLE)}"
    _TABLE[key] = replace(gemms, key=key)
    return _TABLE[key]


def _restore(
    recipe: Recipe, backends: Sequence[str], two_way: dict[str, TwoWaySpec | None]
) -> LinearGemms:
    fprop, dgrad, wgrad = (BACKENDS[name] for name in backends)
    return _the_one_equal_to(
        LinearGemms(
            recipe=recipe,
            fprop_backend=fprop,
            dgrad_backend=dgrad,
            wgrad_backend=wgrad,
            two_way=two_way,
        )
    )
