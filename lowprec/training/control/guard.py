"""When a run diverges, and which layers to train in more precision then. Numbers in, decisions out:
nothing here touches a tensor.

A loss or a gradient norm is compared with the healthy steps before it: with their median, and for
the loss with their median absolute deviation, which unlike mean and variance a few outliers do not
move (Huber, Robust Statistics, chapter 5). While the loss falls, most of what it deviates by is the
fall, in which a jump could hide; so it is compared with the last few steps, too, and with how far
losses lie from the few before them. Steps that breach a limit, or that loss scaling skipped, never
enter what later steps are compared with.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from pydantic import Field, field_validator

from lowprec.config.schema import StrictConfig
from lowprec.recipe import Recipe, library

Kind = Literal["loss", "gradient", "not finite", "skipped steps", "sqnr"]

_DEVIATION = 1.4826
"""Standard deviations per median absolute deviation of a normal distribution."""
_RECENT = 8
"""Steps in which a falling loss falls by little."""
_SUSPICIOUS = 2.0
"""A layer whose gradient norm is this many times its own median may be to blame; below that norms
vary from batch to batch."""


class GuardConfig(StrictConfig):
    """What watches a run for divergence, and what it does then. An infinite ratio, or number of
    deviations, switches its check off."""

    window: int = Field(default=64, ge=8)
    """Healthy steps whose median and spread a new loss and gradient norm are compared with."""
    warmup: int = Field(default=16, ge=2)
    """Healthy steps to see before anything but values that are not finite is a breach."""
    loss_deviations: float = Field(default=8.0, gt=0, allow_inf_nan=True)
    """A loss this many robust standard deviations (1.4826 times the median absolute deviation)
    above the median is a breach."""
    loss_ratio: float = Field(default=1.1, gt=1, allow_inf_nan=True)
    """And this many times the median: a steady loss may vary without harm."""
    gradient_ratio: float = Field(default=50.0, gt=1, allow_inf_nan=True)
    """A gradient norm this many times the median is a breach."""
    skipped_steps: int = Field(default=8, ge=1)
    """Optimizer steps in a row that loss scaling skips before that is a breach."""
    sqnr_floor: float | None = None
    """Signal-to-quantisation-noise ratio [dB] of a layer's operands below which it is a breach;
    none: not looked at."""
    snapshot_every: int = Field(default=50, ge=1)
    """Steps between copies of weights and optimizer state in host memory, the last good of which is
    restored."""
    data: Literal["skip", "replay"] = "skip"
    """After a breach go on behind the bad batches (skip), or go back to those since the last
    checkpoint on disk (replay)."""
    ladder: tuple[str, ...] = ("mxfp4", "fp8_blockwise", "bf16")
    """Recipes in rising precision: the worst layers take the next one above their own."""
    raise_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the converted layers to raise at most, if which of them is to blame does not show;
    one at least."""
    max_recoveries: int = Field(default=3, ge=0)
    """Breaches to recover from; after one more the run stops."""

    @field_validator("ladder")
    @classmethod
    def _rises(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("the ladder needs at least one recipe")
        widths = [library.get(name).narrowest_bits for name in value]
        for (low, high), (name, above) in zip(pairwise(widths), pairwise(value), strict=True):
            if high <= low:
                raise ValueError(
                    f"the ladder must rise: {above} ({high} bits) is no higher than {name} ({low} "
                    "bits)"
                )
        return value


@dataclass(frozen=True)
class Observation:
    """What one optimizer step showed."""

    step: int
    loss: float | None
    grad_norm: float | None
    """Of all gradients, unscaled and not clipped."""
    layers: dict[str, float]
    """The gradient norm of each watched layer by its module name, in model order; may be NaN or
    infinite."""
    skipped: bool
    """Loss scaling skipped the step."""
    scaled: bool
    """A loss scaler is in use: gradients that are not finite are normal then, in steps that it
    skips."""
    sqnr: dict[str, float] | None = None
    """Signal-to-quantisation-noise ratio [dB] of each layer's operands, in steps when it was
    measured."""


@dataclass(frozen=True)
class Breach:
    """A step that no healthy run takes."""

    kind: Kind
    reason: str
    """One line with numbers."""
    layers: tuple[str, ...]
    """Module names to blame, worst first; empty if nothing points to any."""
    began_well: bool = False
    """The loss of the step was healthy, only gradients were not finite: the weights that it began
    with are good."""


class Guard:
    """Tells for step after step whether it breaches a limit of `config`, whose fields say what the
    limits are."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._healthy = 0
        self._skipped = 0
        self._losses = self._recent()
        self._norms = self._recent()
        self._layers: dict[str, deque[float]] = {}

    def observe(self, observation: Observation) -> Breach | None:
        """The breach of this step, None for a healthy or a skipped one. Once for each optimizer
        step, in their order."""
        self._skipped = self._skipped + 1 if observation.skipped else 0
        found = self._not_finite(observation)
        # Young statistics would call an ordinary step an outlier, and a loss scale that starts high
        # is halved a few times.
        if found is None and self._healthy >= self.config.warmup:
            found = (
                self._too_many_skipped()
                or self._loss(observation.loss)
                or self._gradient(observation)
                or self._sqnr(observation)
            )
        if found is not None:
            self._skipped = 0
            kind, reason = found
            loss = observation.loss
            began_well = (
                kind == "not finite"
                and loss is not None
                and math.isfinite(loss)
                and self._loss(loss) is None
            )
            return Breach(
                kind=kind,
                reason=reason,
                layers=self._blame(kind, observation),
                began_well=began_well,
            )
        if not observation.skipped:
            self._remember(observation)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Plain data, exact in JSON. A guard that loads it tells the same as this one from here
        on."""
        return {
            "healthy": self._healthy,
            "skipped": self._skipped,
            "losses": list(self._losses),
            "norms": list(self._norms),
            "layers": {name: list(norms) for name, norms in self._layers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave. Of a longer window the latest values are taken."""
        self._healthy, self._skipped = state["healthy"], state["skipped"]
        self._losses, self._norms = self._recent(state["losses"]), self._recent(state["norms"])
        self._layers = {name: self._recent(norms) for name, norms in state["layers"].items()}

    def _recent(self, values: Iterable[float] = ()) -> deque[float]:
        return deque(values, maxlen=self.config.window)

    def _remember(self, observation: Observation) -> None:
        self._healthy += 1
        if observation.loss is not None:
            self._losses.append(observation.loss)
        if observation.grad_norm is not None:
            self._norms.append(observation.grad_norm)
        for name, norm in observation.layers.items():
            self._layers.setdefault(name, self._recent()).append(norm)

    def _not_finite(self, observation: Observation) -> tuple[Kind, str] | None:
        step, loss, norm = observation.step, observation.loss, observation.grad_norm
        if loss is not None and not math.isfinite(loss):
            return "not finite", f"loss {loss} in step {step}"
        bad = sum(not math.isfinite(value) for value in observation.layers.values())
        overflowed = observation.scaled and observation.skipped
        if overflowed or not (bad or (norm is not None and not math.isfinite(norm))):
            return None
        return (
            "not finite",
            f"gradients that are not finite in step {step}, in {bad} of {len(observation.layers)} "
            "watched layers",
        )

    def _too_many_skipped(self) -> tuple[Kind, str] | None:
        if self._skipped < self.config.skipped_steps:
            return None
        return (
            "skipped steps",
            f"{self._skipped} steps in a row were skipped, because their scaled gradients "
            "overflowed",
        )

    def _loss(self, loss: float | None) -> tuple[Kind, str] | None:
        if loss is None:
            return None
        for steps, middle, spread in self._levels():
            far = loss > middle + self.config.loss_deviations * spread
            if far and loss > middle + (self.config.loss_ratio - 1) * abs(middle):
                distance = f"{(loss - middle) / spread:.3g} deviations above" if spread else "above"
                return (
                    "loss",
                    f"loss {loss:.4g} is {distance} the median {middle:.4g} of the last {steps} "
                    "steps",
                )
        return None

    def _levels(self) -> Iterator[tuple[int, float, float]]:
        """What a loss is compared with: a number of steps, the median of their losses, and the
        spread to expect around it."""
        losses = list(self._losses)
        if losses:
            yield len(losses), median(losses), _spread(losses)
        if len(losses) >= 3 * _RECENT:
            ahead = [
                losses[at] - median(losses[at - _RECENT : at])
                for at in range(len(losses) - 2 * _RECENT, len(losses))
            ]
            yield _RECENT, median(losses[-_RECENT:]), _spread(ahead)

    def _gradient(self, observation: Observation) -> tuple[Kind, str] | None:
        norm = observation.grad_norm
        if norm is None or observation.skipped or not self._norms:
            return None
        middle = median(self._norms)
        # Of gradients that vanish every other is a multiple.
        if not middle or norm <= self.config.gradient_ratio * middle:
            return None
        times = f"{norm / middle:.3g} times the median {middle:.4g}"
        return (
            "gradient",
            f"gradient norm {norm:.4g} is {times} of the last {len(self._norms)} steps",
        )

    def _sqnr(self, observation: Observation) -> tuple[Kind, str] | None:
        floor, low = self.config.sqnr_floor, self._below_floor(observation.sqnr)
        if floor is None or not low:
            return None
        value = (observation.sqnr or {})[low[0]]
        others = f", and {len(low) - 1} more are" if len(low) > 1 else ""
        return (
            "sqnr",
            f"the quantisation of {low[0]} has a signal-to-noise ratio of {value:.3g} dB, below "
            f"{floor:g} dB{others}",
        )

    def _below_floor(self, sqnr: dict[str, float] | None) -> list[str]:
        floor = self.config.sqnr_floor
        return (
            []
            if floor is None
            else [name for name in _lowest_first(sqnr) if not (sqnr or {})[name] >= floor]
        )

    def _blame(self, kind: Kind, observation: Observation) -> tuple[str, ...]:
        if kind == "sqnr":
            return tuple(self._below_floor(observation.sqnr))
        # A NaN travels backwards, so the layer nearest the loss met it first.
        not_finite = [
            name for name, norm in reversed(observation.layers.items()) if not math.isfinite(norm)
        ]
        if not_finite:
            return tuple(not_finite)
        rises: dict[str, float] = {}
        for name, norm in observation.layers.items():
            middle = median(self._layers[name]) if self._layers.get(name) else 0.0
            if middle and norm >= _SUSPICIOUS * middle:
                rises[name] = norm / middle
        if rises:
            return tuple(sorted(rises, key=lambda name: -rises[name]))
        return tuple(_lowest_first(observation.sqnr))


def _spread(values: list[float]) -> float:
    middle = median(values)
    return _DEVIATION * median(abs(value - middle) for value in values)


def ladder_step(recipe: Recipe, ladder: tuple[str, ...]) -> Recipe | None:
    """The first recipe of `ladder` whose narrowest operand has more bits than `recipe`'s; None at
    the top."""
    above = (library.get(name) for name in ladder)
    return next((higher for higher in above if higher.narrowest_bits > recipe.narrowest_bits), None)


def worst(
    breach: Breach, recipes: dict[str, Recipe], sqnr: dict[str, float] | None, config: GuardConfig
) -> dict[str, Recipe]:
    """The layers to give more precision after `breach`, and the recipe that each takes.

    Those that the breach blames, worst first; if it blames none that can rise, those with the
    lowest signal-to-noise ratio; without such measurements those with the fewest bits, in model
    order. `raise_share` of the converted layers at most, one at least; none if all are at the top
    of the ladder.

    Args:
        recipes: the recipe of each converted layer, in model order.
        sqnr: the latest signal-to-quantisation-noise ratios [dB], if any were measured.
    """
    steps = {name: ladder_step(recipe, config.ladder) for name, recipe in recipes.items()}
    higher = {name: recipe for name, recipe in steps.items() if recipe is not None}
    # A layer may be blamed itself and by its adapters.
    meant = layers_meant(recipes)
    blamed = list(
        dict.fromkeys(
            name for watched in breach.layers for name in meant(watched) if name in higher
        )
    )
    measured = {name: (sqnr or {}).get(name, math.inf) for name in higher}
    if blamed:
        candidates = blamed
    elif any(value < math.inf or math.isnan(value) for value in measured.values()):
        candidates = _lowest_first(measured)
    else:
        candidates = sorted(higher, key=lambda name: recipes[name].narrowest_bits)
    # As much of 0.3 of 10 as a float shows is 3, not 2.
    count = max(1, math.floor(config.raise_share * len(recipes) + 1e-9))
    return {name: higher[name] for name in candidates[:count]}


def _lowest_first(sqnr: dict[str, float] | None) -> list[str]:
    """Names by their ratio; one that is not a number is the worst. Equal ones stay in their
    order."""
    values = sqnr or {}
    return sorted(values, key=lambda name: -math.inf if math.isnan(values[name]) else values[name])


def layers_meant(recipes: Mapping[str, Recipe]) -> Callable[[str], tuple[str, ...]]:
    """watched module -> the converted layers that it means: itself; of experts, watched as one
    module, their weights; of an adapter (PEFT's `q_proj.lora_A.default`) the layer that it adapts;
    none of a norm."""
    suffix = ".base_layer"
    adapted = {name.removesuffix(suffix): name for name in recipes if name.endswith(suffix)}
    stacks: dict[str, tuple[str, ...]] = {}
    for name in recipes:
        parent = name.rpartition(".")[0]
        stacks[parent] = (*stacks.get(parent, ()), name)

    def meant(watched: str) -> tuple[str, ...]:
        if watched in recipes:
            return (watched,)
        if watched in stacks:
            return stacks[watched]
        parts = watched.split(".")
        parents = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
        return next(((adapted[parent],) for parent in parents if parent in adapted), ())

    return meant
