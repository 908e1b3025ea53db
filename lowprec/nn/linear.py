"""The low-precision linear layer: one autograd Function runs every recipe.

    fprop   y_MN  = x_MK   . w_NK^T        dgrad   dx_MK = g_MN . (w^T)_KN^T        wgrad   dw_NK = g^T_NM . (x^T)_KM^T

Shapes: M tokens, N output features, K input features. Each of the six operands is built as the
recipe says (`recipe/base.py`).

What is kept for the backward follows from the recipe too:

* x: its codes as wgrad will contract them (quantised in fprop, along the tokens), so that the
  high-precision x can be freed; or fprop's own codes (quantisation-aware training) and where they
  saturated; or x itself. Nothing of it for wgrad if the weight is frozen.
* w: the parameter itself, quantised again in the backward, so that FSDP is free to drop the
  gathered parameter; or the codes of w^T that fprop's read of w made as well, kept until the weight
  changes (`codes.py`).

Layers that are called with the same tensor, as q, k and v are, share its codes.

Gradients come out in the dtype of what they belong to; the bias gradient is summed in fp32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowprec.nn.codes import forget, shared_codes, weight_codes
from lowprec.nn.operands import (
    GEMMS_OF,
    NOTHING,
    KnownGemms,
    LinearGemms,
    Pair,
    able_backend,
    backward_operand,
    both_operands,
    make_operand,
    operand_from_tensors,
    operand_tensors,
    straight_through,
)
from lowprec.nn.swiglu import swiglu_backward
from lowprec.quant import QTensor
from lowprec.quant.triton_quantize import takes
from lowprec.recipe import FromFprop, Recipe
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
"""Where codes outlive a call (`codes.py`)."""


class LinearFunction(torch.autograd.Function):
    """y = x . w^T + bias under a recipe. x [M, K], w [N, K], bias [N] or None -> y [M, N] of x's
    dtype.

    `gate` [M, K], or None: the input is silu(gate) * x then, quantised as it is made (`swiglu.py`).
    `made_x`, `made_w`: the codes of x and x^T, of w and w^T, if they are there already. `key` [2]
    and `histories`, one for each of `OPERANDS`, are the recipe's state (see `recipe/state.py`),
    None where it needs none.
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
        made_x: "Pair",
        made_w: "Pair",
        key: Tensor | None,
        *histories: Tensor | None,
    ) -> Tensor:
        # needs_input_grad knows nothing of no_grad, and inside a Function it can't be asked for.
        recipe, (needs_dx, needs_dw, _, needs_dgate) = (
            gemms.recipe,
            (grad_enabled and needed for needed in ctx.needs_input_grad[:4]),
        )
        needs_dx = needs_dx or needs_dgate
        masks_dx = needs_dx and isinstance(
            recipe.wgrad.b, FromFprop
        )  # x is differentiated as the operand that fprop made of it
        state = (key, histories)
        keeps_fprops_x = needs_dw and isinstance(recipe.wgrad.b, FromFprop)
        x, kept_x = made_x
        if x is None:
            wanted = needs_dw and not keeps_fprops_x
            x, kept_x = both_operands(
                x_MK,
                "x",
                (True, wanted),
                gemms,
                state,
                gate=gate_MK,
                saturation=masks_dx,
                codes=keeps_fprops_x,
            )
        w, ctx.w_t = made_w
        if w is None:
            w, _ = both_operands(w_NK, "w", (True, False), gemms, state)
        y_MN = gemms.mm("fprop", x, w, x_MK.dtype)
        if bias_N is not None:
            y_MN = y_MN + bias_N.to(y_MN.dtype)
        if torch.compiler.is_compiling():
            # PyTorch 2.11 loses all gradients of a traced Function, without a word, if the last
            # thing that its forward calls returns the very tensor it was given, as `to` does for a
            # tensor that has the dtype already.
            y_MN = y_MN.view_as(y_MN)

        if keeps_fprops_x:
            kept_x = x.stored() if isinstance(x, QTensor) else x
        elif not needs_dw:
            kept_x = None
        ctx.gemms, ctx.x_dtype, ctx.length, ctx.histories = (
            gemms,
            x_MK.dtype,
            x_MK.shape[1],
            histories,
        )
        ctx.x_spec, ctx.x_shape = (
            (kept_x.spec, kept_x.shape) if isinstance(kept_x, QTensor) else (None, None)
        )
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        gated = (gate_MK, x_MK) if gate_MK is not None and needs_dx else (None, None)
        ctx.save_for_backward(
            w_NK,
            key,
            x.saturated if masks_dx and isinstance(x, QTensor) else None,
            *gated,
            *operand_tensors(kept_x),
        )
        return y_MN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        device_type = grad_outputs[0].device.type
        if torch.compiler.is_compiling() or not _autocast_on(device_type):
            return _backward(ctx, grad_outputs[0])
        with torch.autocast(device_type, enabled=False):  # it would round the operands once more
            return _backward(ctx, grad_outputs[0])


