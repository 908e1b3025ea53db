"""The autograd Function of a linear layer: one runs every recipe.

    fprop   y_MN  = x_MK   . w_NK^T
    dgrad   dx_MK = g_MN   . (w^T)_KN^T
    wgrad   dw_NK = g^T_NM . (x^T)_KM^T

Shapes: M tokens, N output features, K input features. `operands.py` makes the six operands as the
recipe says (`recipe/base.py`), `gemms.py` multiplies them.

The recipe also decides what is kept for the backward:

* x: wgrad's operand, quantised in fprop along the tokens, so that the high-precision x can be
  freed; or fprop's own operand (quantisation-aware training) and where it saturated; or x itself.
  If the weight is frozen, nothing is kept for wgrad.
* w: the parameter itself, which the backward quantises again, so that FSDP may drop the gathered
  parameter; or dgrad's operand, which came from the same read of w as fprop's and is kept until the
  weight changes (`codes.py`).

A gradient has the dtype of the tensor it belongs to; the bias gradient is summed in fp32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowprec.formats.hadamard import Hadamard
from lowprec.nn import operands
from lowprec.nn.gemms import LinearGemms
from lowprec.nn.operands import PassState
from lowprec.nn.swiglu import swiglu_backward
from lowprec.quant import QTensor, TwoWay


class LinearFunction(torch.autograd.Function):
    """y = x . w^T + bias under a recipe: x [M, K], w [N, K], bias [N] -> y [M, N] of x's dtype.

    Args of `forward`:
        bias_N: None for a layer without bias.
        gate_MK: if given, the layer's input is silu(gate) * x (`swiglu.py`).
        gemms: the recipe and its backends.
        grad_enabled: torch.is_grad_enabled() at the call.
        x_ready, w_ready: the operands of x and w that exist already; empty if none do.
        key, histories: the recipe's state (see `operands.PassState`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MK: Tensor,
        w_NK: Tensor,
        bias_N: Tensor | None,
        gate_MK: Tensor | None,
        gemms: LinearGemms,
        grad_enabled: bool,
        x_ready: TwoWay,
        w_ready: TwoWay,
        key: Tensor | None,
        *histories: Tensor | None,
    ) -> Tensor:
        needs_dx, needs_dw, _ = _needed(ctx, grad_enabled)
        state = PassState(key, histories)
        # In quantisation-aware training x is differentiated as the operand that fprop made of it.
        reuses_x = gemms.reuses_fprop_x
        masks_dx = needs_dx and reuses_x
        x = x_ready
        if x.rows is None:
            x = operands.x(
                x_MK,
                gemms,
                state,
                transposed=needs_dw and not reuses_x,
                gate=gate_MK,
                saturation=masks_dx,
                codes=needs_dw and reuses_x,
            )
        w = w_ready
        if w.rows is None:
            w = operands.w(w_NK, gemms, state, rows=True, cols=False)

        y_MN = gemms.fprop(x.rows, w.rows, x_MK.dtype)  # [M, K] . [N, K]^T -> [M, N]
        if bias_N is not None:
            y_MN = y_MN + bias_N.to(y_MN.dtype)
        if torch.compiler.is_compiling():
            # PyTorch 2.11 silently loses all gradients of a traced Function whose forward ends in a
            # call that returns its own input, as `to` does for a tensor that has the dtype already.
            y_MN = y_MN.view_as(y_MN)

        kept_x = None
        if needs_dw and reuses_x:
            kept_x = x.rows.stored() if isinstance(x.rows, QTensor) else x.rows
        elif needs_dw:
            kept_x = x.cols
        x_saturated = x.rows.saturated if masks_dx and isinstance(x.rows, QTensor) else None
        keeps_gate = gate_MK is not None and needs_dx
        ctx.save_for_backward(
            w_NK,
            key,
            x_saturated,
            gate_MK if keeps_gate else None,
            x_MK if keeps_gate else None,
            *operands.tensors_of(kept_x),
        )
        ctx.gemms = gemms
        ctx.histories = histories
        ctx.w_KN = w.cols
        ctx.x_dtype = x_MK.dtype
        ctx.features = x_MK.shape[1]
        ctx.x_form = operands.form_of(kept_x)
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        return y_MN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        device_type = grad_outputs[0].device.type
        if torch.compiler.is_compiling() or not autocast_is_on(device_type):
            return _backward(ctx, grad_outputs[0])
        # Autocast would round the operands once more.
        with torch.autocast(device_type, enabled=False):
            return _backward(ctx, grad_outputs[0])


