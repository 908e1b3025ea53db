"""Recovery from divergence: measures each step, lets the guard judge it, and takes the run back to
good weights after a breach, with more precision in the layers that are to blame.

The weights are those of a snapshot in host memory (`guard.data: skip`), or of a checkpoint on disk,
which `replay` then resumes from (`guard.data: replay`).
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lowprec.conversion.discover import recipes_of
from lowprec.errors import TrainingStopped
from lowprec.observe import LayerProbe
from lowprec.recipe import Recipe, library
from lowprec.training.control.blame import converted_layers, layers_to_raise
from lowprec.training.control.events import Events
from lowprec.training.control.guard import Guard, GuardConfig
from lowprec.training.control.signals import Breach, Observation
from lowprec.training.control.snapshots import Snapshots
from lowprec.training.control.step_stats import Watch
from lowprec.training.file_names import EVENTS

logger = logging.getLogger("lowprec")

SETTLED = 3
"""Number of steps without a breach after which a snapshot or a checkpoint counts as good: a bad
update shows only in the steps after it."""


class Recovery:
    """The guard of a run, and what it needs to go back.

    Without a guard it only keeps what the checkpoint of an earlier run with a guard says.
    """

    def __init__(self, config: GuardConfig | None, events: Events) -> None:
        self.config = config
        self.events = events
        self.raised: dict[str, Recipe] = {}
        """Recipes of the layers that have more precision after a breach, by name."""
        self.recoveries = 0
        """Number of breaches so far."""
        self.replay_before: int | None = None
        """Step of a breach after which the run has to resume from a checkpoint before that step;
        None otherwise."""
        self.sqnr: dict[str, float] | None = None
        """The last measured signal-to-quantisation-noise ratio [dB] of each layer."""
        self.snapshots = Snapshots()
        self._guard = None if config is None else Guard(config)
        self._watch: Watch | None = None
        self._checkpoint_steps: set[int] = set()
        """Steps of those snapshots that have the state of a checkpoint."""
        self._restored: tuple[int, int] | None = None
        """Step of the last breach that restored a snapshot, and the step of that snapshot."""
        self._warned = False

    def begin(
        self,
        model: nn.Module,
        optimizer: Any,
        scaler: Any,
        *,
        device: torch.device | str | None,
        step: int,
        items_of_all_ranks: bool,
    ) -> None:
        """Watch a run that begins, or resumes, after `step` steps. See `PrecisionController.start`
        for the arguments."""
        if self._guard is None:
            return
        self._model = model
        self._optimizer = optimizer
        self._scaler = scaler
        self._device = device
        if self._watch is not None:
            self._watch.detach()
        self._watch = Watch(model, items_of_all_ranks)
        self.snapshots = Snapshots()
        self._take(step, checkpoint=True)

    def stop(self) -> None:
        """Remove the hooks from the model, and free the memory of the snapshots."""
        if self._watch is not None:
            self._watch.detach()
            self._watch = None
        self.snapshots = Snapshots()

    # In the run

    def observe(
        self,
        step: int,
        *,
        scale: float | None,
        skipped: bool,
        scaled: bool,
        sampled: dict[str, LayerProbe] | None,
    ) -> Breach | None:
        """Return the breach of the step that has just finished, None if there is none.

        Args:
            step: number of finished steps.
            scale: the loss scale that the gradients were multiplied by.
            skipped: whether loss scaling skipped the step.
            scaled: whether there is loss scaling.
            sampled: the quantisation errors, if this step measured them.
        """
        if self._guard is None:
            return None
        assert self._watch is not None
        loss, norm, layers = self._watch.read(scale)
        if loss is None and not self._warned:
            self._warned = True
            logger.warning(
                "guard: the model returns no loss (it is computed outside of it), so only the "
                "gradients are watched"
            )
        sqnr = None
        if sampled is not None:
            sqnr = self.sqnr = worst_sqnr(self._model, sampled, self._device)
        return self._guard.observe(
            Observation(
                step=step,
                loss=loss,
                grad_norm=norm,
                layers=layers,
                skipped=skipped,
                scaled=scaled,
                sqnr=sqnr,
            )
        )

    def go_back(
        self, step: int, breach: Breach, recipes: Mapping[str, Recipe]
    ) -> dict[str, Recipe]:
        """Restore a snapshot, or ask for a replay. Return the recipes of the layers to raise now.

        Args:
            recipes: the recipe of each converted layer, in model order.
        Raises:
            TrainingStopped: the run has recovered `max_recoveries` times already.
        """
        assert self.config is not None
        # A norm's gradient is not finite because of a converted layer behind it. So layers that can
        # be raised are named first, whatever their order in the model.
        converted = converted_layers(recipes)
        blamed = sorted(breach.layers, key=lambda name: not converted(name))
        self.events.add(step, "breach", f"{breach.kind}: {breach.reason}", layers=blamed[:8])
        if self.recoveries >= self.config.max_recoveries:
            raise TrainingStopped(
                f"guard: {breach.reason}, after {self.recoveries} recoveries; {EVENTS} names the "
                "layers; look at the data and the learning rate, and resume from an earlier "
                "checkpoint"
            )
        self.recoveries += 1
        changes = layers_to_raise(
            breach,
            recipes,
            self.sqnr,
            ladder=self.config.ladder,
            share=self.config.raise_share,
        )
        self.raised |= changes
        if self.config.data == "replay":
            self.replay_before = step
            self.events.add(
                step, "stopped", "the run resumes from the last checkpoint before this step"
            )
            return changes
        back = self.snapshots.restore(
            self._model, self._optimizer, self._scaler, before=self._last_good(step, breach)
        )
        self._restored = (step, back)
        self.events.add(
            step, "restored", f"weights and optimizer of step {back}; the data continues"
        )
        return changes

    def keep(self, step: int) -> None:
        """Take a snapshot after a step without a breach, if one is due."""
        if self.config is not None and step % self.config.snapshot_every == 0:
            self._take(step)

    def keep_with_checkpoint(self, step: int) -> None:
        """Take a snapshot, because a checkpoint was written: a run that resumes from the checkpoint
        begins with the same snapshot."""
        if self.config is not None and self.replay_before is None:
            self._take(step, checkpoint=True)

    # In the checkpoint

    def forget(self) -> None:
        """Begin another run of the same model, without the memory of the one before."""
        self.raised = {}
        self.recoveries = 0
        self.replay_before = None
        self.sqnr = None
        self._restored = None
        self._guard = None if self.config is None else Guard(self.config)

    def state_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {
            "recoveries": self.recoveries,
            "raised": {name: recipe.name for name, recipe in self.raised.items()},
            "restored": self._restored,
            "guard": None if self._guard is None else self._guard.state_dict(),
            "sqnr": self.sqnr,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the result of `state_dict`. What a replay has learnt since the checkpoint stays."""
        if self.replay_before is None:
            self.recoveries = state["recoveries"]
            restored = state["restored"]
            self._restored = None if restored is None else (restored[0], restored[1])
            self.raised = {
                name: library.resolve(recipe) for name, recipe in state["raised"].items()
            }
        self.sqnr = state.get("sqnr")  # older checkpoints have none
        if self._guard is not None and state["guard"] is not None:
            self._guard.load_state_dict(state["guard"])

    # Snapshots

    def _take(self, step: int, checkpoint: bool = False) -> None:
        """Take a snapshot, unless the newest one is too young: with both, no snapshot to go back to
        would be left if the next step is a breach.

        A checkpoint's snapshot replaces a younger one that no checkpoint needs: a run that resumes
        from the checkpoint has the same snapshots as this one.
        """
        steps = self.snapshots.steps
        if steps and steps[-1] > step + 1 - SETTLED:
            if not checkpoint or steps[-1] in self._checkpoint_steps:
                return
            self.snapshots.drop_newest()
        self.snapshots.take(step, self._model, self._optimizer, self._scaler)
        self._checkpoint_steps &= set(self.snapshots.steps)
        if checkpoint:
            self._checkpoint_steps.add(step)

    def _last_good(self, step: int, breach: Breach) -> int:
        """Return the step of the snapshot to go back to from a breach at `step`.

        `SETTLED` steps have followed it, or one if the loss of the breach was healthy. It is older
        than the one of last time, if that did not help for long. If there is none, the oldest.
        """
        steps = self.snapshots.steps
        good = [at for at in steps if at <= step - (1 if breach.began_well else SETTLED)]
        if self._restored is not None and self.config is not None:
            when, back = self._restored
            if step - when <= self.config.snapshot_every:
                good = [at for at in good if at < back]
        return max(good) if good else min(steps)


def worst_sqnr(
    model: nn.Module, sampled: Mapping[str, LayerProbe], device: torch.device | str | None
) -> dict[str, float]:
    """Return the signal-to-quantisation-noise ratio [dB] of each layer's worst operand on its worst
    rank. Ranks see other data, and have to decide alike. NaN becomes minus infinity, which a
    minimum keeps.

    Args:
        model: a converted model.
        sampled: what this rank measured, by layer.
        device: where the ranks reduce.
    """
    # All layers take part: an expert may have had tokens on one rank alone.
    names = list(recipes_of(model))
    nothing = (math.inf,) * 3
    found = {name: (probe.sqnr_x, probe.sqnr_w, probe.sqnr_g) for name, probe in sampled.items()}
    lowest = (
        torch.tensor(
            [found.get(name, nothing) for name in names], dtype=torch.float64, device=device
        )
        .reshape(-1, 3)
        .amin(1)
    )
    lowest = lowest.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return {
        name: value
        for name, value in zip(names, lowest.tolist(), strict=True)
        if value != math.inf or name in found
    }
