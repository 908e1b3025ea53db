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

from lowprec.gemm import GemmBackend, Operand, select
from lowprec.quant import OperandSpec, QTensor, quantize
from lowprec.recipe import FROM_FPROP, GEMMS, Recipe


@dataclass(frozen=True, kw_only=True)
class LinearGemms:
    """A recipe with the backend of each of its GEMMs on one type of device."""

    recipe: Recipe
    fprop: GemmBackend
    dgrad: GemmBackend
    wgrad: GemmBackend

    @classmethod
    def on(cls, device_type: str, recipe: Recipe, backend: str = "auto") -> "LinearGemms":
        chosen = {gemm: select(*recipe.operands(gemm), device_type, backend)[0] for gemm in GEMMS}
        return cls(recipe=recipe, **chosen)


class LinearFunction(torch.autograd.Function):
    """y = x . w^T + bias under a recipe. x [M, K], w [N, K], bias [N] or None -> y [M, N] of x's dtype."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None, gemms: LinearGemms, grad_enabled: bool) -> Tensor:
        # needs_input_grad knows nothing of no_grad, and inside a Function it can't be asked for.
        recipe, (needs_dx, needs_dw) = gemms.recipe, (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        x, w = _operand(x_MK, recipe.fprop.a, gemms.fprop), _operand(w_NK, recipe.fprop.b, gemms.fprop)
        y_MN = gemms.fprop.mm(x, w, x_MK.dtype)
        if bias_N is not None:
            y_MN = y_MN + bias_N.to(y_MN.dtype)

        kept_x: Operand | None = None
        x_saturated: Tensor | None = None
        if recipe.wgrad.b == FROM_FPROP:
            if needs_dx or needs_dw:
                kept = _operand(x_MK, recipe.fprop.a, None, saturation=needs_dx)
                x_saturated = kept.saturated if isinstance(kept, QTensor) else None
                kept_x = kept if needs_dw else None
        elif needs_dw:
            kept_x = _operand(x_MK.t(), recipe.wgrad.b, None)
        ctx.gemms, ctx.x_dtype, ctx.x_spec = gemms, x_MK.dtype, kept_x.spec if isinstance(kept_x, QTensor) else None
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        ctx.save_for_backward(w_NK, x_saturated, *_tensors(kept_x))
        return y_MN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g_MN,) = grad_outputs
        gemms, recipe = ctx.gemms, ctx.gemms.recipe
        w_NK, x_saturated, *kept = ctx.saved_tensors
        kept_x = _from_tensors(kept, ctx.x_spec)
        needs_dx, needs_dw, needs_db, *_ = ctx.needs_input_grad
        w_fprop = None
        if recipe.dgrad.b == FROM_FPROP:
            w_fprop = _operand(w_NK, recipe.fprop.b, gemms.dgrad, saturation=needs_dw)

        dx_MK = dw_NK = db_N = None
        if needs_dx:
            w_KN = _operand(w_NK.t(), recipe.dgrad.b, gemms.dgrad) if w_fprop is None else w_fprop.t()
            dx_MK = gemms.dgrad.mm(_operand(g_MN, recipe.dgrad.a, gemms.dgrad), w_KN, ctx.x_dtype)
            dx_MK = _straight_through(dx_MK, x_saturated)
        if needs_dw:
            assert kept_x is not None
            x_KM = kept_x.t() if recipe.wgrad.b == FROM_FPROP else kept_x
            dw_NK = gemms.wgrad.mm(_operand(g_MN.t(), recipe.wgrad.a, gemms.wgrad), x_KM, w_NK.dtype)
            dw_NK = _straight_through(dw_NK, w_fprop.saturated if isinstance(w_fprop, QTensor) else None)
        if needs_db:
            db_N = g_MN.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx_MK, dw_NK, db_N, None, None


class LowPrecisionLinear(nn.Linear):
    """An nn.Linear whose three GEMMs run under a recipe. Made by `from_linear`; its parameters are the original's."""

    gemms: dict[str, LinearGemms]
    recipe: Recipe
    backend: str

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe, backend: str = "auto", device_type: str | None = None) -> "LowPrecisionLinear":
        """Turn `linear` into a LowPrecisionLinear, in place, and return it.

        The module stays the same object: hooks, references from outside, parameter identity and state-dict keys are untouched.

        Args:
            device_type: where it will run, if that is not where the weight is now.
        Raises:
            UserError: `backend` can't run the recipe there.
        """
        assert type(linear) in (nn.Linear, cls)
        device_type = device_type or linear.weight.device.type
        chosen = {} if device_type == "meta" else {device_type: LinearGemms.on(device_type, recipe, backend)}
        linear.__class__ = cls
        assert isinstance(linear, LowPrecisionLinear)
        linear.recipe, linear.backend, linear.gemms = recipe, backend, chosen
        return linear

    def to_linear(self) -> nn.Linear:
        """Undo `from_linear`, in place."""
        del self.recipe, self.backend, self.gemms
        self.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
        return self

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
        y_MN = LinearFunction.apply(x_MK, self.weight, self.bias, self.gemms[device_type], torch.is_grad_enabled())
        return y_MN.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"


def _operand(t: Tensor, source: Any, consumer: GemmBackend | None, *, saturation: bool = False) -> Operand:
    """`t` as its source says; decoded if the backend that consumes it at once (None: it is kept for later) would decode it anyway."""
    if not isinstance(source, OperandSpec):
        return t
    return quantize(t, source, decoded=consumer is not None and consumer.decoded, saturation=saturation)


def _straight_through(grad: Tensor, saturated: Tensor | None) -> Tensor:
    """The gradient through a rounding: itself, but zero where the clamp cut."""
    return grad if saturated is None else grad.masked_fill(saturated, 0)


def _tensors(operand: Operand | None) -> tuple[Tensor | None, ...]:
    if isinstance(operand, QTensor):
        return operand.values, operand.scale, operand.zero_point
    return (operand,)


def _from_tensors(tensors: list[Tensor], spec: OperandSpec | None) -> Operand | None:
    if spec is None:
        return tensors[0]
    values, scale, zero_point = tensors
    return QTensor(values=values, scale=scale, zero_point=zero_point, spec=spec)
