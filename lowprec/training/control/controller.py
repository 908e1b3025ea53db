"""What keeps a run's precision: converts the model, changes its precision by the schedule, watches
for divergence and recovers from it.

`LowPrecisionCallback` and `lowprec.training.accelerate.prepare` drive it with the same five calls:

    convert(model)      once, before the optimizer exists
    start(...)          when the run begins or goes on; `load_state_dict` before that, if it goes on
    before_step(n)      n steps are finished
    after_step(n)       the same, after the optimizer's step and before anything is saved
    saved(n)            a checkpoint was written

Its state is plain JSON data and goes into the checkpoint; buffers of the layers (amax histories,
rounding counters) are in the model's.
"""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lowprec.config.schema import whole_number
from lowprec.conversion.convert import convert
from lowprec.conversion.discover import recipes_of
from lowprec.conversion.plan import PartPlan, Plan
from lowprec.errors import TrainingStopped
from lowprec.integrations.compile import compile_deterministically
from lowprec.nn import share_histories
from lowprec.observe import LayerProbe, Probe
from lowprec.recipe import Recipe, library
from lowprec.recipe.state import is_state
from lowprec.training.control.blame import converted_layers, layers_to_raise
from lowprec.training.control.events import Events
from lowprec.training.control.guard import Guard
from lowprec.training.control.precision import PrecisionConfig, parse_precision
from lowprec.training.control.schedule import Schedule, make_schedule
from lowprec.training.control.signals import Breach, Observation
from lowprec.training.control.snapshots import Snapshots
from lowprec.training.control.step_stats import Watch
from lowprec.training.file_names import EVENTS
from lowprec.training.optim.loss_scaling import check_floor

logger = logging.getLogger("lowprec")

SETTLED = 3
"""Steps after which a snapshot or a checkpoint counts as good if nothing has happened."""


