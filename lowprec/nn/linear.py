"""The low-precision linear layer: an nn.Linear whose three GEMMs run under a recipe.

`LinearFunction` (`linear_function.py`) computes them. The layer holds what outlasts a call: its
recipe and the backends chosen for it, the recipe's state, and, on a GPU, operands that need not be
made again: layers that are called with the same tensor, as q, k and v are, share its codes, and a
weight's codes are kept until it changes (`codes.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowprec.nn.calls import note_call
from lowprec.nn.codes import forget, shared_codes, weight_codes
from lowprec.nn.gemms import ChosenGemms, LinearGemms, backend_or_auto
from lowprec.nn.linear_function import LinearFunction, autocast_is_on
from lowprec.quant import TwoWay
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
        note_call(self)
        device_type = input.device.type
        gate = times_silu_of
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(f"expected inputs [..., {self.in_features}], got {list(input.shape)}")
        if self.plain and (self.evaluation is None or self.training):
            x = input if gate is None else nn.functional.silu(gate) * input
            return nn.functional.linear(x, self.weight, self.bias)
        if not autocast_is_on(device_type):
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


def _capturing(device_type: str) -> bool:
    """Return whether a CUDA graph is being captured. Its replays run no Python that could see that
    a weight or an input has changed."""
    return device_type == "cuda" and torch.cuda.is_current_stream_capturing()
