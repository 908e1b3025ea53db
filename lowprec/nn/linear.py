"""The low-precision linear layer: one autograd Function runs every recipe.

    fprop   y_MN  = x_MK   . w_NK^T        dgrad   dx_MK = g_MN . (w^T)_KN^T        wgrad   dw_NK = g^T_NM . (x^T)_KM^T

Shapes: M tokens, N output features, K input features. Each of the six operands is built as the recipe says (`recipe/base.py`).

What is kept for the backward follows from the recipe too:

* x: its codes as wgrad will contract them (quantised in fprop, along the tokens), so that the high-precision x can be freed; or fprop's
  own codes (quantisation-aware training) and where they saturated; or x itself. Nothing of it for wgrad if the weight is frozen.
* w: the parameter itself. It is quantised again in the backward: that costs less than holding one more copy of every weight, and
  keeps FSDP free to drop the gathered parameter.

Gradients come out in the dtype of what they belong to; the bias gradient is summed in fp32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowprec.formats.random import derive_key
from lowprec.gemm import GemmBackend, Operand, select
from lowprec.quant import OperandSpec, QTensor, fake_quantize, quantize
from lowprec.recipe import GEMMS, FromFprop, Recipe
from lowprec.recipe.state import OPERANDS, ROUNDING_STATE, history_name, new_state, next_key, this_rank


@dataclass(frozen=True, kw_only=True)
class LinearGemms:
    """A recipe with the backend of each of its GEMMs on one type of device."""

    recipe: Recipe
    fprop: GemmBackend
    dgrad: GemmBackend
    wgrad: GemmBackend

    @classmethod
    def on(cls, device_type: str, recipe: Recipe, backend: str = "auto") -> "LinearGemms":
        chosen = {gemm: select(*recipe.operands(gemm), device_type, backend, recipe.gemm(gemm).sums)[0] for gemm in GEMMS}
        return cls(recipe=recipe, **chosen)

    def mm(self, gemm: str, a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
        backend: GemmBackend = getattr(self, gemm)
        return backend.mm(a, b, out_dtype, self.recipe.gemm(gemm).sums)

    def decodes(self, gemm: str) -> bool:
        return getattr(self, gemm).decoded


class LinearFunction(torch.autograd.Function):
    """y = x . w^T + bias under a recipe. x [M, K], w [N, K], bias [N] or None -> y [M, N] of x's dtype.

    `key` [2] and `histories`, one for each of `OPERANDS`, are the recipe's state (see `recipe/state.py`), None where it needs none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MK: Tensor,
        w_NK: Tensor,
        bias_N: Tensor | None,
        gemms: LinearGemms,
        grad_enabled: bool,
        key: Tensor | None,
        *histories: Tensor | None,
    ) -> Tensor:
        # needs_input_grad knows nothing of no_grad, and inside a Function it can't be asked for.
        recipe, (needs_dx, needs_dw) = gemms.recipe, (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        masks_dx = needs_dx and isinstance(recipe.wgrad.b, FromFprop)  # x is differentiated as the operand that fprop made of it
        state = (key, histories)
        keeps_fprops_x = needs_dw and isinstance(recipe.wgrad.b, FromFprop)
        x = _operand(x_MK, recipe.fprop.a, "fprop", "a", gemms, state, saturation=masks_dx, codes=keeps_fprops_x)
        w = _operand(w_NK, recipe.fprop.b, "fprop", "b", gemms, state)
        y_MN = gemms.mm("fprop", x, w, x_MK.dtype)
        if bias_N is not None:
            y_MN = y_MN + bias_N.to(y_MN.dtype)

        kept_x: Operand | None = None
        if keeps_fprops_x:
            kept_x = x.stored() if isinstance(x, QTensor) else x
        elif needs_dw:
            kept_x = _operand(x_MK.t(), recipe.wgrad.b, "wgrad", "b", gemms, state, stored=True)
        ctx.gemms, ctx.x_dtype, ctx.length, ctx.histories = gemms, x_MK.dtype, x_MK.shape[1], histories
        ctx.x_spec, ctx.x_shape = (kept_x.spec, kept_x.shape) if isinstance(kept_x, QTensor) else (None, None)
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        ctx.save_for_backward(w_NK, key, x.saturated if masks_dx and isinstance(x, QTensor) else None, *_tensors(kept_x))
        return y_MN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_outputs[0])


