"""The operands of a linear layer's three GEMMs: x, w and g as a recipe wants them.

`x`, `w` and `g` each return a `TwoWay`: the tensor for the GEMM that reads it as it lies (`rows`),
and for the one that reads its transpose (`cols`).

    x   rows: fprop's a, [M, K]     cols: wgrad's b, [K, M]
    w   rows: fprop's b, [N, K]     cols: dgrad's b, [K, N]
    g   rows: dgrad's a, [M, N]     cols: wgrad's a, [N, M]

Where both are quantised from high precision as they are, `quantize_two_way` makes them from one
read. Else each is made by itself, in `make`: transformed by the GEMM's Hadamard matrix, quantised,
or kept in high precision.

In quantisation-aware training (`FROM_FPROP`), dgrad and wgrad read the operand that fprop read:
`from_fprop` transposes it, or quantises it once more.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowprec.formats.random import derive_key
from lowprec.gemm import Operand
from lowprec.nn.gemms import TWO_READERS, LinearGemms
from lowprec.quant import OperandSpec, QTensor, StoredOperand, TwoWay, fake_quantize, quantize
from lowprec.quant.quantize import is_one_operator
from lowprec.quant.two_way import quantize_two_way
from lowprec.recipe import FromFprop
from lowprec.recipe.base import GEMMS, OperandSource
from lowprec.recipe.state import OPERANDS


class PassState(NamedTuple):
    """The recipe's state in one pass of a layer (`recipe/state.py`)."""

    key: Tensor | None
    """The key of the pass for stochastic rounding, int64 [2]."""
    histories: tuple[Tensor | None, ...]
    """The amax histories of delayed scaling, one for each of `OPERANDS`."""

    def key_of(self, operand: tuple[str, str], source: OperandSource) -> Tensor | None:
        """Return the key of one operand; None if it is not rounded stochastically."""
        if self.key is None or not isinstance(source, OperandSpec) or not source.stochastic:
            return None
        return derive_key(self.key, OPERANDS.index(operand))

    def signs_key(self, gemm: str) -> Tensor | None:
        """Return the key of the Hadamard signs of a GEMM, which both of its operands share."""
        return None if self.key is None else derive_key(self.key, len(OPERANDS) + GEMMS.index(gemm))

    def history_of(self, operand: tuple[str, str]) -> Tensor | None:
        return self.histories[OPERANDS.index(operand)]


def x(
    x_MK: Tensor,
    gemms: LinearGemms,
    state: PassState,
    *,
    transposed: bool,
    gate: Tensor | None = None,
    saturation: bool = False,
    codes: bool = False,
) -> TwoWay:
    """Return x [M, K] as the operand of fprop, and x^T [K, M] as wgrad's if `transposed`.

    Args:
        gate: a matrix like x: the operand is silu(gate) * x.
        saturation: keep in fprop's operand where the element's range was left.
        codes: fprop's operand will be stored: make it a QTensor also where its values would do.
    """
    return _both(
        x_MK,
        "x",
        gemms,
        state,
        rows=True,
        cols=transposed,
        gate=gate,
        saturation=saturation,
        codes=codes,
    )


def w(w_NK: Tensor, gemms: LinearGemms, state: PassState, *, rows: bool, cols: bool) -> TwoWay:
    """Return w [N, K] as the operand of fprop if `rows`, and w^T [K, N] as dgrad's if `cols`."""
    return _both(w_NK, "w", gemms, state, rows=rows, cols=cols)


def g(g_MN: Tensor, gemms: LinearGemms, state: PassState, *, rows: bool, cols: bool) -> TwoWay:
    """Return g [M, N] as the operand of dgrad if `rows`, and g^T [N, M] as wgrad's if `cols`."""
    return _both(g_MN, "g", gemms, state, rows=rows, cols=cols)


def _both(
    t: Tensor,
    name: str,
    gemms: LinearGemms,
    state: PassState,
    *,
    rows: bool,
    cols: bool,
    gate: Tensor | None = None,
    saturation: bool = False,
    codes: bool = False,
) -> TwoWay:
    as_it_lies, as_transpose = TWO_READERS[name]
    spec = gemms.two_way[name]
    if spec is not None and not gemms.keeps_state:
        return quantize_two_way(t, spec, rows=rows, cols=cols, times_silu_of=gate)
    if spec is not None:
        return quantize_two_way(
            t,
            spec,
            rows=rows,
            cols=cols,
            keys=(state.key_of(as_it_lies, spec.rows), state.key_of(as_transpose, spec.cols)),
            histories=(state.history_of(as_it_lies), state.history_of(as_transpose)),
            times_silu_of=gate,
        )
    if gate is not None:
        t = nn.functional.silu(gate) * t
    made_rows = None
    made_cols = None
    if rows:
        made_rows = make(t, as_it_lies, gemms, state, saturation=saturation, codes=codes)
    if cols:
        made_cols = make(t.t(), as_transpose, gemms, state, stored=name == "x")
    return TwoWay(made_rows, made_cols)


