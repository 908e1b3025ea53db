"""The shares of a model's linear weights, and of their operations, that run in each recipe; and the
warning where that is not much.

The operations of a layer are those of its three products, 6 N K for each token. A token goes to a
few of a mixture's experts, so a stack of experts counts by the number of them, if that is known.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol


class Layer(Protocol):
    """The fields of a LayerPlan (`plan.py`) that shares depend on."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def recipe(self) -> str | None: ...
    @property
    def rule(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def per_token(self) -> float: ...
    @property
    def slow(self) -> bool: ...
    @property
    def converted(self) -> bool: ...
    @property
    def weights(self) -> int: ...


HIGH_PRECISION = "high precision"
"""Key of the layers without a recipe."""

LITTLE = 0.5
"""Share of the weights below which a plan has a warning."""


def weights_by_recipe(layers: Iterable[Layer]) -> dict[str, float]:
    """Return the share of the weights that run in each recipe, and in high precision."""
    return _shares(layers, lambda layer: layer.weights)


def flops_by_recipe(layers: Iterable[Layer]) -> dict[str, float]:
    """Return the share of the operations, forward and backward, that run in each recipe, and in
    high precision."""
    return _shares(layers, lambda layer: layer.shape[0] * layer.shape[1] * layer.per_token)


def _shares(layers: Iterable[Layer], size: Callable[[Layer], float]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for layer in layers:
        name = layer.recipe or HIGH_PRECISION
        sums[name] = sums.get(name, 0.0) + size(layer)
    total = sum(sums.values())
    return {name: value / total for name, value in sums.items()} if total else {}


def format_shares(shares: dict[str, float]) -> str:
    """Return '97.3% fp8_blockwise, 2.7% high precision'."""
    ordered = sorted(shares.items(), key=lambda share: -share[1])
    return ", ".join(f"{share:.1%} {name}" for name, share in ordered)


def shortfall(layers: Sequence[Layer], recipe: str) -> str | None:
    """Return a warning if less than half of the weights run in low precision, with the main reason
    and what to write to change it; None otherwise.

    Layers that the user's own rules name do not count.

    Args:
        recipe: the recipe that the configuration asks for.
    """
    asked = [layer for layer in layers if layer.converted or layer.rule == "default"]
    weights = sum(layer.weights for layer in asked)
    share = sum(layer.weights for layer in asked if layer.converted) / weights if weights else 1.0
    if share >= LITTLE:
        return None
    kept = [layer for layer in asked if not layer.converted]
    if share == 0.0:
        told = f"{recipe} runs in none of the {len(layers)} linear layers"
    else:
        told = f"{recipe} runs in {share:.1%} of the linear weights only"
    # An output head may outweigh all other layers, and is never asked for without a rule.
    main = _slow(kept) if share == 0.0 else None
    return f"{told}: {main or _main_reason(kept)}"


def _main_reason(kept: Sequence[Layer]) -> str:
    """Return the reason that keeps most weights in high precision, and how to change that."""
    weights: dict[str, int] = {}
    for layer in kept:
        key = "" if layer.slow else layer.reason
        weights[key] = weights.get(key, 0) + layer.weights
    main = max(weights, key=lambda key: weights[key])
    if not main:
        return str(_slow(kept))
    first = next(layer for layer in kept if layer.reason == main)
    return f"{main} ({first.name})"


def _slow(kept: Sequence[Layer]) -> str | None:
    """Return what keeps layers in high precision that the recipe would slow down, and how to change
    that; None without such layers."""
    slow = [layer for layer in kept if layer.slow]
    if not slow:
        return None
    largest = max(slow, key=lambda layer: layer.weights)
    return (
        f"it does not pay ({largest.name}: {largest.reason}); precision.skip_slow: false runs all "
        "layers in it nevertheless"
    )