class PrecisionController:
    """See the module.

    Args:
        precision: a recipe name, a mapping, a YAML path, a Recipe or a PrecisionConfig.
        parts: what else the plan should show (attention, kernels, ...).
        tokens: of a forward pass on one device, if known.
        compiled: whether the model's blocks are compiled.
    Raises:
        UserError: the precision is wrong; at once where that can be seen without the model.
    """

    def __init__(
        self,
        precision: Any,
        *,
        parts: Iterable[PartPlan] = (),
        tokens: int | None = None,
        compiled: bool = False,
    ) -> None:
        tokens = (
            None if tokens is None else whole_number(tokens, "tokens: the tokens of a forward pass")
        )
        self.config: PrecisionConfig = parse_precision(precision)
        self.phases = self.config.phases()
        self.parts, self.tokens, self.compiled = tuple(parts), tokens, compiled
        self.plan: Plan | None = None
        self.phase = 0
        self.raised: dict[str, Recipe] = {}
        """Recipes of layers that the guard gave more precision, by name."""
        self.skipped_steps = self.recoveries = 0
        self.replay_before: int | None = None
        """Set when the guard wants the run to go on from the last checkpoint before this step
        (`guard.data: replay`)."""
        self._events = Events()
        self.probed: dict[str, LayerProbe] = {}
        self._unlogged = False
        self._sqnr: dict[str, float] | None = None
        self._schedule = Schedule(ends=(0,))
        self._guard = None if self.config.guard is None else Guard(self.config.guard)
        self._snapshots, self._watch = Snapshots(), None
        self._probe: Probe | None = None
        self._scaler: Any = None
        self._scale: float | None = None
        """The loss scale that the next step's gradients will have, if it is known."""
        self._checkpoints: set[int] = set()
        """The snapshots that are a checkpoint's as well, by their step."""
        self._last_step: int | None = None
        self._warned = False
        self._restored: tuple[int, int] | None = None
        """When the guard last went back, and to which step."""

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened, oldest first: phase changes, breaches, what was raised."""
        return self._events.records

    @property
    def has_state(self) -> bool:
        """Whether any recipe of the run keeps something in the layers."""
        return any(is_state(name) for name, _ in self._model.named_buffers())

    # Before the run

    def convert(self, model: nn.Module, device: torch.device | str | None = None) -> Plan:
        """Convert `model` in place, for the first phase, and with the state that any phase or the
        guard may need."""
        self._model, self._device = model, device
        return self._set_phase(0)

    def start(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        step: int = 0,
        total_steps: int | None = None,
        tokens_per_step: int | None = None,
        scaler: Any = None,
        directory: Path | None = None,
        main: bool = True,
        items_of_all_ranks: bool = False,
    ) -> None:
        """The run begins, or goes on, after `step` steps.

        Args:
            model: prepared for training: on its device, wrapped or sharded.
            optimizer: of the model; Accelerate's wrapping is looked through.
            total_steps, tokens_per_step: see `make_schedule`.
            scaler: the gradient scaler, if there is one.
            directory: where events are written, if anywhere.
            main: whether this rank tells of events, in the log and the directory.
            items_of_all_ranks: see `Watch`.
        Raises:
            UserError: the schedule does not fit the run.
        """
        self._schedule = make_schedule(self.config.schedule, total_steps, tokens_per_step)
        compile_deterministically()
        self._model, self._optimizer, self._scaler, self._scale = model, optimizer, scaler, None
        # Stale events go after a step, no earlier: an Accelerate loop starts at 0 before it loads
        # its checkpoint.
        self._events.begin(
            directory if main else None,
            logs=main,
            stale_after=step if self.replay_before is None else None,
        )
        self.replay_before = None
        self._set_phase(self._schedule.phase(step))
        if self._guard is not None:
            if self._watch is not None:
                self._watch.detach()
            self._watch, self._snapshots = Watch(model, items_of_all_ranks), Snapshots()
            self._take(step, checkpoint=True)
        if self._probe is not None:
            self._probe.cancel()
        if self.config.probe_every:
            self._probe = Probe(model)
        self._last_step = total_steps

    def stop(self) -> None:
        """The run is over: nothing stays hooked to the model."""
        if self._watch is not None:
            self._watch.detach()
            self._watch = None
        if self._probe is not None:
            self._probe.cancel()
        self._snapshots = Snapshots()  # their memory

    # In the run

    def before_step(self, step: int) -> None:
        """`step` steps are finished; the next one's forward pass comes."""
        phase = self._schedule.phase(step)
        if phase != self.phase:
            self._set_phase(phase)
            assert self.plan is not None
            self._events.tell(
                step, "phase", f"phase {phase + 1} of {len(self.phases)}: {self.plan.summary()}"
            )
        over = self._last_step is not None and step >= self._last_step
        if self._probe is not None and step % self.config.probe_every == 0 and not over:
            self._probe.begin()
        if self._scale is None and self._scaler_in_use():
            self._scale = self._scaler.get_scale()

    def after_step(self, step: int) -> None:
        """`step` steps are finished, the last one just now.

        Raises:
            TrainingStopped: the guard has recovered as often as it may, or the loss scale is below
                its floor.
        """
        self._events.forget_stale()
        scale, self._scale = self._scale, None if self._scale is None else self._scaler.get_scale()
        # Accelerate's `step_was_skipped` is false of fused optimizers: torch calls their `step`,
        # which looks for overflows itself.
        skipped = scale is not None and self._scale is not None and self._scale < scale
        self.skipped_steps += skipped
        share_histories(self._model)
        sampled = None
        if self._probe is not None and self._probe.armed:
            self.probed, self._unlogged = (sampled := self._probe.end()), True
        breach = self._observe(step, scale, skipped, sampled) if self._guard is not None else None
        if breach is not None:
            self._recover(step, breach)
        elif skipped and self._scaler is not None:
            check_floor(self._scaler, self.config.loss_scaling, step, self.skipped_steps)
        if (
            self._guard is not None
            and breach is None
            and step % self._guard.config.snapshot_every == 0
        ):
            self._take(step)

    def saved(self, step: int) -> None:
        """A checkpoint was written: a run that resumes from it has what this one has to go back
        to."""
        if self._guard is not None and self.replay_before is None:
            self._take(step, checkpoint=True)

    def scalars(self) -> dict[str, float]:
        """What to log beside the loss; quantisation errors once for each time that they were
        measured."""
        values: dict[str, float] = {}
        if self._scaler_in_use():
            values |= {"loss_scale": self._scaler.get_scale(), "skipped_steps": self.skipped_steps}
        if len(self.phases) > 1:
            values["phase"] = self.phase + 1
        if self._guard is not None:
            values |= {"guard_recoveries": self.recoveries, "guard_raised_layers": len(self.raised)}
        for name in ("x", "w", "g") if self._unlogged else ():
            found = sorted(getattr(probe, f"sqnr_{name}") for probe in self.probed.values())
            if found:
                values |= {
                    f"sqnr_{name}_min": found[0],
                    f"sqnr_{name}_median": found[len(found) // 2],
                }
        self._unlogged = False
        return values

    # In the checkpoint

    def forget(self) -> None:
        """Before `start`: another run of the same model begins, which knows nothing of the one
        before."""
        self.raised, self.skipped_steps, self.recoveries, self._restored, self.replay_before = (
            {},
            0,
            0,
            None,
            None,
        )
        self._sqnr, self.probed = None, {}
        self._events.records = []
        self._guard = None if self.config.guard is None else Guard(self.config.guard)

    def state_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "skipped_steps": self.skipped_steps,
            "recoveries": self.recoveries,
            "raised": {name: recipe.name for name, recipe in self.raised.items()},
            "restored": self._restored,
            "guard": None if self._guard is None else self._guard.state_dict(),
            "sqnr": self._sqnr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before `start`. What a replay has learnt since the checkpoint stays."""
        if self.replay_before is None:
            self.recoveries = state["recoveries"]
            self._restored = (
                None if state["restored"] is None else (state["restored"][0], state["restored"][1])
            )
            self.raised = {
                name: library.resolve(recipe) for name, recipe in state["raised"].items()
            }
        self.skipped_steps, self._sqnr = state["skipped_steps"], state.get("sqnr")
        if self._guard is not None and state["guard"] is not None:
            self._guard.load_state_dict(state["guard"])

    # Inside

    def _set_phase(self, number: int) -> Plan:
        self.phase = number
        ladder = (
            []
            if self.config.guard is None
            else [library.get(name) for name in self.config.guard.ladder]
        )
        plan = convert(
            self._model,
            self.phases[number],
            device=self._device,
            tokens=self.tokens,
            compiled=self.compiled,
            raised=self.raised,
            later=(*self.phases, *ladder),  # the present one, too: what its layers hold stays
        )
        self.plan = with_parts = plan.with_parts(self.parts)
        return with_parts

    def _scaler_in_use(self) -> bool:
        return self._scaler is not None and self._scaler.is_enabled()

    def _observe(
        self, step: int, scale: float | None, skipped: bool, sampled: dict[str, LayerProbe] | None
    ) -> Breach | None:
        assert self._guard is not None
        assert self._watch is not None
        loss, norm, layers = self._watch.read(scale)
        if loss is None and not self._warned:
            self._warned = True
            logger.warning(
                "guard: the model returns no loss (it is computed outside of it), so only the "
                "gradients are watched"
            )
        sqnr = None if sampled is None else self._worst_sqnr(sampled)
        return self._guard.observe(
            Observation(
                step=step,
                loss=loss,
                grad_norm=norm,
                layers=layers,
                skipped=skipped,
                scaled=self._scaler_in_use(),
                sqnr=sqnr,
            )
        )

    def _recover(self, step: int, breach: Breach) -> None:
        assert self._guard is not None
        config = self._guard.config
        recipes = recipes_of(self._model)
        # A norm's gradient is not finite because of a layer's behind it, whatever their order in
        # the model.
        converted = converted_layers(recipes)
        blamed = sorted(breach.layers, key=lambda name: not converted(name))
        self._events.tell(step, "breach", f"{breach.kind}: {breach.reason}", layers=blamed[:8])
        if self.recoveries >= config.max_recoveries:
            raise TrainingStopped(
                f"guard: {breach.reason}, after {self.recoveries} recoveries; {EVENTS} names the "
                "layers; "
                "look at the data and the learning rate, and go on from an earlier checkpoint"
            )
        self.recoveries += 1
        changes = layers_to_raise(breach, recipes, self._sqnr, config)
        self.raised |= changes
        if config.data == "replay":
            self.replay_before = step
            self._events.tell(
                step, "stopped", "the run goes on from the last checkpoint before this step"
            )
        else:
            back = self._snapshots.restore(
                self._model, self._optimizer, self._scaler, before=self._last_good(step, breach)
            )
            self._restored, self._scale = (step, back), None
            self._events.tell(
                step, "restored", f"weights and optimizer of step {back}; the data goes on"
            )
        if changes:
            self._set_phase(self.phase)
            names = [
                f"{name}: {recipes[name].name} -> {recipe.name}" for name, recipe in changes.items()
            ]
            self._events.tell(
                step,
                "raised",
                f"precision of {len(changes)} of {len(recipes)} layers",
                layers=names,
            )
        else:
            self._events.tell(step, "raised", "no layer: all are as high as the ladder goes")

    def _worst_sqnr(self, sampled: dict[str, LayerProbe]) -> dict[str, float]:
        """Of each layer's worst operand on the worst rank [dB]: ranks see other data, and must
        decide alike. What is no number counts as minus infinity, which a minimum keeps."""
        # Of all layers: an expert may have had tokens on one rank alone.
        names = list(recipes_of(self._model))
        nothing = (math.inf,) * 3
        found = {
            name: (probe.sqnr_x, probe.sqnr_w, probe.sqnr_g) for name, probe in sampled.items()
        }
        lowest = (
            torch.tensor(
                [found.get(name, nothing) for name in names],
                dtype=torch.float64,
                device=self._device,
            )
            .reshape(-1, 3)
            .amin(1)
        )
        lowest = lowest.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        self._sqnr = {
            name: value
            for name, value in zip(names, lowest.tolist(), strict=True)
            if value != math.inf or name in found
        }
        return self._sqnr

    def _take(self, step: int, checkpoint: bool = False) -> None:
        """A snapshot, unless the newest one is so young that keeping these two would leave none to
        go back to if the next step is a breach.

        A checkpoint's takes the place of such a one that is none's: a run that resumes from it has
        what this one has.
        """
        steps = self._snapshots.steps
        if steps and steps[-1] > step + 1 - SETTLED:
            if not checkpoint or steps[-1] in self._checkpoints:
                return
            self._snapshots.drop_newest()
        self._snapshots.take(step, self._model, self._optimizer, self._scaler)
        self._checkpoints = {at for at in self._checkpoints if at in self._snapshots.steps} | (
            {step} if checkpoint else set()
        )

    def _last_good(self, step: int, breach: Breach) -> int:
        """The snapshot to go back to from a breach at `step`: one that some healthy steps have
        followed, since a bad update shows only in the steps after it, or one healthy loss, if there
        was nothing worse yet; and an older one than last time, if that did not help for long."""
        steps = self._snapshots.steps
        good = [at for at in steps if at <= step - (1 if breach.began_well else SETTLED)]
        if self._restored is not None and self._guard is not None:
            when, back = self._restored
            if step - when <= self._guard.config.snapshot_every:
                good = [at for at in good if at < back]
        return max(good) if good else min(steps)