def make(
    t: Tensor,
    operand: tuple[str, str],
    gemms: LinearGemms,
    state: PassState,
    *,
    saturation: bool = False,
    codes: bool = False,
    stored: bool = False,
) -> Operand:
    """Make one operand: transform `t`, and quantise it as its source in the recipe says.

    A backend that decodes codes gets the values themselves. Where codes or saturation are asked
    for, it gets a QTensor that holds them decoded.

    Args:
        operand: (gemm, side), one of `OPERANDS`.
        saturation: keep where the element's range was left.
        codes: return a QTensor.
        stored: return the fewest bytes, to be kept until the backward.
    """
    gemm, side = operand
    spec = gemms.recipe.gemm(gemm)
    source = getattr(spec, side)
    if spec.hadamard is not None:
        t = spec.hadamard.apply(t, state.signs_key(gemm) if spec.hadamard.fresh else None)
    if isinstance(source, FromFprop):
        source = source.requantize
    if source is None:
        return t
    key = None
    history = None
    if gemms.keeps_state:
        key = state.key_of(operand, source)
        history = state.history_of(operand)
    backend = gemms.backend_of(gemm)
    decoded = backend.decoded and not stored
    if stored and backend.decoded and history is None and is_one_operator(t, source):
        return StoredOperand.of(t, source, key)
    if decoded and not (saturation or codes):
        return fake_quantize(t, source, key=key, history=history, dtype=backend.plain_dtype)
    return quantize(t, source, key=key, history=history, decoded=decoded, saturation=saturation)


def from_fprop(operand: Operand, gemm: str, gemms: LinearGemms, state: PassState) -> Operand:
    """Return b of dgrad or wgrad, made from the operand that fprop read there.

    It is the transpose, or, where the recipe asks for that, the transpose of its values quantised
    once more along this GEMM's contraction axis (arXiv 2505.14669).
    """
    source = gemms.recipe.gemm(gemm).b
    assert isinstance(source, FromFprop)
    assert not isinstance(operand, StoredOperand)  # only `x` for wgrad alone is stored so
    if source.requantize is None:
        if isinstance(operand, QTensor) and gemms.backend_of(gemm).decoded:
            # Also in compiled code, where a transposed QTensor would need a new spec.
            return operand.dequantize().t()
        return operand.t()
    values = operand.dequantize() if isinstance(operand, QTensor) else operand
    return make(values.t(), (gemm, "b"), gemms, state)


Form = tuple[OperandSpec, torch.Size, bool]
"""A quantised operand without its tensors: its spec, its shape and whether it is a StoredOperand
that is column-major."""


def tensors_of(operand: Operand | None) -> tuple[Tensor | None, ...]:
    """Return the tensors of an operand, as `save_for_backward` takes them."""
    if isinstance(operand, QTensor):
        return operand.data, operand.scale_data, operand.zero_point, operand.tensor_scale
    return (operand.data,) if isinstance(operand, StoredOperand) else (operand,)


def form_of(operand: Operand | None) -> Form | None:
    """Return the form of a quantised operand; None for any other."""
    if isinstance(operand, QTensor):
        return operand.spec, operand.shape, False
    if isinstance(operand, StoredOperand):
        return operand.spec, operand.shape, operand.transposed
    return None


def from_tensors(tensors: list[Tensor], form: Form | None) -> Operand | None:
    """Return the operand whose `tensors_of` and `form_of` these are."""
    if form is None:
        return tensors[0]
    spec, shape, transposed = form
    if len(tensors) == 1:
        return StoredOperand(data=tensors[0], spec=spec, shape=shape, transposed=transposed)
    data, scale, zero_point, tensor_scale = tensors
    return QTensor(
        data=data,
        scale_data=scale,
        zero_point=zero_point,
        tensor_scale=tensor_scale,
        spec=spec,
        shape=shape,
    )