def _backward(ctx: Any, g_MN: Tensor) -> tuple[Tensor | None, ...]:
    gemms, recipe = ctx.gemms, ctx.gemms.recipe
    w_NK, key, x_saturated, gate_MK, up_MK, *kept = ctx.saved_tensors
    kept_x = operand_from_tensors(kept, ctx.x_spec, ctx.x_shape)
    state = (key, ctx.histories)
    needs_dx, needs_dw, needs_db, needs_dgate, *_ = ctx.needs_input_grad
    needs_dx = needs_dx or needs_dgate
    w_fprop = None
    if isinstance(recipe.dgrad.b, FromFprop) and (needs_dx or needs_dw):
        w_fprop = make_operand(
            w_NK, recipe.fprop.b, "fprop", "b", gemms, state, saturation=needs_dw
        )

    dx_MK = dw_NK = db_N = dgate_MK = None
    g, g_t = both_operands(g_MN, "g", (needs_dx, needs_dw), gemms, state)
    if needs_dx:
        assert g is not None
        if w_fprop is not None:
            w_KN = backward_operand(w_fprop, "dgrad", gemms, state)
        else:
            w_KN = (
                ctx.w_t
                if ctx.w_t is not None
                else both_operands(w_NK, "w", (False, True), gemms, state)[1]
            )
        dx_MK = straight_through(gemms.mm("dgrad", g, w_KN, ctx.x_dtype), x_saturated)
        if isinstance(recipe.dgrad.b, FromFprop) and recipe.fprop.hadamard is not None:
            dx_MK = recipe.fprop.hadamard.invert(dx_MK, ctx.length).to(ctx.x_dtype)
        if gate_MK is not None:
            dgate_MK, dx_MK = swiglu_backward(dx_MK, gate_MK, up_MK)
    if needs_dw:
        assert kept_x is not None
        assert g_t is not None
        x_KM = (
            backward_operand(kept_x, "wgrad", gemms, state)
            if isinstance(recipe.wgrad.b, FromFprop)
            else kept_x
        )
        dw_NK = straight_through(
            gemms.mm("wgrad", g_t, x_KM, w_NK.dtype),
            w_fprop.saturated if isinstance(w_fprop, QTensor) else None,
        )
        if isinstance(recipe.wgrad.b, FromFprop) and recipe.fprop.hadamard is not None:
            dw_NK = recipe.fprop.hadamard.invert(dw_NK, ctx.length).to(w_NK.dtype)
    if needs_db:
        db_N = g_MN.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (
        dx_MK,
        dw_NK,
        db_N,
        dgate_MK,
        None,
        None,
        None,
        None,
        None,
        *(None for _ in ctx.histories),
    )


