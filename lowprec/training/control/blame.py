"""Which layers a breach of the guard points to, and which take more precision after it. Nothing
here touches a tensor."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from lowprec.recipe import Recipe, library
from lowprec.training.control.signals import (
    Breach,
    Observation,
    WindowConfig,
    is_healthy,
    lowest_first,
    recent,
)

_SUSPICIOUS = 2.0
"""A layer whose gradient norm is this many times its own median may be to blame. Below that, norms
vary from batch to batch."""


class LayerNorms:
    """The gradient norms of each layer in the last healthy steps: they show which layers a bad step
    points to."""

    def __init__(self, config: WindowConfig) -> None:
        self._config = config
        self._norms: dict[str, deque[float]] = {}

    def blame(self, seen: Observation) -> tuple[str, ...]:
        """Return the layers to blame for a bad step, worst first; empty if nothing points to any.

        Layers whose gradients are not finite; else those whose norms have risen, by how much; else
        all measured ones, by their signal-to-quantisation-noise ratio.
        """
        # A NaN travels backwards, so the layer nearest the loss met it first.
        not_finite = [
            name for name, norm in reversed(seen.layers.items()) if not math.isfinite(norm)
        ]
        if not_finite:
            return tuple(not_finite)
        rises: dict[str, float] = {}
        for name, norm in seen.layers.items():
            middle = median(self._norms[name]) if self._norms.get(name) else 0.0
            if middle and norm >= _SUSPICIOUS * middle:
                rises[name] = norm / middle
        if rises:
            return tuple(sorted(rises, key=lambda name: -rises[name]))
        return tuple(lowest_first(seen.sqnr or {}))

    def remember(self, seen: Observation, breach: Breach | None) -> None:
        if is_healthy(seen, breach):
            for name, norm in seen.layers.items():
                self._norms.setdefault(name, recent(self._config)).append(norm)

    def state_dict(self) -> dict[str, Any]:
        return {"layers": {name: list(norms) for name, norms in self._norms.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norms = {name: recent(self._config, norms) for name, norms in state["layers"].items()}


def ladder_step(recipe: Recipe, ladder: tuple[str, ...]) -> Recipe | None:
    """Return the first recipe of `ladder` whose narrowest operand has more bits than `recipe`'s;
    None at the top."""
    above = (library.get(name) for name in ladder)
    return next((higher for higher in above if higher.narrowest_bits > recipe.narrowest_bits), None)


def layers_to_raise(
    breach: Breach,
    recipes: Mapping[str, Recipe],
    sqnr: Mapping[str, float] | None,
    *,
    ladder: tuple[str, ...],
    share: float,
) -> dict[str, Recipe]:
    """Return the layers to give more precision after `breach`, and the recipe that each takes.

    The layers that the breach blames come first, worst first. If none of them can rise, the layers
    with the lowest signal-to-noise ratio; without measurements those with the fewest bits, in model
    order. At most `share` of the converted layers rise, at least one; none if all are at the
    top of the ladder.

    Args:
        recipes: the recipe of each converted layer, in model order.
        sqnr: the latest signal-to-quantisation-noise ratios [dB], if any were measured.
        ladder: names of recipes in rising precision.
        share: largest share of the converted layers to raise.
    """
    steps = {name: ladder_step(recipe, ladder) for name, recipe in recipes.items()}
    higher = {name: recipe for name, recipe in steps.items() if recipe is not None}
    # A layer may be blamed twice: by its own name and by its adapters'.
    converted = converted_layers(recipes)
    blamed = list(
        dict.fromkeys(
            name for watched in breach.layers for name in converted(watched) if name in higher
        )
    )
    measured = {name: (sqnr or {}).get(name, math.inf) for name in higher}
    if blamed:
        candidates = blamed
    elif any(value < math.inf or math.isnan(value) for value in measured.values()):
        candidates = lowest_first(measured)
    else:
        candidates = sorted(higher, key=lambda name: recipes[name].narrowest_bits)
    # 0.3 of 10 layers are 3; the product of floats may be just below.
    count = max(1, math.floor(share * len(recipes) + 1e-9))
    return {name: higher[name] for name in candidates[:count]}


def converted_layers(recipes: Mapping[str, Recipe]) -> Callable[[str], tuple[str, ...]]:
    """Return a function from a watched module's name to the converted layers that it stands for.

    A converted layer stands for itself. Experts, watched as one module, stand for their weights. An
    adapter (PEFT's `q_proj.lora_A.default`) stands for the layer that it adapts. Other modules,
    such as norms, stand for none.
    """
    suffix = ".base_layer"
    adapted = {name.removesuffix(suffix): name for name in recipes if name.endswith(suffix)}
    stacks: dict[str, tuple[str, ...]] = {}
    for name in recipes:
        parent = name.rpartition(".")[0]
        stacks[parent] = (*stacks.get(parent, ()), name)

    def converted(watched: str) -> tuple[str, ...]:
        if watched in recipes:
            return (watched,)
        if watched in stacks:
            return stacks[watched]
        parts = watched.split(".")
        parents = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
        return next(((adapted[parent],) for parent in parents if parent in adapted), ())

    return converted
