"""The operands of a linear layer's three GEMMs, and the backends that multiply them: what a recipe
makes of x, w and g.

An operand and its transpose, x for fprop and wgrad, g for dgrad and wgrad, w for fprop and dgrad,
are quantised from one read where a fused kernel can (`quant/triton_quantize.py`).
"""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowprec.formats.random import derive_key
from lowprec.gemm import BACKENDS, GemmBackend, Operand, Size, select
from lowprec.quant import OperandSpec, QTensor, fake_quantize, quantize
from lowprec.quant.triton_quantize import Directions, directions, quantize_both, takes
from lowprec.quant.triton_whole import is_whole, quantize_whole
from lowprec.recipe import GEMMS, FromFprop, Recipe
from lowprec.recipe.state import OPERANDS

_PAIRS = {
    "x": (("fprop", "a"), ("wgrad", "b")),
    "w": (("fprop", "b"), ("dgrad", "b")),
    "g": (("dgrad", "a"), ("wgrad", "a")),
}
"""What is quantised as it is and transposed: (gemm, side) of both."""


@dataclass(frozen=True, kw_only=True)
class LinearGemms:
    """A recipe with the backend of each of its GEMMs on one type of device. There is one object for
    all layers that have the same."""

    recipe: Recipe
    fprop: GemmBackend
    dgrad: GemmBackend
    wgrad: GemmBackend
    pairs: dict[str, Directions | None] = field(default_factory=dict)
    """Of x, w and g: how a fused kernel quantises the matrix and its transpose from one read, where
    both are made from high precision as they are, and for backends that take codes. None
    otherwise."""
    whole: frozenset[str] = frozenset()
    """Those of x, w and g that a fused kernel quantises with one scale per tensor or per row, both
    directions at once."""
    key: str = field(default="", compare=False)
    """Where it is in `GEMMS_OF`."""

    @classmethod
    def on(
        cls,
        device_type: str,
        recipe: Recipe,
        backend: str = "auto",
        shape: tuple[int, int] = (0, 0),
    ) -> "LinearGemms":
        """`shape`: outputs and inputs of the layer, if known."""
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
        gemms = cls(recipe=recipe, fprop=fprop, dgrad=dgrad, wgrad=wgrad)
        plain = {
            name: specs
            for name, operands in _PAIRS.items()
            if (specs := _plain(gemms, *operands)) is not None
        }
        found = {name: directions(*specs) for name, specs in plain.items()}
        pairs = {
            name: None if isinstance(pair := found.get(name), str) else pair for name in _PAIRS
        }
        whole = frozenset(name for name, specs in plain.items() if all(map(is_whole, specs)))
        return _one_of(replace(gemms, pairs=pairs, whole=whole))

    def __reduce__(self) -> Any:
        return _restored, (
            self.recipe,
            [getattr(self, gemm).name for gemm in GEMMS],
            self.pairs,
            self.whole,
        )

    def mm(self, gemm: str, a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
        backend: GemmBackend = getattr(self, gemm)
        return backend.mm(a, b, out_dtype, self.recipe.gemm(gemm).sums)

    def decodes(self, gemm: str) -> bool:
        return getattr(self, gemm).decoded


GEMMS_OF: dict[str, LinearGemms] = {}
"""All that there are, by `key`."""

K = TypeVar("K")


class KnownGemms(MutableMapping[K, LinearGemms]):
    """The LinearGemms that a layer has, for each type of device, say.

    Compiled code takes them by their keys, `GEMMS_OF[known.keys_of[...]]`. Were it to read them off
    the layer, torch.compile would make variables of all numbers in them that differ between two
    layers or phases (blocks of 32 or 128, a format's largest value): slower code, and for floats an
    error in PyTorch 2.13.
    """

    def __init__(self, gemms: Mapping[K, LinearGemms] | None = None) -> None:
        self.keys_of: dict[K, str] = {}
        self.update(gemms or {})

    def __getitem__(self, item: K) -> LinearGemms:
        return GEMMS_OF[self.keys_of[item]]

    def __setitem__(self, item: K, gemms: LinearGemms) -> None:
        self.keys_of[item] = gemms.key

    def __delitem__(self, item: K) -> None:
        del self.keys_of[item]

    def __iter__(self) -> Iterator[K]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)

    def __reduce__(self) -> Any:
        return KnownGemms, (dict(self),)  # keys are this process's


def _one_of(gemms: LinearGemms) -> LinearGemms:
    """The one object that equals `gemms`."""
    for known in GEMMS_OF.values():
        if known == gemms:
            return known
    key = f"{gemms.recipe.name} {len(GEMMS_OF)}"
    GEMMS_OF[key] = replace(gemms, key=key)
    return GEMMS_OF[key]


def _restored(
    recipe: Recipe, backends: list[str], pairs: Any, whole: frozenset[str]
) -> LinearGemms:
    fprop, dgrad, wgrad = (BACKENDS[name] for name in backends)
    return _one_of(
        LinearGemms(recipe=recipe, fprop=fprop, dgrad=dgrad, wgrad=wgrad, pairs=pairs, whole=whole)
    )


def able_backend(recipe: Recipe, backend: str, device_type: str) -> str:
    """`backend`, or "auto" where that can't multiply all that `recipe` asks for.

    Whoever asks for a backend means the configured recipe; one that a layer is raised to, or
    evaluates in, may have other operands.
    """
    if backend not in BACKENDS:
        return "auto"
    asked = ((*recipe.operands(gemm), device_type, recipe.gemm(gemm).sums) for gemm in GEMMS)
    return backend if all(BACKENDS[backend].supports(*product).ok for product in asked) else "auto"