def _backward(ctx: Any, g_MN: Tensor) -> tuple[Tensor | None, ...]:
    gemms, recipe = ctx.gemms, ctx.gemms.recipe
    w_NK, key, x_saturated, *kept = ctx.saved_tensors
    kept_x = _from_tensors(kept, ctx.x_spec, ctx.x_shape)
    state = (key, ctx.histories)
    needs_dx, needs_dw, needs_db, *_ = ctx.needs_input_grad
    w_fprop = None
    if isinstance(recipe.dgrad.b, FromFprop) and (needs_dx or needs_dw):
        w_fprop = _operand(w_NK, recipe.fprop.b, "fprop", "b", gemms, state, saturation=needs_dw)

    dx_MK = dw_NK = db_N = None
    if needs_dx:
        g = _operand(g_MN, recipe.dgrad.a, "dgrad", "a", gemms, state)
        w_KN = _backward_operand(w_NK, w_fprop, "dgrad", gemms, state)
        dx_MK = _straight_through(gemms.mm("dgrad", g, w_KN, ctx.x_dtype), x_saturated)
        if isinstance(recipe.dgrad.b, FromFprop) and recipe.fprop.hadamard is not None:
            dx_MK = recipe.fprop.hadamard.invert(dx_MK, ctx.length).to(ctx.x_dtype)
    if needs_dw:
        assert kept_x is not None
        g = _operand(g_MN.t(), recipe.wgrad.a, "wgrad", "a", gemms, state)
        x_KM = _backward_operand(None, kept_x, "wgrad", gemms, state)
        dw_NK = _straight_through(gemms.mm("wgrad", g, x_KM, w_NK.dtype), w_fprop.saturated if isinstance(w_fprop, QTensor) else None)
        if isinstance(recipe.wgrad.b, FromFprop) and recipe.fprop.hadamard is not None:
            dw_NK = recipe.fprop.hadamard.invert(dw_NK, ctx.length).to(w_NK.dtype)
    if needs_db:
        db_N = g_MN.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx_MK, dw_NK, db_N, None, None, None, *(None for _ in ctx.histories)


class LowPrecisionLinear(nn.Linear):
    """An nn.Linear whose three GEMMs run under a recipe. Made by `from_linear`; its parameters are the original's."""

    gemms: dict[str, LinearGemms]
    recipe: Recipe
    backend: str
    seed: tuple[int, int]

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, recipe: Recipe, backend: str = "auto", device_type: str | None = None, *, seed: int = 0, layer: int = 0
    ) -> "LowPrecisionLinear":
        """Turn `linear` into a LowPrecisionLinear, in place, and return it.

        The module stays the same object: hooks, references from outside, parameter identity and state-dict keys are untouched, but for the
        buffers of a recipe that keeps state (`recipe/state.py`).

        Args:
            device_type: where it will run, if that is not where the weight is now.
            seed, layer: what stochastic rounding's draws depend on.
        Raises:
            UserError: `backend` can't run the recipe there.
        """
        assert type(linear) in (nn.Linear, cls)
        device_type = device_type or linear.weight.device.type
        chosen = {} if device_type == "meta" else {device_type: LinearGemms.on(device_type, recipe, backend)}
        linear.__class__ = cls
        assert isinstance(linear, LowPrecisionLinear)
        linear._drop_state()
        linear.recipe, linear.backend, linear.gemms, linear.seed = recipe, backend, chosen, (seed, layer)
        for name, buffer in new_state(recipe, linear.weight.device, seed, layer).items():
            linear.register_buffer(name, buffer)
        return linear

    def to_linear(self) -> nn.Linear:
        """Undo `from_linear`, in place."""
        self._drop_state()
        del self.recipe, self.backend, self.gemms, self.seed
        self.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def reset_parameters(self) -> None:
        """Also what makes real values of a module that was built on the meta device."""
        super().reset_parameters()
        with torch.no_grad():
            for name, fresh in new_state(self.recipe, self.weight.device, *self.seed).items():
                self.get_buffer(name).copy_(fresh)

    def _drop_state(self) -> None:
        for name in (ROUNDING_STATE, *(history_name(*operand) for operand in OPERANDS)):
            self._buffers.pop(name, None)

    def _state(self) -> tuple[Tensor | None, ...]:
        """The coming pass's key and the amax histories of the six operands. What evaluation adds to them is dropped."""
        key = self._buffers.get(ROUNDING_STATE)
        histories = [self._buffers.get(history_name(*operand)) for operand in OPERANDS]
        if key is not None:
            key = next_key(key, this_rank(), self.training)
        if not self.training:
            histories = [None if history is None else history.clone() for history in histories]
        return key, *histories

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N] of the input's dtype (of autocast's, where that is on)."""
        device_type = input.device.type
        if torch.is_autocast_enabled(device_type):
            # x is cast as nn.Linear would cast it; w is not: it is quantised from its master copy.
            with torch.autocast(device_type, enabled=False):
                return self._apply_recipe(input.to(torch.get_autocast_dtype(device_type)), device_type)
        return self._apply_recipe(input, device_type)

    def _apply_recipe(self, x: Tensor, device_type: str) -> Tensor:
        if device_type not in self.gemms:
            # A module that was moved: its backends are chosen once per type of device.
            self.gemms[device_type] = LinearGemms.on(device_type, self.recipe, self.backend)
        x_MK = x.reshape(-1, self.in_features)
        gemms, grad_enabled = self.gemms[device_type], torch.is_grad_enabled()
        y_MN = LinearFunction.apply(x_MK, self.weight, self.bias, gemms, grad_enabled, *self._state())
        return y_MN.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"


_State = tuple[Tensor | None, tuple[Tensor | None, ...]]
"""A pass's key and the histories of `OPERANDS`."""


