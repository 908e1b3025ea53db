"""Mixture-of-experts layers of transformers in low precision: the matrices of all experts lie in
one 3-D parameter.

    y_t = sum over the experts e that token t was sent to of  p_te * down_e(gate(up_e(x_t)))

transformers gives every such module the same attributes
(`transformers.integrations.moe.use_experts_implementation`). The module is recognised by them, not
by its class. Tokens are sorted by expert; then each expert's products are those of a linear layer
of its own (`linear_function.LinearFunction`), so that every recipe means what it means there: a
scale per tensor is one per expert, and blocks of x and g that span tokens span one expert's tokens.
The router and the sum over a token's experts stay in high precision.

The number of tokens of each expert decides what is launched: the host waits for it once per layer
and pass, and compiled code breaks there.
"""

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.formats.random import derive_key
from lowprec.nn.calls import note_call
from lowprec.nn.dtypes import check_dtypes
from lowprec.nn.gemms import ChosenGemms, LinearGemms, backend_or_auto
from lowprec.nn.linear_function import LinearFunction
from lowprec.quant import TwoWay
from lowprec.recipe import Recipe
from lowprec.recipe.state import (
    OPERANDS,
    ROUNDING_STATE,
    new_state,
    next_key,
    states_of,
    this_rank,
)

_KNOWN_BY = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj")

_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
"""Names under which configurations of transformers give the number of a token's experts."""