def gemm_size(gemm: str, N: int, K: int) -> Size:
    """Of one of the products of a layer with N outputs and K inputs."""
    return Size(weights=N * K, wide={"fprop": N > K, "dgrad": K > N}.get(gemm, False))


def _plain(
    gemms: LinearGemms, *operands: tuple[str, str]
) -> tuple[OperandSpec, OperandSpec] | None:
    """The specs of a matrix and its transpose if both are quantised from high precision as they
    are, for backends that take codes."""
    specs = []
    for gemm, side in operands:
        spec = gemms.recipe.gemm(gemm)
        source = getattr(spec, side)
        if not isinstance(source, OperandSpec) or spec.hadamard is not None or gemms.decodes(gemm):
            return None
        specs.append(source)
    return specs[0], specs[1]


Pair = tuple[Operand | None, Operand | None]
"""A matrix's operand, and its transpose's."""
NOTHING: Pair = (None, None)

State = tuple[Tensor | None, tuple[Tensor | None, ...]]
"""A pass's key and the histories of `OPERANDS`."""


def both_operands(
    t: Tensor,
    name: str,
    wanted: tuple[bool, bool],
    gemms: LinearGemms,
    state: State,
    *,
    gate: Tensor | None = None,
    saturation: bool = False,
    codes: bool = False,
) -> "tuple[Any, Any]":
    """`t` and `t`^T as the operands that `_PAIRS` names, those that are wanted; from one read where
    a kernel can.

    With a gate: silu(gate) * t and its transpose.
    """
    pair = gemms.pairs[name]
    if pair is not None and not saturation and takes(t) and (gate is None or gate.dtype == t.dtype):
        return (
            quantize_both(t, pair if all(wanted) else pair.only(*wanted), times_silu_of=gate)
            if any(wanted)
            else NOTHING
        )
    if gate is not None:
        t = nn.functional.silu(gate) * t
    (gemm, side), (gemm_t, side_t) = _PAIRS[name]
    recipe, operand, transposed = gemms.recipe, None, None
    if name in gemms.whole and not saturation and not codes and takes(t):
        sources = getattr(recipe.gemm(gemm), side), getattr(recipe.gemm(gemm_t), side_t)
        histories = (
            state[1][OPERANDS.index((gemm, side))],
            state[1][OPERANDS.index((gemm_t, side_t))],
        )
        first, second = (
            source if want else None for source, want in zip(sources, wanted, strict=True)
        )
        return quantize_whole(t, first, second, histories) if any(wanted) else NOTHING
    if wanted[0]:
        operand = make_operand(
            t,
            getattr(recipe.gemm(gemm), side),
            gemm,
            side,
            gemms,
            state,
            saturation=saturation,
            codes=codes,
        )
    if wanted[1]:
        source = getattr(recipe.gemm(gemm_t), side_t)
        transposed = make_operand(t.t(), source, gemm_t, side_t, gemms, state, stored=name == "x")
    return operand, transposed


def make_operand(
    t: Tensor,
    source: Any,
    gemm: str,
    side: str,
    gemms: LinearGemms,
    state: State,
    *,
    saturation: bool = False,
    codes: bool = False,
    stored: bool = False,
) -> Operand:
    """`t` as the operand `side` of `gemm`: transformed, and quantised as its source says.

    For a backend that would decode it at once it is the values themselves, or, if its codes or
    saturation are asked for, a QTensor that holds them decoded; `stored` for later, it is a QTensor
    in the fewest bytes.
    """
    hadamard = gemms.recipe.gemm(gemm).hadamard
    if hadamard is not None:
        t = hadamard.apply(t)
    if not isinstance(source, OperandSpec):
        return t
    key, histories = state
    number = OPERANDS.index((gemm, side))
    key, history = (
        derive_key(key, number) if key is not None and source.stochastic else None,
        histories[number],
    )
    decoded = gemms.decodes(gemm) and not stored
    if decoded and not (saturation or codes):
        return fake_quantize(
            t, source, key=key, history=history, dtype=getattr(gemms, gemm).plain_dtype
        )
    return quantize(t, source, key=key, history=history, decoded=decoded, saturation=saturation)


def backward_operand(made: Operand, gemm: str, gemms: LinearGemms, state: State) -> Operand:
    """b of dgrad or wgrad from fprop's operand: transposed, and perhaps quantised again."""
    source = gemms.recipe.gemm(gemm).b
    assert isinstance(source, FromFprop)
    if source.requantize is None:
        return made.t()
    plain = made.dequantize() if isinstance(made, QTensor) else made
    return make_operand(plain.t(), source.requantize, gemm, "b", gemms, state)


def straight_through(grad: Tensor, saturated: Tensor | None) -> Tensor:
    """The gradient through a rounding: itself, but zero where the clamp cut."""
    return grad if saturated is None else grad.masked_fill(saturated, 0)


def operand_tensors(operand: Operand | None) -> tuple[Tensor | None, ...]:
    if isinstance(operand, QTensor):
        return operand.data, operand.scale_data, operand.zero_point, operand.tensor_scale
    return (operand,)


def operand_from_tensors(
    tensors: list[Tensor], spec: OperandSpec | None, shape: torch.Size | None
) -> Operand | None:
    if spec is None or shape is None:
        return tensors[0]
    data, scale, zero_point, tensor_scale = tensors
    return QTensor(
        data=data,
        scale_data=scale,
        zero_point=zero_point,
        tensor_scale=tensor_scale,
        spec=spec,
        shape=shape,
    )
