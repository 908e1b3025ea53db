"""The signals of divergence that the guard checks in each optimizer step.

A loss or a gradient norm is compared with the healthy steps before it: with their median, and the
loss also with their median absolute deviation. A few outliers move neither, unlike mean and
variance (Huber, Robust Statistics, chapter 5). While the loss falls, the fall itself is most of the
deviation, and a jump could hide in it. So the loss is also compared with the last few steps, and
with how far losses usually lie from the few before them. Steps that breach a limit, and steps that
loss scaling skipped, never enter these statistics.

To add a signal: write a subclass of `Signal` here, its settings in a class beside it, and add the
one to `SIGNALS`, the other to the bases of `SignalsConfig`, whose fields are keys of
`precision.guard`.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from pydantic import Field

from lowprec.config.schema import StrictConfig

_DEVIATION = 1.4826
"""Standard deviations per median absolute deviation of a normal distribution."""
_RECENT = 8
"""Number of steps in which a falling loss falls by little."""


@dataclass(frozen=True)
class Observation:
    """The measurements of one optimizer step."""

    step: int
    loss: float | None
    grad_norm: float | None
    """2-norm of all gradients, unscaled and not clipped."""
    layers: dict[str, float]
    """Gradient norm of each watched layer by its module name, in model order; NaN and infinity
    occur."""
    skipped: bool
    """Flag: loss scaling skipped the step."""
    scaled: bool
    """Flag: a loss scaler is in use. Gradients that are not finite are then normal in the steps
    that it skips."""
    sqnr: dict[str, float] | None = None
    """Signal-to-quantisation-noise ratio [dB] of each layer's operands, in the steps that measure
    it."""


@dataclass(frozen=True)
class Breach:
    """A step that exceeded a limit of the guard."""

    kind: str
    """Name of the signal."""
    reason: str
    """One line with numbers."""
    layers: tuple[str, ...] = ()
    """Module names to blame, worst first; empty if nothing points to any."""
    began_well: bool = False
    """Flag: the loss of the step was healthy, only gradients were not finite. So the weights before
    the step are good."""


class Signal:
    """One kind of breach.

    `Guard` calls `check` and then `remember` once for each optimizer step, in their order.
    """

    name: ClassVar[str]
    """Kind of the breach, as logs and events.jsonl show it."""
    after_warmup: ClassVar[bool] = True
    """Flag: the guard asks only after `warmup` healthy steps. Young statistics would call an
    ordinary step an outlier, and a loss scale that starts high is halved a few times."""

    def check(self, seen: Observation) -> Breach | None:
        """Return the breach of this step, or None. The state does not change."""
        raise NotImplementedError

    def remember(self, seen: Observation, breach: Breach | None) -> None:
        """Take a step into the state.

        Args:
            breach: what the guard found in this step, by this signal or another one.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data, exact in JSON. All signals share one dict: a key belongs
        to one signal."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take this signal's keys from the dict of all signals. Checkpoints that are older than the
        signal lack them."""


class WindowConfig(StrictConfig):
    """The healthy steps that a new one is compared with."""

    window: int = Field(default=64, ge=8)
    """Number of healthy steps whose median and spread a new loss and gradient norm are compared
    with."""
    warmup: int = Field(default=16, ge=2)
    """Number of healthy steps before anything but values that are not finite is a breach."""


class NotFinite(Signal):
    """A loss or a gradient is NaN or infinite.

    Gradients that overflow in a step that loss scaling skips are normal.
    """

    name = "not finite"
    after_warmup = False

    def __init__(self, config: StrictConfig) -> None:
        pass

    def check(self, seen: Observation) -> Breach | None:
        if seen.loss is not None and not math.isfinite(seen.loss):
            return Breach(self.name, f"loss {seen.loss} in step {seen.step}")
        bad = sum(not math.isfinite(norm) for norm in seen.layers.values())
        bad_norm = seen.grad_norm is not None and not math.isfinite(seen.grad_norm)
        overflowed = seen.scaled and seen.skipped
        if overflowed or not (bad or bad_norm):
            return None
        return Breach(
            self.name,
            f"gradients that are not finite in step {seen.step}, in {bad} of {len(seen.layers)} "
            "watched layers",
        )


class SkippedStepsConfig(StrictConfig):
    skipped_steps: int = Field(default=8, ge=1)
    """Number of optimizer steps in a row that loss scaling skips before that is a breach."""


class SkippedSteps(Signal):
    """Loss scaling skips too many steps in a row."""

    name = "skipped steps"

    def __init__(self, config: SkippedStepsConfig) -> None:
        self._limit = config.skipped_steps
        self._in_a_row = 0

    def check(self, seen: Observation) -> Breach | None:
        in_a_row = self._in_a_row + 1 if seen.skipped else 0
        if in_a_row < self._limit:
            return None
        return Breach(
            self.name,
            f"{in_a_row} steps in a row were skipped, because their scaled gradients overflowed",
        )

    def remember(self, seen: Observation, breach: Breach | None) -> None:
        # After a breach the run has other weights, so the count starts again.
        self._in_a_row = self._in_a_row + 1 if seen.skipped and breach is None else 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._in_a_row = state["skipped"]


class LossConfig(WindowConfig):
    loss_deviations: float = Field(default=8.0, gt=0, allow_inf_nan=True)
    """A loss this many robust standard deviations (1.4826 times the median absolute deviation)
    above the median is a breach, if `loss_ratio` is exceeded too."""
    loss_ratio: float = Field(default=1.1, gt=1, allow_inf_nan=True)
    """A loss has to exceed this many times the median to be a breach: a steady loss may vary
    without harm."""


class Loss(Signal):
    """The loss is far above that of the healthy steps before."""

    name = "loss"

    def __init__(self, config: LossConfig) -> None:
        self._config = config
        self._losses = recent(config)

    def check(self, seen: Observation) -> Breach | None:
        loss = seen.loss
        if loss is None:
            return None
        for steps, middle, spread in self._levels():
            far = loss > middle + self._config.loss_deviations * spread
            if far and loss > middle + (self._config.loss_ratio - 1) * abs(middle):
                distance = f"{(loss - middle) / spread:.3g} deviations above" if spread else "above"
                return Breach(
                    self.name,
                    f"loss {loss:.4g} is {distance} the median {middle:.4g} of the last {steps} "
                    "steps",
                )
        return None

    def remember(self, seen: Observation, breach: Breach | None) -> None:
        if is_healthy(seen, breach) and seen.loss is not None:
            self._losses.append(seen.loss)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses = recent(self._config, state["losses"])

    def _levels(self) -> Iterator[tuple[int, float, float]]:
        """Yield what a loss is compared with: a number of steps, the median of their losses, and
        the spread to expect around it."""
        losses = list(self._losses)
        if losses:
            yield len(losses), median(losses), _spread(losses)
        if len(losses) >= 3 * _RECENT:
            ahead = [
                losses[at] - median(losses[at - _RECENT : at])
                for at in range(len(losses) - 2 * _RECENT, len(losses))
            ]
            yield _RECENT, median(losses[-_RECENT:]), _spread(ahead)


class GradientConfig(WindowConfig):
    gradient_ratio: float = Field(default=50.0, gt=1, allow_inf_nan=True)
    """A gradient norm this many times the median is a breach."""


class Gradient(Signal):
    """The norm of all gradients is many times that of the healthy steps before."""

    name = "gradient"

    def __init__(self, config: GradientConfig) -> None:
        self._config = config
        self._norms = recent(config)

    def check(self, seen: Observation) -> Breach | None:
        norm = seen.grad_norm
        if norm is None or seen.skipped or not self._norms:
            return None
        middle = median(self._norms)
        # Every norm is a multiple of a median of zero.
        if not middle or norm <= self._config.gradient_ratio * middle:
            return None
        times = f"{norm / middle:.3g} times the median {middle:.4g}"
        return Breach(
            self.name,
            f"gradient norm {norm:.4g} is {times} of the last {len(self._norms)} steps",
        )

    def remember(self, seen: Observation, breach: Breach | None) -> None:
        if is_healthy(seen, breach) and seen.grad_norm is not None:
            self._norms.append(seen.grad_norm)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norms = recent(self._config, state["norms"])


class SqnrConfig(StrictConfig):
    sqnr_floor: float | None = None
    """Signal-to-quantisation-noise ratio [dB] of a layer's operands below which it is a breach;
    none: not checked."""


class Sqnr(Signal):
    """A layer's operands are quantised with too much noise."""

    name = "sqnr"

    def __init__(self, config: SqnrConfig) -> None:
        self._floor = config.sqnr_floor

    def check(self, seen: Observation) -> Breach | None:
        floor = self._floor
        sqnr = seen.sqnr
        if floor is None or sqnr is None:
            return None
        low = [name for name in lowest_first(sqnr) if not sqnr[name] >= floor]
        if not low:
            return None
        others = f", and {len(low) - 1} more are" if len(low) > 1 else ""
        return Breach(
            self.name,
            f"the quantisation of {low[0]} has a signal-to-noise ratio of {sqnr[low[0]]:.3g} dB, "
            f"below {floor:g} dB{others}",
            layers=tuple(low),
        )


# pydantic takes the fields of the last base first.
class SignalsConfig(SqnrConfig, SkippedStepsConfig, GradientConfig, LossConfig):
    """The settings of all signals. `guard.GuardConfig` adds those of the guard itself."""


SIGNALS = (NotFinite, SkippedSteps, Loss, Gradient, Sqnr)
"""All signals. The guard reports the first one of this order that finds a breach."""


def is_healthy(seen: Observation, breach: Breach | None) -> bool:
    """Return whether later steps may be compared with this one."""
    return breach is None and not seen.skipped


def recent(config: WindowConfig, values: Iterable[float] = ()) -> deque[float]:
    """Return the last `config.window` of `values`, and of those that are appended."""
    return deque(values, maxlen=config.window)


def lowest_first(sqnr: Mapping[str, float]) -> list[str]:
    """Return the names by rising ratio. NaN is the worst; equal ratios keep their order."""
    return sorted(sqnr, key=lambda name: -math.inf if math.isnan(sqnr[name]) else sqnr[name])


def _spread(values: list[float]) -> float:
    middle = median(values)
    return _DEVIATION * median(abs(value - middle) for value in values)