def _backward(ctx: Any, g_MN: Tensor) -> tuple[Tensor | None, ...]:
    gemms: LinearGemms = ctx.gemms
    w_NK, key, x_saturated, gate_MK, up_MK, *kept = ctx.saved_tensors
    needs_dx, needs_dw, needs_db = _needed(ctx)
    state = PassState(key, ctx.histories)
    dx_MK = None
    dw_NK = None
    db_N = None
    dgate_MK = None

    g = operands.g(g_MN, gemms, state, rows=needs_dx, cols=needs_dw)
    w_fprop = None
    if gemms.reuses_fprop_w and (needs_dx or needs_dw):
        w_fprop = operands.make(w_NK, ("fprop", "b"), gemms, state, saturation=needs_dw)

    if needs_dx:
        if w_fprop is not None:
            w_KN = operands.from_fprop(w_fprop, "dgrad", gemms, state)
        elif ctx.w_KN is not None:
            w_KN = ctx.w_KN
        else:
            w_KN = operands.w(w_NK, gemms, state, rows=False, cols=True).cols
        dx_MK = gemms.dgrad(g.rows, w_KN, ctx.x_dtype)  # [M, N] . [K, N]^T -> [M, K]
        hadamard = gemms.recipe.fprop.hadamard if gemms.reuses_fprop_w else None
        dx_MK = _straight_through(dx_MK, x_saturated, hadamard, ctx.features, state)
        if gate_MK is not None:
            dgate_MK, dx_MK = swiglu_backward(dx_MK, gate_MK, up_MK)

    if needs_dw:
        x_KM = operands.from_tensors(kept, ctx.x_form)
        assert x_KM is not None
        if gemms.reuses_fprop_x:
            x_KM = operands.from_fprop(x_KM, "wgrad", gemms, state)
        dw_NK = gemms.wgrad(g.cols, x_KM, w_NK.dtype)  # [N, M] . [K, M]^T -> [N, K]
        w_saturated = w_fprop.saturated if isinstance(w_fprop, QTensor) else None
        hadamard = gemms.recipe.fprop.hadamard if gemms.reuses_fprop_x else None
        dw_NK = _straight_through(dw_NK, w_saturated, hadamard, ctx.features, state)

    if needs_db:
        db_N = g_MN.sum(0, dtype=torch.float32).to(ctx.bias_dtype)

    not_tensors = (None,) * 5  # gemms, grad_enabled, x_ready, w_ready, key
    return dx_MK, dw_NK, db_N, dgate_MK, *not_tensors, *(None for _ in ctx.histories)


def _needed(ctx: Any, grad_enabled: bool = True) -> tuple[bool, bool, bool]:
    """Return which of dx, dw and db a backward computes.

    `needs_input_grad` ignores no_grad, and a Function can't ask whether gradients are enabled, so
    the caller passes that in.
    """
    if not grad_enabled:
        return False, False, False
    dx, dw, db, dgate = ctx.needs_input_grad[:4]
    return dx or dgate, dw, db


def _straight_through(
    grad: Tensor,
    saturated: Tensor | None,
    hadamard: Hadamard | None,
    features: int,
    state: PassState,
) -> Tensor:
    """Return the gradient through the rounding of an operand of fprop.

    It passes as it is, except that it is zero where the clamp cut (arXiv 1308.3432; 1712.05877,
    section 3). The gradient of a transformed operand is then transformed back.
    """
    if saturated is not None:
        grad = grad.masked_fill(saturated, 0)
    if hadamard is not None:
        key = state.signs_key("fprop") if hadamard.fresh else None
        grad = hadamard.invert(grad, features, key).to(grad.dtype)
    return grad


def autocast_is_on(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