def stacks(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own parameters that stack the matrices of experts."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return ()
    own = module.named_parameters(recurse=False)
    # In a module of experts, one matrix is a stack too. Elsewhere a parameter [1, N, K] is not one:
    # it may be an embedding of positions, for example.
    fewest = 1 if _is_expert_module(module) else 2
    return tuple(
        name
        for name, parameter in own
        if parameter.dim() == 3 and parameter.shape[0] >= fewest and min(parameter.shape[1:]) > 1
    )


def _is_expert_module(module: nn.Module) -> bool:
    """Return True if the module has the attributes that transformers gives modules of experts."""
    return all(hasattr(module, name) for name in _KNOWN_BY)


def _has_known_forward(kind: Any) -> bool:
    """Return whether the forward of a class of experts is the one that transformers gives them, not
    that of a subclass."""
    marking = sys.modules.get("transformers.integrations.moe")
    return marking is not None and getattr(kind.forward, "__globals__", None) is vars(marking)


def why_not_stack(module: nn.Module, recipe: Recipe) -> str | None:
    """Return the reason why a stack of experts can't be converted to a recipe; None if it can."""
    kind: Any = type(module).plain if is_converted(module) else type(module)  # pyright: ignore[reportAttributeAccessIssue]
    if not _is_expert_module(module):
        return (
            f"a stack of matrices of {kind.__name__}, which does not say how it multiplies by them"
        )
    if not _has_known_forward(kind):
        return f"{kind.__name__} has a forward of its own, which transformers has not marked"
    if any(name != ROUNDING_STATE for name in new_state(recipe, torch.device("cpu"))):
        return (
            "the recipe keeps histories of amaxes, and which tokens an expert sees changes from "
            "step to step"
        )
    return None


def stack_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """Return (experts, outputs N, inputs K) of a parameter in `stacks(module)`."""
    experts, rows, columns = getattr(module, name).shape
    if getattr(module, "is_transposed", False):
        return experts, columns, rows
    return experts, rows, columns


def per_token(module: nn.Module, matrices: int) -> int:
    """Return how many of a stack's matrices multiply a token: of experts, those that a token is
    sent to, if the model's configuration says how many; otherwise all."""
    config = getattr(module, "config", None)
    stated = (getattr(config, field, None) for field in _EXPERTS_OF_A_TOKEN)
    found = next((number for number in stated if isinstance(number, int)), None)
    return matrices if found is None else min(found, matrices)


class ExpertProjection(nn.Module):
    """The products of all experts with one of their weights, under a recipe.

    It has no parameters; its state is that of a linear layer.
    """

    def __init__(
        self,
        recipe: Recipe,
        shape: tuple[int, int],
        backend: str,
        device: torch.device,
        *,
        seed: int = 0,
        layer: int = 0,
        keeps: tuple[Recipe, ...] = (),
        evaluation: Recipe | None = None,
    ) -> None:
        """Args are those of `LowPrecisionLinear.from_linear`; `shape` is an expert's (N, K)."""
        super().__init__()
        self.recipe = recipe
        self.backend = backend
        self.shape = shape
        self.keeps = keeps
        self.evaluation = evaluation
        self.seed = (seed, layer)
        self._gemms: ChosenGemms[tuple[str, bool]] = ChosenGemms()
        for name, buffer in states_of((recipe, *keeps), device, seed, layer).items():
            if name == ROUNDING_STATE:
                self.register_buffer(name, buffer)

    def forward(
        self,
        x_SK: Tensor,
        counts: list[int],
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
    ) -> Tensor:
        """Return [S, N] of x's dtype from x [S, K].

        Args:
            x_SK: the tokens of the first expert, then those of the second, and so on.
            counts: number of tokens of each expert; S in all.
            weight: [E, N, K], or [E, K, N] if `transposed`.
            bias: [E, N].
        """
        note_call(self)
        gemms = self._gemms_on(x_SK.device.type)
        key = self._buffers.get(ROUNDING_STATE)
        if key is not None:
            key = next_key(key, this_rank(), self.training)
        # The backward of unbind stacks the gradients once; indexing would add up E stacks.
        weights = weight.unbind(0)
        biases = [None] * len(weights) if bias is None else bias.unbind(0)
        made = []
        for number, (x, w, b) in enumerate(zip(x_SK.split(counts), weights, biases, strict=True)):
            # If no expert has a token, the first one still runs: the result needs a gradient, since
            # other ranks wait for it.
            if len(x) or (number == 0 and not len(x_SK)):
                w = w.t() if transposed else w
                made.append(self._multiply(x, w, b, gemms, key, number))
        return torch.cat(made)

    def _multiply(
        self,
        x_MK: Tensor,
        w_NK: Tensor,
        bias_N: Tensor | None,
        gemms: LinearGemms,
        key: Tensor | None,
        number: int,
    ) -> Tensor:
        """Return the product of one expert, [M, K] . [N, K]^T -> [M, N]."""
        if self.recipe_now.is_plain:
            return nn.functional.linear(x_MK, w_NK, bias_N)
        own_key = None if key is None else derive_key(key, number)
        return LinearFunction.apply(
            x_MK,
            w_NK,
            bias_N,
            None,
            gemms,
            torch.is_grad_enabled(),
            TwoWay(),
            TwoWay(),
            own_key,
            *_NO_HISTORIES,
        )

    @property
    def recipe_now(self) -> Recipe:
        """The recipe of the present mode: training or evaluation."""
        return self.recipe if self.training or self.evaluation is None else self.evaluation

    def _gemms_on(self, device_type: str) -> LinearGemms:
        recipe = self.recipe_now
        configured = recipe is self.recipe
        gemms = self._gemms.find((device_type, configured))
        if gemms is None:
            backend = self.backend
            if not configured:
                backend = backend_or_auto(recipe, backend, device_type)
            gemms = LinearGemms.on(device_type, recipe, backend, self.shape)
            self._gemms[device_type, configured] = gemms
        return gemms

    def reset_parameters(self) -> None:
        """Reset the recipe's state; torch calls it to give real values to a module that was built
        on the meta device."""
        fresh = states_of((self.recipe, *self.keeps), self._device(), *self.seed)
        for name, buffer in fresh.items():
            if name in self._buffers:
                self.get_buffer(name).copy_(buffer)

    def _device(self) -> torch.device:
        held = (buffer.device for buffer in self._buffers.values() if buffer is not None)
        return next(held, torch.device("cpu"))

    def extra_repr(self) -> str:
        return f"recipe={self.recipe.name}"


_NO_HISTORIES = (None,) * len(OPERANDS)


class LowPrecisionExperts:
    """The forward of a module that `convert_experts` has converted."""

    low_precision: nn.ModuleDict

    # Compiled code would break in the middle, at the count of tokens, and be compiled anew for
    # other counts.
    @torch._disable_dynamo
    def forward(
        self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Return [T, H] from hidden_states [T, H], top_k_index [T, k] and top_k_weights [T, k].

        An index that belongs to no expert adds nothing: sharded experts mark tokens of other ranks
        this way.
        """
        k = top_k_index.shape[-1]
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        known = experts.clamp(max=self.num_experts)
        counts = torch.bincount(known, minlength=self.num_experts + 1)[:-1].tolist()
        order = order[: sum(counts)]
        up_name = "gate_up_proj" if self.has_gate else "up_proj"
        made = self._multiply(up_name, hidden_states[order // k], counts)
        made = self._apply_gate(made) if self.has_gate else self.act_fn(made)
        made = self._multiply("down_proj", made, counts)
        made = made * top_k_weights.reshape(-1)[order, None]
        parts = made.new_zeros(top_k_index.numel(), made.shape[-1]).index_copy(0, order, made)
        return parts.view(*top_k_index.shape, made.shape[-1]).sum(1).to(hidden_states.dtype)

    def _multiply(self: Any, name: str, x: Tensor, counts: list[int]) -> Tensor:
        device_type = x.device.type
        projection = self.low_precision[name]
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        arguments = counts, getattr(self, name), bias, self.is_transposed
        if projection.recipe_now.is_plain:
            return projection(x, *arguments)
        autocast = torch.is_autocast_enabled(device_type)
        weight = getattr(self, name)

        def product(x: Tensor) -> Tensor:
            return nn.functional.linear(x, weight[0].t() if self.is_transposed else weight[0])

        x = x.to(check_dtypes(x, weight, autocast, product, projection.recipe_now))
        if not autocast:
            return projection(x, *arguments)
        with torch.autocast(device_type, enabled=False):
            return projection(x, *arguments)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # pickle can't find the class itself by its name.
        return _new_low_precision, (type(self).plain,), self.__getstate__()


def _new_low_precision(kind: type) -> Any:
    made: Any = _low_precision_class(kind)
    return made.__new__(made)


def convert_experts(module: nn.Module, projections: Mapping[str, ExpertProjection]) -> None:
    """Give a module of experts these projections, one for each of its `stacks`, in place.

    The module stays the same object, with the same parameters under the same names. State that its
    present projections hold stays, in new projections that keep it.

    Args:
        module: one for which `why_not_stack` gives no reason.
    """
    if is_converted(module):
        for name, old in module.low_precision.items():  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            new = projections[name]
            for buffer_name, buffer in old.named_buffers():
                if new.keeps and buffer_name in new._buffers:
                    new.register_buffer(buffer_name, buffer)
    else:
        module.__class__ = _low_precision_class(type(module))
    module.low_precision = nn.ModuleDict(projections)
    module.low_precision.train(module.training)


def revert_experts(module: nn.Module) -> None:
    """Undo `convert_experts`; do nothing to another module."""
    if is_converted(module):
        del module.low_precision
        module.__class__ = type(module).plain  # pyright: ignore[reportAttributeAccessIssue]


def projections_of(module: Any) -> dict[str, ExpertProjection]:
    """Return the projections of a converted module by the name of their stack."""
    return {name: module.low_precision[name] for name in stacks(module)}


def is_converted(module: nn.Module) -> bool:
    """Return whether `convert_experts` has converted the module."""
    return isinstance(module, LowPrecisionExperts)


@cache
def _low_precision_class(kind: type) -> type:
    members = {"__module__": kind.__module__, "plain": kind}
    return type(kind.__name__, (LowPrecisionExperts, kind), members)
