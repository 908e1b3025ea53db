"""Mixture-of-experts layers of transformers' in low precision: the matrices of all experts in one
3-D parameter.

    y_t = sum over the experts e that token t was sent to of  p_te * down_e(gate(up_e(x_t)))

transformers gives every such module the same attributes
(`transformers.integrations.moe.use_experts_implementation`), by which it is known here, not by its
class. Tokens are sorted by expert; then each expert's products are those of a linear layer of its
own (`linear.LinearFunction`), so that every recipe means what it means there: scales per tensor are
per expert, blocks of x and g that span tokens span an expert's tokens. The router and the sum over
a token's experts stay as they are.

How many tokens each expert has decides what is launched: the host waits for that once a layer and
pass, and compiled code breaks there.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.formats.random import derive_key
from lowprec.nn.linear import LinearFunction
from lowprec.nn.operands import GEMMS_OF, KnownGemms, LinearGemms, able_backend
from lowprec.recipe import Recipe
from lowprec.recipe.state import OPERANDS, ROUNDING_STATE, new_state, next_key, states_of, this_rank

_KNOWN_BY = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj")


def stacks(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's own parameters that hold several matrices: experts' weights, of
    whatever module."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return ()
    own = module.named_parameters(recurse=False)
    several = (
        0 if _says_how(module) else 1
    )  # a lone expert is a stack; another module's [1, N, K], an embedding of positions say, is none
    return tuple(
        name for name, p in own if p.dim() == 3 and p.shape[0] > several and min(p.shape[1:]) > 1
    )


def _says_how(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in _KNOWN_BY)


def why_not_stack(module: nn.Module, recipe: Recipe) -> str | None:
    """Why a stack of experts can't be converted to a recipe; None if it can."""
    if not _says_how(module):
        return f"a stack of matrices of {type(module).__name__}, which does not say how it multiplies by them"
    if any(name != ROUNDING_STATE for name in new_state(recipe, torch.device("cpu"))):
        return "the recipe keeps histories of amaxes, and which tokens an expert sees changes from step to step"
    return None


def stack_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """(experts, outputs N, inputs K) of one of `stacks`."""
    experts, rows, columns = getattr(module, name).shape
    return (
        (experts, columns, rows)
        if getattr(module, "is_transposed", False)
        else (experts, rows, columns)
    )


class ExpertProjection(nn.Module):
    """The products of all experts by one of their weights, under a recipe. It has no parameters;
    the state is that of a linear layer."""

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
        super().__init__()
        self.recipe, self.backend, self.shape, self.keeps, self.evaluation = (
            recipe,
            backend,
            shape,
            keeps,
            evaluation,
        )
        self.seed = (seed, layer)
        self._gemms: KnownGemms[tuple[str, bool]] = KnownGemms()
        for name, buffer in states_of((recipe, *keeps), device, seed, layer).items():
            if name == ROUNDING_STATE:
                self.register_buffer(name, buffer)

    def forward(
        self, x_SK: Tensor, counts: list[int], weight: Tensor, bias: Tensor | None, transposed: bool
    ) -> Tensor:
        """x_SK [S, K], the tokens of the first expert, then of the second, ... -> [S, N] of its
        dtype.

        Args:
            counts: how many tokens each expert has; S in all.
            weight: [E, N, K], or [E, K, N] if `transposed`.
            bias: [E, N].
        """
        plain, grad_enabled = self.recipe_now.is_plain, torch.is_grad_enabled()
        gemms = self._on(x_SK.device.type)
        key = self._buffers.get(ROUNDING_STATE)
        if key is not None:
            key = next_key(key, this_rank(), self.training)
        weights = weight.unbind(
            0
        )  # whose backward stacks the gradients once, where indexing would add up E stacks
        biases = [None] * len(weights) if bias is None else bias.unbind(0)
        made = []
        for number, (x, w, b) in enumerate(zip(x_SK.split(counts), weights, biases, strict=True)):
            if len(x) or (
                number == 0 and not len(x_SK)
            ):  # without any token, too, what comes out has a gradient: ranks wait for it
                own_key = None if key is None else derive_key(key, number)
                w = w.t() if transposed else w
                if plain:
                    made.append(nn.functional.linear(x, w, b))
                    continue
                nothing = (None, None)
                made.append(
                    LinearFunction.apply(
                        x,
                        w,
                        b,
                        None,
                        gemms,
                        grad_enabled,
                        nothing,
                        nothing,
                        own_key,
                        *_NO_HISTORIES,
                    )
                )
        return torch.cat(made)

    @property
    def recipe_now(self) -> Recipe:
        return self.recipe if self.training or self.evaluation is None else self.evaluation

    def _on(self, device_type: str) -> LinearGemms:
        recipe = self.recipe_now
        which = device_type, recipe is self.recipe
        if which not in self._gemms.keys_of:
            backend = (
                self.backend
                if recipe is self.recipe
                else able_backend(recipe, self.backend, device_type)
            )
            self._gemms[which] = LinearGemms.on(device_type, recipe, backend, self.shape)
        return GEMMS_OF[self._gemms.keys_of[which]]

    def reset_parameters(self) -> None:
        """What makes real values of a module that was built on the meta device."""
        for name, fresh in states_of(
            (self.recipe, *self.keeps), self._device(), *self.seed
        ).items():
            if name in self._buffers:
                self.get_buffer(name).copy_(fresh)

    def _device(self) -> torch.device:
        return next(
            (buffer.device for buffer in self._buffers.values() if buffer is not None),
            torch.device("cpu"),
        )

    def extra_repr(self) -> str:
        return f"recipe={self.recipe.name}"


