"""Which converted weights a model really multiplies by in their converted layers.

    calls = Calls(model)
    with calls.watching():          # one ordinary step: forward, backward
        model(**batch).loss.backward()
    calls.uncalled                  # {name: reason}

A module may read `self.up.weight` and multiply by it itself, as fused kernels do. Then the layer
`up` is converted, but its forward never runs, and the product stays in high precision. A layer may
also be unused for a while: an expert without tokens, a layer that is dropped at random, the vision
tower in a batch of text. The gradient tells them apart: the weight of an unused layer gets none.

A watched step computes the same bits as any other, compiled or not, and compiles nothing anew
(`nn/calls.py`). torch.compile traces a module only if it compiles it: code that is compiled for one
decoder block serves the others, too. So a layer counts as called as well if a layer in the same
place of another module of the same class was traced, and nothing in its own module was.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lowprec.conversion.layer_backends import CONVERTED
from lowprec.nn import calls, experts

BYPASSED = "its layer did not run: something else multiplied by its weight, in high precision"
"""Reason of a weight that got a gradient, though its converted layer was not called."""
UNUSED = "its layer did not run, and its weight got no gradient: nothing has used it so far"
"""Reason of a weight that got no gradient."""
FROZEN = (
    "its layer did not run: nothing has used it so far, or something else multiplied by its "
    "weight, which is frozen"
)
"""Reason of a weight that can't get a gradient."""

_places: set[tuple[type, str]] = set()
"""The places of layers that torch.compile has traced in this process. Code that it has compiled for
one model serves the next one of the same class, too, which it does not trace then."""
_alone: set[type] = set()
"""The classes of layers that were compiled on their own and traced."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True, kw_only=True)
class _Converted:
    """A converted weight."""

    owner: nn.Module
    stack: str
    """Name of the parameter that stacks the matrices of experts; "" for a linear layer."""
    parent: str
    """Name of the module whose code calls the layer."""
    place: tuple[type, str]
    """The class of that module, and the layer's name in it, with # for numbers."""

    @property
    def weight(self) -> Any:
        """The parameter."""
        return getattr(self.owner, self.stack or "weight")

    @property
    def layer(self) -> nn.Module | None:
        """The module that is called to multiply by the weight; None if the weight is no longer
        converted. A change of precision makes new ones for experts."""
        if not self.stack:
            return self.owner if isinstance(self.owner, CONVERTED) else None
        if not experts.is_converted(self.owner):
            return None
        return experts.projections_of(self.owner)[self.stack]