class LowPrecisionLinear(nn.Linear):
    """An nn.Linear whose three GEMMs run under a recipe. Made by `from_linear`; its parameters are
    the original's."""

    takes_gate = True
    gemms: KnownGemms[str]
    recipe: Recipe
    backend: str
    seed: tuple[int, int]
    sharded: bool
    plain: bool
    """Whether it is nn.Linear still: in a phase that leaves it as it is, say."""
    keeps: tuple[Recipe, ...]
    evaluation: Recipe | None
    evaluation_gemms: KnownGemms[str]

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

        The module stays the same object: hooks, references from outside, parameter identity and
            state-dict keys are untouched, but for the
        buffers of a recipe that keeps state (`recipe/state.py`).

        Args:
            device_type: where it will run, if that is not where the weight is now.
            seed, layer: what stochastic rounding's draws depend on.
            keeps: other recipes that the layer has had or will have. It holds their state too, and
                what it holds already stays.
            evaluation: the recipe of `eval()`, if it is another one.
        Raises:
            UserError: `backend` can't run the recipe there, or the recipes' states don't fit
                together.
        """
        assert type(linear) in (nn.Linear, cls)
        device_type = device_type or linear.weight.device.type
        chosen = (
            {}
            if device_type == "meta"
            else {
                device_type: LinearGemms.on(
                    device_type, recipe, backend, (linear.out_features, linear.in_features)
                )
            }
        )
        if evaluation is not None:
            keeps = (*keeps, evaluation)
        forget(linear)
        state = states_of((recipe, *keeps), linear.weight.device, seed, layer)
        held = {name: buffer for name, buffer in linear._buffers.items() if keeps and name in state}
        linear.__class__ = cls
        assert isinstance(linear, LowPrecisionLinear)
        linear._drop_state()
        linear.recipe, linear.backend, linear.gemms, linear.seed = (
            recipe,
            backend,
            KnownGemms(chosen),
            (seed, layer),
        )
        linear.plain = recipe.is_plain
        linear.sharded = type(linear.weight).__name__ == "DTensor"
        linear.keeps, linear.evaluation, linear.evaluation_gemms = keeps, evaluation, KnownGemms()
        for name, buffer in (state | held).items():
            linear.register_buffer(name, buffer)
        return linear

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 puts the sharded and the gathered weight in place by this; its gathered memory is
        # written where no version counts it.
        if name == "weight" and type(value).__name__ == "DTensor":
            self.sharded = True
        super().__setattr__(name, value)

    def to_linear(self) -> nn.Linear:
        """Undo `from_linear`, in place."""
        forget(self)
        self._drop_state()
        del (
            self.recipe,
            self.backend,
            self.gemms,
            self.seed,
            self.sharded,
            self.plain,
            self.keeps,
            self.evaluation,
            self.evaluation_gemms,
        )
        self.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def reset_parameters(self) -> None:
        """Also what makes real values of a module that was built on the meta device."""
        super().reset_parameters()
        with torch.no_grad():
            for name, fresh in states_of(
                (self.recipe, *self.keeps), self.weight.device, *self.seed
            ).items():
                self.get_buffer(name).copy_(fresh)

    def _apply(self, fn: Any, recurse: bool = True) -> "LowPrecisionLinear":
        forget(self)  # which refers to the weight: torch may want to swap that for another tensor
        histories = {
            name: buffer for name in HISTORIES if (buffer := self._buffers.get(name)) is not None
        }
        super()._apply(fn, recurse)
        for name, history in histories.items():  # fp32, whatever .half() makes of the parameters
            moved = self.get_buffer(name)
            if moved.dtype != history.dtype:
                self._buffers[name] = history.to(moved.device)
        return self

    def histories(self) -> list[Tensor]:
        """The amax histories that the present recipe scales by."""
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
        """The coming pass's key and the amax histories of the six operands. What evaluation adds to
        them is dropped."""
        key = self._buffers.get(ROUNDING_STATE)
        histories = [self._buffers.get(name) for name in HISTORIES]
        if key is not None:
            key = next_key(key, this_rank(), self.training)
        if not self.training:
            histories = [None if history is None else history.clone() for history in histories]
        return key, *histories

    def forward(self, input: Tensor, times_silu_of: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N] of the input's dtype (of autocast's, where that is on).

        times_silu_of: a tensor like the input: the layer's input is silu(it) * input then,
            quantised as it is made (`swiglu.py`).
        """
        device_type, gate = input.device.type, times_silu_of
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(f"expected inputs [..., {self.in_features}], got {list(input.shape)}")
        if self.plain and (self.evaluation is None or self.training):
            x = input if gate is None else nn.functional.silu(gate) * input
            return nn.functional.linear(x, self.weight, self.bias)
        if _autocast_on(device_type):
            # x is cast as nn.Linear would cast it; w is not: it is quantised from its master copy.
            with torch.autocast(device_type, enabled=False):
                dtype = torch.get_autocast_dtype(device_type)
                return self._apply_recipe(
                    input.to(dtype), None if gate is None else gate.to(dtype), input, device_type
                )
        return self._apply_recipe(input, gate, input, device_type)

    def _apply_recipe(
        self, x: Tensor, gate: Tensor | None, input: Tensor, device_type: str
    ) -> Tensor:
        """`x` is `input` as the layer takes it: what other layers share is known by `input`."""
        recipe, known = self.recipe, self.gemms
        if self.evaluation is not None and not self.training:
            recipe, known = self.evaluation, self.evaluation_gemms
        if device_type not in known.keys_of:
            # A module that was moved: its backends are chosen once per type of device.
            backend = (
                self.backend
                if recipe is self.recipe
                else able_backend(recipe, self.backend, device_type)
            )
            known[device_type] = LinearGemms.on(
                device_type, recipe, backend, (self.out_features, self.in_features)
            )
        x_MK = x.reshape(-1, self.in_features)
        gemms, grad_enabled = GEMMS_OF[known.keys_of[device_type]], torch.is_grad_enabled()
        keeps = (
            device_type in KEEPS_CODES
            and not torch.compiler.is_compiling()
            and not _capturing(device_type)
        )
        gate_MK = None if gate is None else gate.reshape(-1, self.in_features)
        made_x = self._made_x(input, x_MK, gemms) if keeps and gate is None else NOTHING
        made_w = self._made_w(x.requires_grad, gemms) if keeps else NOTHING
        y_MN = LinearFunction.apply(
            x_MK,
            self.weight,
            self.bias,
            gate_MK,
            gemms,
            grad_enabled,
            made_x,
            made_w,
            *self._state(),
        )
        return y_MN.view(*x.shape[:-1], self.out_features)

    def _made_x(self, input: Tensor, x_MK: Tensor, gemms: LinearGemms) -> "Pair":
        """The codes of an input that other layers may take too."""
        pair = gemms.pairs["x"]
        if pair is None or not takes(x_MK):
            return NOTHING
        needs_x_t = torch.is_grad_enabled() and self.weight.requires_grad
        return shared_codes(input, x_MK.detach(), pair if needs_x_t else pair.only(True, False))

    def _made_w(self, x_requires_grad: bool, gemms: LinearGemms) -> "Pair":
        """The codes of a weight that has not changed since they were made. In training only: for an
        evaluation some write averaged weights in their place, through `.data` and without an
        optimizer's step."""
        pair = gemms.pairs["w"]
        if pair is None or not (self.training and torch.is_grad_enabled() and takes(self.weight)):
            return NOTHING
        return weight_codes(
            self, self.weight.detach(), pair if x_requires_grad else pair.only(True, False)
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"


def _autocast_on(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _capturing(device_type: str) -> bool:
    """Whether a CUDA graph is being captured: its replays run no Python, which would see that a
    weight or an input has changed."""
    return device_type == "cuda" and torch.cuda.is_current_stream_capturing()
