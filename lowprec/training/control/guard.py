"""The guard: decides for each optimizer step whether the run diverges. Numbers in, decisions out:
nothing here touches a tensor.

`signals` has the kinds of breaches, `blame` the choice of the layers that take more precision,
`controller` the recovery.
"""

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from lowprec.errors import UserError
from lowprec.recipe import library
from lowprec.training.control.blame import LayerNorms
from lowprec.training.control.signals import (
    SIGNALS,
    Breach,
    NotFinite,
    Observation,
    Signal,
    SignalsConfig,
    is_healthy,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments


class GuardConfig(SignalsConfig):
    """Settings of the guard: the limits of all signals, and what happens after a breach. An
    infinite ratio, or an infinite number of deviations, switches its check off."""

    snapshot_every: int = Field(default=50, ge=1)
    """Steps between copies of weights and optimizer state to host memory. After a breach the last
    good copy is restored."""
    data: Literal["skip", "replay"] = "skip"
    """After a breach: continue behind the bad batches (skip), or go back to the last checkpoint on
    disk and train on the batches since then again (replay)."""
    ladder: tuple[str, ...] = ("mxfp4", "fp8_blockwise", "bf16")
    """Recipes in rising precision: the worst layers take the next one above their own."""
    raise_share: float = Field(default=0.1, gt=0, le=1)
    """Largest share of the converted layers to raise, if nothing shows which of them is to blame;
    at least one layer."""
    max_recoveries: int = Field(default=3, ge=0)
    """Number of breaches to recover from; one more stops the run."""

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


class Guard:
    """Check one optimizer step after another by all signals."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.signals: list[Signal] = [signal(config) for signal in SIGNALS]
        self._layers = LayerNorms(config)
        self._healthy = 0
        """Number of healthy steps so far."""

    def observe(self, seen: Observation) -> Breach | None:
        """Return the breach of this step, None for a healthy or a skipped one. Call it once for
        each optimizer step, in their order."""
        warm = self._healthy >= self.config.warmup
        breach = _first_breach(
            [signal for signal in self.signals if warm or not signal.after_warmup], seen
        )
        if breach is not None:
            breach = replace(
                breach,
                layers=breach.layers or self._layers.blame(seen),
                began_well=breach.kind == NotFinite.name and self._loss_is_healthy(seen),
            )
        for signal in self.signals:
            signal.remember(seen, breach)
        self._layers.remember(seen, breach)
        self._healthy += is_healthy(seen, breach)
        return breach

    def _loss_is_healthy(self, seen: Observation) -> bool:
        loss_alone = replace(seen, grad_norm=None, layers={}, skipped=False, sqnr=None)
        return seen.loss is not None and _first_breach(self.signals, loss_alone) is None

    def state_dict(self) -> dict[str, Any]:
        """Return plain data, exact in JSON. A guard that loads it decides as this one from here
        on."""
        state: dict[str, Any] = {"healthy": self._healthy}
        for part in (*self.signals, self._layers):
            state |= part.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the result of `state_dict`. If its window was longer, the latest values count."""
        self._healthy = state["healthy"]
        for part in (*self.signals, self._layers):
            part.load_state_dict(state)


def _first_breach(signals: list[Signal], seen: Observation) -> Breach | None:
    found = (signal.check(seen) for signal in signals)
    return next((breach for breach in found if breach is not None), None)


def check_replay(guard: GuardConfig | None, args: "TrainingArguments") -> None:
    """Raise UserError if a guard with `data: replay` has to go back to checkpoints that these
    TrainingArguments do not write, or write without the optimizer."""
    if guard is None or guard.data != "replay":
        return
    if args.save_strategy == "no":
        raise UserError(
            "precision.guard.data: replay goes back to checkpoints, but save_strategy=no writes "
            "none"
        )
    if args.save_only_model:
        raise UserError(
            "precision.guard.data: replay goes back to checkpoints, but save_only_model writes "
            "them without the optimizer"
        )
