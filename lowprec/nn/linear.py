"""The low-precision linear layer: a linear layer whose three GEMMs run under a recipe.

It is a mix-in. A converted module gets a class made of it and of the module's own class: nn.Linear,
a subclass that multiplies plainly, or transformers' Conv1D, which holds its weight as [K, N].

`LinearFunction` (`linear_function.py`) computes them. The layer holds what outlasts a call: its
recipe and the backends chosen for it, the recipe's state, and, on a GPU, operands that need not be
made again: layers that are called with the same tensor, as q, k and v are, share its codes, and a
weight's codes are kept until it changes (`codes.py`).
"""

import inspect
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lowprec.errors import UserError
from lowprec.nn.calls import note_call
from lowprec.nn.codes import forget, shared_codes, weight_codes
from lowprec.nn.dtypes import check_dtypes
from lowprec.nn.gemms import ChosenGemms, LinearGemms, backend_or_auto
from lowprec.nn.known import is_conv1d, is_plain
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

OWN_ATTRIBUTES = (
    "recipe",
    "backend",
    "gemms",
    "seed",
    "sharded",
    "plain",
    "keeps",
    "evaluation",
    "evaluation_gemms",
)
"""Names of the attributes that a module has while it is converted."""

KEEPS_CODES = ("cuda",)
"""Device types on which codes outlive a call (`codes.py`)."""


class LowPrecisionLinear(nn.Module):
    """A linear layer whose three GEMMs run under a recipe. `from_linear` makes one in place."""

    original: ClassVar[type[nn.Module]]
    """The class that the module has without the recipe."""
    transposed: ClassVar[bool]
    """Flag: the weight is [K, N]."""
    takes_gate = True
    """Flag: `forward` accepts `times_silu_of`."""
    weight: Tensor
    bias: Any
    """A Tensor, or None."""
    recipe: Recipe
    backend: str
    gemms: ChosenGemms[str]
    """The GEMMs of the recipe by type of device."""
    seed: tuple[int, int]
    """The seed and the layer's number, from which the draws of stochastic rounding start."""
    sharded: bool
    """Flag: FSDP2 shards the weight."""
    plain: bool
    """Flag: the recipe leaves all operands in high precision: the module's own forward runs."""
    keeps: tuple[Recipe, ...]
    """Other recipes of the run, whose state the layer holds too."""
    evaluation: Recipe | None
    """The recipe in eval() if it differs from the one in training."""
    evaluation_gemms: ChosenGemms[str]

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        recipe: Recipe,
        backend: str = "auto",
        device_type: str | None = None,
        *,
        seed: int = 0,
        layer: int = 0,
        keeps: tuple[Recipe, ...] = (),
        evaluation: Recipe | None = None,
    ) -> Self:
        """Turn `linear` into a LowPrecisionLinear, in place, and return it.

        The module stays the same object: hooks, outside references, parameters and state-dict keys
        do not change. Only a recipe that keeps state adds buffers (`recipe/state.py`).

        Args:
            linear: an nn.Linear, one of a subclass that multiplies as nn.Linear does, transformers'
                Conv1D, or a LowPrecisionLinear.
            device_type: the type of device that it will run on, if the weight is not there yet.
            seed, layer: numbers from which the draws of stochastic rounding start.
            keeps: other recipes that the layer has had or will have. It holds their state too, and
                state that it holds already stays.
            evaluation: the recipe of `eval()`, if it is another one.
        Raises:
            UserError: `backend` can't run the recipe there, or the recipes' states don't fit
                together.
        """
        weight: Any = linear.weight
        if device_type is None:
            device_type = str(weight.device.type)
        gemms: ChosenGemms[str] = ChosenGemms()
        if device_type != "meta":
            shape = shape_of(linear)
            gemms[device_type] = LinearGemms.on(device_type, recipe, backend, shape)
        if evaluation is not None:
            keeps = (*keeps, evaluation)
        forget(linear)
        state = states_of((recipe, *keeps), weight.device, seed, layer)
        held = {name: buffer for name, buffer in linear._buffers.items() if keeps and name in state}
        if not isinstance(linear, LowPrecisionLinear):
            linear.__class__ = low_precision_class(type(linear))
        assert isinstance(linear, cls)
        linear._drop_state()
        linear.recipe = recipe
        linear.backend = backend
        linear.gemms = gemms
        linear.seed = (seed, layer)
        linear.plain = recipe.is_plain
        linear.sharded = not is_plain(linear.weight)
        linear.keeps = keeps
        linear.evaluation = evaluation
        linear.evaluation_gemms = ChosenGemms()
        for name, buffer in (state | held).items():
            linear.register_buffer(name, buffer)
        return linear

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 sets the sharded weight and the gathered one this way. It refills the gathered one's
        # memory without counting a version, so codes of such a weight must not be kept. The sharded
        # weight is a DTensor. Of no other class of tensors are codes kept either.
        if name == "weight" and not is_plain(value):
            self.sharded = True
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle can't find the class itself by its name.
        return _new_low_precision, (self.original,), self.__getstate__()

    def to_linear(self) -> nn.Module:
        """Undo `from_linear`, in place.

        Raises:
            UserError: something else, such as `fully_shard`, has changed the layer's class since.
        """
        if type(self) is not low_precision_class(self.original):
            raise UserError(
                f"a layer can't be reverted: its class has become {type(self).__name__} since its "
                "conversion (fully_shard and parametrizations do that): revert before that"
            )
        forget(self)
        self._drop_state()
        for name in OWN_ATTRIBUTES:
            del self.__dict__[name]
        self.__class__ = self.original  # pyright: ignore[reportAttributeAccessIssue]
        return self

    @property
    def shape_NK(self) -> tuple[int, int]:
        """Outputs N and inputs K. Compiled code reads them: torch 2.11 can't compile the look-up of
        a class among the imported modules."""
        layer: Any = self
        if self.transposed:
            return layer.nf, layer.nx
        return layer.out_features, layer.in_features

    @property
    def w_NK(self) -> Tensor:
        """The weight as nn.Linear holds it, [N, K]."""
        return self.weight.t() if self.transposed else self.weight

    def reset_parameters(self) -> None:
        """Draw new parameters, if the layer's own class does, and reset the recipe's state; torch
        calls it to give real values to a module that was built on the meta device."""
        if hasattr(self.original, "reset_parameters"):
            super().reset_parameters()  # pyright: ignore[reportAttributeAccessIssue]
        with torch.no_grad():
            fresh = states_of((self.recipe, *self.keeps), self.weight.device, *self.seed)
            for name, buffer in fresh.items():
                self.get_buffer(name).copy_(buffer)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
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
        _, K = self.shape_NK
        if input.shape[-1:] != (K,):
            raise ValueError(f"expected inputs [..., {K}], got {list(input.shape)}")
        if self.plain and (self.evaluation is None or self.training):
            return super().forward(input if gate is None else nn.functional.silu(gate) * input)
        autocast = autocast_is_on(device_type)
        dtype = check_dtypes(input, self.weight, autocast, super().forward, self.recipe)
        if not autocast:
            return self._run(input.to(dtype), gate, input, device_type)
        # x is cast as nn.Linear would cast it. w is not: it is quantised from its master copy.
        with torch.autocast(device_type, enabled=False):
            gate = None if gate is None else gate.to(dtype)
            return self._run(input.to(dtype), gate, input, device_type)

    def _run(self, x: Tensor, gate: Tensor | None, input: Tensor, device_type: str) -> Tensor:
        """Run the recipe. `x` is `input` after autocast's cast; other layers know it by `input`."""
        gemms = self._gemms_on(device_type)
        N, K = self.shape_NK
        x_MK = x.reshape(-1, K)
        gate_MK = None if gate is None else gate.reshape(-1, K)
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
            self.w_NK,
            self.bias,
            gate_MK,
            gemms,
            torch.is_grad_enabled(),
            x_ready,
            w_ready,
            *self._state(),
        )
        return y_MN.view(*x.shape[:-1], N)

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
            gemms = LinearGemms.on(device_type, recipe, backend, self.shape_NK)
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
        return weight_codes(self, self.w_NK.detach(), wanted)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"recipe={self.recipe.name}"]
        return ", ".join(filter(None, parts))