_NO_HISTORIES = (None,) * len(OPERANDS)


class LowPrecisionExperts:
    """The forward of a module that `convert_experts` has turned."""

    low_precision: nn.ModuleDict

    # What is compiled would break at the count of tokens, in the middle, and be compiled anew for
    # other counts.
    @torch._disable_dynamo
    def forward(
        self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H].

        An index that is no expert's counts as none: so sharded experts mark what is another rank's.
        """
        k = top_k_index.shape[-1]
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        counts = torch.bincount(
            experts.clamp(max=self.num_experts), minlength=self.num_experts + 1
        )[:-1].tolist()
        order = order[: sum(counts)]
        made = self._multiply(
            "gate_up_proj" if self.has_gate else "up_proj", hidden_states[order // k], counts
        )
        made = self._apply_gate(made) if self.has_gate else self.act_fn(made)
        made = self._multiply("down_proj", made, counts) * top_k_weights.reshape(-1)[order, None]
        parts = made.new_zeros(top_k_index.numel(), made.shape[-1]).index_copy(0, order, made)
        return parts.view(*top_k_index.shape, made.shape[-1]).sum(1).to(hidden_states.dtype)

    def _multiply(self: Any, name: str, x: Tensor, counts: list[int]) -> Tensor:
        device_type = x.device.type
        arguments = (
            counts,
            getattr(self, name),
            getattr(self, f"{name}_bias") if self.has_bias else None,
            self.is_transposed,
        )
        if self.low_precision[name].recipe_now.is_plain or not torch.is_autocast_enabled(
            device_type
        ):
            return self.low_precision[name](x, *arguments)
        with torch.autocast(device_type, enabled=False):
            return self.low_precision[name](x.to(torch.get_autocast_dtype(device_type)), *arguments)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # The class itself can't be found by a name.
        return _new_low_precision, (type(self).plain,), self.__getstate__()


def _new_low_precision(kind: type) -> Any:
    made: Any = _low_precision_class(kind)
    return made.__new__(made)


def convert_experts(module: nn.Module, projections: Mapping[str, ExpertProjection]) -> None:
    """Give a module that `why_not_stack` has nothing against these projections, one for each of its
    `stacks`, in place.

    The module stays the same object, its parameters and their names as well. What projections that
    it has already hold stays, in those that name what they keep.
    """
    if is_converted(module):
        for name, old in module.low_precision.items():  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            for buffer_name, buffer in old.named_buffers():
                if projections[name].keeps and buffer_name in projections[name]._buffers:
                    projections[name].register_buffer(buffer_name, buffer)
    else:
        module.__class__ = _low_precision_class(type(module))
    module.low_precision = nn.ModuleDict(projections)
    module.low_precision.train(module.training)


def revert_experts(module: nn.Module) -> None:
    """Undo `convert_experts`; nothing for another module."""
    if is_converted(module):
        del module.low_precision
        module.__class__ = type(module).plain  # pyright: ignore[reportAttributeAccessIssue]


def projections_of(module: Any) -> dict[str, ExpertProjection]:
    """What multiplies by each of a converted module's stacks."""
    return {name: module.low_precision[name] for name in stacks(module)}


def is_converted(module: nn.Module) -> bool:
    return isinstance(module, LowPrecisionExperts)


@cache
def _low_precision_class(kind: type) -> type:
    return type(
        kind.__name__, (LowPrecisionExperts, kind), {"__module__": kind.__module__, "plain": kind}
    )
