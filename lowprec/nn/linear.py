"""The low-precision linear layer: one autograd Function runs every recipe.

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

Layers that are called with the same tensor, as q, k and v are, share its codes.

A gradient has the dtype of the tensor it belongs to; the bias gradient is summed in fp32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowprec.formats.hadamard import Hadamard
from lowprec.nn import operands
from lowprec.nn.codes import forget, shared_codes, weight_codes
from lowprec.nn.gemms import ChosenGemms, LinearGemms, backend_or_auto
from lowprec.nn.operands import PassState
from lowprec.nn.swiglu import swiglu_backward
from lowprec.quant import QTensor, TwoWay
from lowprec.quant.triton_quantize import takes
from lowprec.recipe import Recipe
from lowprec.recipe.state import (
    HISTORIES,
    OPERANDS,
    ROUNDING_STATE,
    history_length,
    next_key,
    states_of,
    this_rank,
)

KEEPS_CODES = ("cuda",)
"""Device types on which codes outlive a call (`codes.py`)."""


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
        ctx.x_spec = kept_x.spec if isinstance(kept_x, QTensor) else None
        ctx.x_shape = kept_x.shape if isinstance(kept_x, QTensor) else None
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        return y_MN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        device_type = grad_outputs[0].device.type
        if torch.compiler.is_compiling() or not _autocast_on(device_type):
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
        dx_MK = _straight_through(dx_MK, x_saturated, hadamard, ctx.features)
        if gate_MK is not None:
            dgate_MK, dx_MK = swiglu_backward(dx_MK, gate_MK, up_MK)

    if needs_dw:
        x_KM = operands.from_tensors(kept, ctx.x_spec, ctx.x_shape)
        assert x_KM is not None
        if gemms.reuses_fprop_x:
            x_KM = operands.from_fprop(x_KM, "wgrad", gemms, state)
        dw_NK = gemms.wgrad(g.cols, x_KM, w_NK.dtype)  # [N, M] . [K, M]^T -> [N, K]
        w_saturated = w_fprop.saturated if isinstance(w_fprop, QTensor) else None
        hadamard = gemms.recipe.fprop.hadamard if gemms.reuses_fprop_x else None
        dw_NK = _straight_through(dw_NK, w_saturated, hadamard, ctx.features)

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
    grad: Tensor, saturated: Tensor | None, hadamard: Hadamard | None, features: int
) -> Tensor:
    """Return the gradient through the rounding of an operand of fprop.

    It passes as it is, except that it is zero where the clamp cut (arXiv 1308.3432; 1712.05877,
    section 3). The gradient of a transformed operand is then transformed back.
    """
    if saturated is not None:
        grad = grad.masked_fill(saturated, 0)
    if hadamard is not None:
        grad = hadamard.invert(grad, features).to(grad.dtype)
    return grad


class LowPrecisionLinear(nn.Linear):
    """An nn.Linear whose three GEMMs run under a recipe. `from_linear` makes one in place."""

    takes_gate = True
    """Flag: `forward` accepts `times_silu_of`."""
    recipe: Recipe
    backend: str
    gemms: ChosenGemms[str]
    """The GEMMs of the recipe by type of device."""
    seed: tuple[int, int]
    """The seed and the layer's number, from which the draws of stochastic rounding start."""
    sharded: bool
    """Flag: FSDP2 shards the weight."""
    plain: bool
    """Flag: the recipe leaves all operands in high precision, so the layer runs as nn.Linear."""
    keeps: tuple[Recipe, ...]
    """Other recipes of the run, whose state the layer holds too."""
    evaluation: Recipe | None
    """The recipe in eval() if it differs from the one in training."""
    evaluation_gemms: ChosenGemms[str]

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        recipe: Recipe,
        backend: str = "auto",
        device_type: str | None = None,
        *,
        seed: int = 0,
        layer: int = 0,
        keeps: tuple[Recipe, ...] = (),
        evaluation: Recipe | None = None,
    ) -> "LowPrecisionLinear":
        """Turn `linear` into a LowPrecisionLinear, in place, and return it.

        The module stays the same object: hooks, outside references, parameters and state-dict keys
        do not change. Only a recipe that keeps state adds buffers (`recipe/state.py`).

        Args:
            device_type: the type of device that it will run on, if the weight is not there yet.
            seed, layer: numbers from which the draws of stochastic rounding start.
            keeps: other recipes that the layer has had or will have. It holds their state too, and
                state that it holds already stays.
            evaluation: the recipe of `eval()`, if it is another one.
        Raises:
            UserError: `backend` can't run the recipe there, or the recipes' states don't fit
                together.
        """
        assert type(linear) in (nn.Linear, cls)
        device_type = device_type or linear.weight.device.type
        gemms: ChosenGemms[str] = ChosenGemms()
        if device_type != "meta":
            shape = (linear.out_features, linear.in_features)
            gemms[device_type] = LinearGemms.on(device_type, recipe, backend, shape)
        if evaluation is not None:
            keeps = (*keeps, evaluation)
        forget(linear)
        state = states_of((recipe, *keeps), linear.weight.device, seed, layer)
        held = {name: buffer for name, buffer in linear._buffers.items() if keeps and name in state}
        linear.__class__ = cls
        assert isinstance(linear, LowPrecisionLinear)
        linear._drop_state()
        linear.recipe = recipe
        linear.backend = backend
        linear.gemms = gemms
        linear.seed = (seed, layer)
        linear.plain = recipe.is_plain
        linear.sharded = type(linear.weight).__name__ == "DTensor"
        linear.keeps = keeps
        linear.evaluation = evaluation
        linear.evaluation_gemms = ChosenGemms()
        for name, buffer in (state | held).items():
            linear.register_buffer(name, buffer)
        return linear

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 sets the sharded weight and the gathered one this way. It refills the gathered one's
        # memory without counting a version, so codes of such a weight must not be kept.
        if name == "weight" and type(value).__name__ == "DTensor":
            self.sharded = True
        super().__setattr__(name, value)

    def to_linear(self) -> nn.Linear:
        """Undo `from_linear`, in place."""
        forget(self)
        self._drop_state()
        for name in LowPrecisionLinear.__annotations__:
            del self.__dict__[name]
        self.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def reset_parameters(self) -> None:
        """Draw new parameters, and reset the recipe's state; torch calls it to give real values to
        a module that was built on the meta device."""
        super().reset_parameters()
        with torch.no_grad():
            fresh = states_of((self.recipe, *self.keeps), self.weight.device, *self.seed)
            for name, buffer in fresh.items():
                self.get_buffer(name).copy_(buffer)

    def _apply(self, fn: Any, recurse: bool = True) -> "LowPrecisionLinear":
        # Kept codes refer to the weight, which torch may want to swap for another tensor.
        forget(self)
        histories = {
            name: buffer for name in HISTORIES if (buffer := self._buffers.get(name)) is not None
        }
        super()._apply(fn, recurse)
        # Histories stay fp32 whatever .half() makes of the parameters.
        for name, history in histories.items():
            moved = self.get_buffer(name)
            if moved.dtype != history.dtype:
                self._buffers[name] = history.to(moved.device)
        return self

    def histories(self) -> list[Tensor]:
        """Return the amax histories that the present recipe scales by."""
        names = [
            name
            for name, operand in zip(HISTORIES, OPERANDS, strict=True)
            if history_length(self.recipe, *operand)
        ]
        return [buffer for name in names if (buffer := self._buffers[name]) is not None]

    def _drop_state(self) -> None:
        for name in (ROUNDING_STATE, *HISTORIES):
            self._buffers.pop(name, None)

    def _state(self) -> tuple[Tensor | None, ...]:
        """Return the key of the coming pass and the amax histories of the six operands.

        An evaluation gets copies of the histories, so that it changes none.
        """
        key = self._buffers.get(ROUNDING_STATE)
        histories = [self._buffers.get(name) for name in HISTORIES]
        if key is not None:
            key = next_key(key, this_rank(), self.training)
        if not self.training:
            histories = [None if history is None else history.clone() for history in histories]
        return key, *histories

    def forward(self, input: Tensor, times_silu_of: Tensor | None = None) -> Tensor:
        """Return x . w^T + bias: [..., K] -> [..., N] of the input's dtype (of autocast's, where
        that is on).

        Args:
            times_silu_of: a tensor like the input: x is silu(it) * input then, quantised as it is
                computed (`swiglu.py`).
        """
        device_type = input.device.type
        gate = times_silu_of
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(f"expected inputs [..., {self.in_features}], got {list(input.shape)}")
        if self.plain and (self.evaluation is None or self.training):
            x = input if gate is None else nn.functional.silu(gate) * input
            return nn.functional.linear(x, self.weight, self.bias)
        if not _autocast_on(device_type):
            return self._run(input, gate, input, device_type)
        # x is cast as nn.Linear would cast it. w is not: it is quantised from its master copy.
        with torch.autocast(device_type, enabled=False):
            dtype = torch.get_autocast_dtype(device_type)
            gate = None if gate is None else gate.to(dtype)
            return self._run(input.to(dtype), gate, input, device_type)

    def _run(self, x: Tensor, gate: Tensor | None, input: Tensor, device_type: str) -> Tensor:
        """Run the recipe. `x` is `input` after autocast's cast; other layers know it by `input`."""
        gemms = self._gemms_on(device_type)
        x_MK = x.reshape(-1, self.in_features)
        gate_MK = None if gate is None else gate.reshape(-1, self.in_features)
        x_ready = TwoWay()
        w_ready = TwoWay()
        if (
            device_type in KEEPS_CODES
            and not torch.compiler.is_compiling()
            and not _capturing(device_type)
        ):
            if gate is None:
                x_ready = self._shared_x(input, x_MK, gemms)
            w_ready = self._kept_w(x.requires_grad, gemms)
        y_MN = LinearFunction.apply(
            x_MK,
            self.weight,
            self.bias,
            gate_MK,
            gemms,
            torch.is_grad_enabled(),
            x_ready,
            w_ready,
            *self._state(),
        )
        return y_MN.view(*x.shape[:-1], self.out_features)

    def _gemms_on(self, device_type: str) -> LinearGemms:
        """Return the GEMMs of the present recipe; they are chosen once for each type of device."""
        recipe = self.recipe
        chosen = self.gemms
        if self.evaluation is not None and not self.training:
            recipe = self.evaluation
            chosen = self.evaluation_gemms
        gemms = chosen.find(device_type)
        if gemms is None:
            backend = self.backend
            if recipe is not self.recipe:
                backend = backend_or_auto(recipe, backend, device_type)
            shape = (self.out_features, self.in_features)
            gemms = LinearGemms.on(device_type, recipe, backend, shape)
            chosen[device_type] = gemms
        return gemms

    def _shared_x(self, input: Tensor, x_MK: Tensor, gemms: LinearGemms) -> TwoWay:
        """Return the operands of an input, which layers with the same input share."""
        spec = gemms.two_way["x"]
        if spec is None or spec.tiles is None or not takes(x_MK):
            return TwoWay()
        needs_cols = torch.is_grad_enabled() and self.weight.requires_grad
        wanted = spec.tiles if needs_cols else spec.tiles.only(True, False)
        return shared_codes(input, x_MK.detach(), wanted)

    def _kept_w(self, needs_cols: bool, gemms: LinearGemms) -> TwoWay:
        """Return the operands of a weight that has not changed since they were made.

        In training only: for an evaluation, some programs put averaged weights in its place through
        `.data` and without an optimizer's step, which nothing counts.
        """
        spec = gemms.two_way["w"]
        if spec is None or spec.tiles is None:
            return TwoWay()
        if not (self.training and torch.is_grad_enabled() and takes(self.weight)):
            return TwoWay()
        wanted = spec.tiles if needs_cols else spec.tiles.only(True, False)
        return weight_codes(self, self.weight.detach(), wanted)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"


def _autocast_on(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _capturing(device_type: str) -> bool:
    """Return whether a CUDA graph is being captured. Its replays run no Python that could see that
    a weight or an input has changed."""
    return device_type == "cuda" and torch.cuda.is_current_stream_capturing()