class Calls:
    """A watch over the calls of a model's converted layers (see the module).

    Args:
        model: a converted model, wrapped (DDP, FSDP2) or not. Its converted layers are those that
            it has now; a later conversion may change their recipes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.uncalled: dict[str, str] = {}
        """The weights whose converted layer was not called in the last watched step: the reason,
        `BYPASSED`, `UNUSED` or `FROZEN`, by name, in the model's order."""
        self._weights: Mapping[str, _Converted] = dict(_converted_weights(model))
        self._notes = calls.CallNotes()
        self._gradients: set[str] | None = None
        """The weights that had a gradient at the last `look_for_gradients`."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the step that runs in this context: its forward passes, and its backward if
        gradients shall tell why a layer was not called.

        After an error, `uncalled` stays as it was.
        """
        self.begin()
        try:
            yield
            self.end()
        finally:
            self.cancel()

    def begin(self) -> None:
        """Begin to watch. A watch that runs already starts again."""
        self._gradients = None
        self._notes.start()

    def cancel(self) -> None:
        """End a watch without a result."""
        self._notes.stop()

    def look_for_gradients(self) -> None:
        """Note which weights have a gradient. Call it before the gradients are set to None, if that
        is before `end`; the last call counts."""
        self._gradients = {
            name for name, found in self._weights.items() if found.weight.grad is not None
        }

    @property
    def knows_gradients(self) -> bool:
        """Flag: `look_for_gradients` was called in this watch."""
        return self._gradients is not None

    def end(self, *, all_ranks: bool = False) -> dict[str, str]:
        """End the watch and return `uncalled`.

        Args:
            all_ranks: whether a layer counts as called if it was called on any rank. All ranks must
                call `end` then.
        """
        self.cancel()
        if self._gradients is None:
            self.look_for_gradients()
        assert self._gradients is not None
        called = self.called()
        gradients = self._gradients
        if all_ranks and dist.is_available() and dist.is_initialized():
            called, gradients = self._on_any_rank(called, gradients)
        self.uncalled = {
            name: _reason(found, name in gradients)
            for name, found in self._weights.items()
            if name not in called and found.layer is not None
        }
        return self.uncalled

    def called(self) -> set[str]:
        """Return the names of the weights whose layer was called since `begin`."""
        layers = {name: found.layer for name, found in self._weights.items()}
        traced = [name for name, layer in layers.items() if layer in calls.traced]
        seen = {name for name, layer in layers.items() if layer in self._notes.seen}
        parents = {self._weights[name].parent for name in traced}
        _places.update(self._weights[name].place for name in traced)
        _alone.update(type(layers[name]) for name in traced if _is_compiled_alone(layers[name]))
        shared = {
            name
            for name, found in self._weights.items()
            if self._may_have_run(name)
            and (
                (found.place in _places and found.parent not in parents)
                or (type(layers[name]) in _alone and _is_compiled_alone(layers[name]))
            )
        }
        return seen | shared | set(traced)

    def called_of(self, names: Iterable[str]) -> list[str]:
        """Return those of these weights whose own layer was called since `begin`."""
        layers = {name: self._weights[name].layer for name in names}
        return [
            name
            for name, layer in layers.items()
            if layer in self._notes.seen or layer in calls.traced
        ]

    def _may_have_run(self, name: str) -> bool:
        """Return False if the weight should have a gradient and has none: compiled code of another
        module says nothing then."""
        frozen = not self._weights[name].weight.requires_grad
        return frozen or self._gradients is None or name in self._gradients

    def _on_any_rank(self, called: set[str], gradients: set[str]) -> tuple[set[str], set[str]]:
        """Return the names that any rank has in `called`, and those that any has in `gradients`."""
        if not self._weights:
            return called, gradients
        rows = [[name in found for name in self._weights] for found in (called, gradients)]
        device = next(iter(self._weights.values())).weight.device
        flags = torch.tensor(rows, dtype=torch.int32, device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        found = [
            {name for name, flag in zip(self._weights, row, strict=True) if flag}
            for row in flags.tolist()
        ]
        return found[0], found[1]


def _is_compiled_alone(layer: nn.Module | None) -> bool:
    """Return whether `compile` was called on the layer itself."""
    return layer is not None and layer._compiled_call_impl is not None


def _reason(found: _Converted, has_gradient: bool) -> str:
    """Return why the layer of a weight was not called."""
    if has_gradient:
        return BYPASSED
    return UNUSED if found.weight.requires_grad else FROZEN


def _converted_weights(model: nn.Module) -> Iterator[tuple[str, _Converted]]:
    """Yield the converted weights by name, in the model's order."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, CONVERTED):
            stacks = [""]
        elif experts.is_converted(module):
            stacks = list(experts.projections_of(module))
        else:
            continue
        for stack in stacks:
            full = f"{name}.{stack}".strip(".")
            parent = _calling_module(name, modules)
            inner = re.sub(r"\d+", "#", full[len(parent) :])
            place = (type(modules[parent]), inner)
            yield full, _Converted(owner=module, stack=stack, parent=parent, place=place)


def _calling_module(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of the module that holds another one, over containers, which call nothing by
    code of their own."""
    parent = name.rpartition(".")[0]
    while parent and isinstance(modules[parent], _CONTAINERS):
        parent = parent.rpartition(".")[0]
    return parent