def _operand(
    t: Tensor,
    source: Any,
    gemm: str,
    side: str,
    gemms: LinearGemms,
    state: _State,
    *,
    saturation: bool = False,
    codes: bool = False,
    stored: bool = False,
) -> Operand:
    """`t` as the operand `side` of `gemm`: transformed, and quantised as its source says.

    For a backend that would decode it at once it is the values themselves, or, if its codes or saturation are asked for, a QTensor that
    holds them decoded; `stored` for later, it is a QTensor in the fewest bytes.
    """
    hadamard = gemms.recipe.gemm(gemm).hadamard
    if hadamard is not None:
        t = hadamard.apply(t)
    if not isinstance(source, OperandSpec):
        return t
    key, histories = state
    number = OPERANDS.index((gemm, side))
    key, history = derive_key(key, number) if key is not None and source.stochastic else None, histories[number]
    decoded = gemms.decodes(gemm) and not stored
    if decoded and not (saturation or codes):
        return fake_quantize(t, source, key=key, history=history)
    return quantize(t, source, key=key, history=history, decoded=decoded, saturation=saturation)


def _backward_operand(w_NK: Tensor | None, made: Operand | None, gemm: str, gemms: LinearGemms, state: _State) -> Operand:
    """b of dgrad or wgrad: of fprop's operand, transposed and perhaps quantised again; or made of w now, of x in the forward."""
    source = gemms.recipe.gemm(gemm).b
    if not isinstance(source, FromFprop):
        if made is not None:
            return made
        assert w_NK is not None
        return _operand(w_NK.t(), source, gemm, "b", gemms, state)
    assert made is not None
    if source.requantize is None:
        return made.t()
    plain = made.dequantize() if isinstance(made, QTensor) else made
    return _operand(plain.t(), source.requantize, gemm, "b", gemms, state)


def _straight_through(grad: Tensor, saturated: Tensor | None) -> Tensor:
    """The gradient through a rounding: itself, but zero where the clamp cut."""
    return grad if saturated is None else grad.masked_fill(saturated, 0)


def _tensors(operand: Operand | None) -> tuple[Tensor | None, ...]:
    if isinstance(operand, QTensor):
        return operand.data, operand.scale_data, operand.zero_point, operand.tensor_scale
    return (operand,)


def _from_tensors(tensors: list[Tensor], spec: OperandSpec | None, shape: torch.Size | None) -> Operand | None:
    if spec is None or shape is None:
        return tensors[0]
    data, scale, zero_point, tensor_scale = tensors
    return QTensor(data=data, scale_data=scale, zero_point=zero_point, tensor_scale=tensor_scale, spec=spec, shape=shape)