def original_class(linear: nn.Module) -> type[nn.Module]:
    """Return the class that a linear layer has without a recipe."""
    return linear.original if isinstance(linear, LowPrecisionLinear) else type(linear)


def shape_of(linear: Any) -> tuple[int, int]:
    """Return outputs N and inputs K of a linear layer, also while its weight is sharded."""
    if isinstance(linear, LowPrecisionLinear):
        return linear.shape_NK
    if is_conv1d(linear):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


@cache
def low_precision_class(kind: type[nn.Module]) -> type[LowPrecisionLinear]:
    """Return the class of the converted layers of a class. Objects of it are also of `kind`."""
    transposed = not issubclass(kind, nn.Linear)
    members: dict[str, Any] = {
        "__module__": __name__ if kind is nn.Linear else kind.__module__,
        "original": kind,
        "transposed": transposed,
    }
    if hasattr(kind, "from_linear"):
        members["from_linear"] = inspect.getattr_static(kind, "from_linear")  # their own stays
    name = "LowPrecisionLinear" if kind is nn.Linear else kind.__name__
    if transposed:
        # Conv1D's own representation has no place for the recipe.
        members["__repr__"] = _repr_of_conv1d
    return type(name, (LowPrecisionLinear, kind), members)


def _repr_of_conv1d(layer: Any) -> str:
    return f"{type(layer).__name__}(nf={layer.nf}, nx={layer.nx}, recipe={layer.recipe.name})"


def _new_low_precision(kind: type[nn.Module]) -> Any:
    """Return an empty converted layer of `kind`, which unpickling fills."""
    made: Any = low_precision_class(kind)
    return made.__new__(made)


def _capturing(device_type: str) -> bool:
    """Return whether a CUDA graph is being captured. Its replays run no Python that could see that
    a weight or an input has changed."""
    return device_type == "cuda" and torch.cuda.is_current_stream_capturing()
