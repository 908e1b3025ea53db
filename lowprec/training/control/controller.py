"""The controller of a run's precision: converts the model, changes its precision by the schedule,
and recovers from divergence.

`LowPrecisionCallback` and `lowprec.training.accelerate.prepare` drive it with the same five calls:

    convert(model)      once, before the optimizer exists
    start(...)          when the run begins or resumes, and after `load_state_dict` if it resumes
    before_step(n)      n steps are finished, and the next one begins
    after_step(n)       n steps are finished; the optimizer has stepped and nothing is saved yet
    saved(n)            a checkpoint was written after step n

Its state is plain JSON data and goes into the checkpoint; the buffers of the layers (amax
histories, rounding counters) are in the model's state dict.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowprec.config.schema import whole_number
from lowprec.conversion.config import Precision
from lowprec.conversion.convert import convert, make_plan
from lowprec.conversion.discover import recipes_of
from lowprec.conversion.plan import PartPlan, Plan
from lowprec.integrations.compile import compile_deterministically
from lowprec.nn import share_histories
from lowprec.observe import LayerProbe, Probe, sqnr_scalars
from lowprec.recipe import Recipe, library
from lowprec.recipe.state import is_state
from lowprec.training.control.events import Events
from lowprec.training.control.first_step import FirstStepCheck
from lowprec.training.control.precision import PrecisionConfig, parse_precision
from lowprec.training.control.ran import RanPrecision
from lowprec.training.control.recovery import Recovery
from lowprec.training.control.schedule import Schedule, make_schedule
from lowprec.training.control.signals import Breach
from lowprec.training.control.tokens_seen import TokensSeen, compare_first_pass
from lowprec.training.optim.loss_scaling import check_floor


class PrecisionController:
    """Controls the precision of a run; see the module.

    Args:
        precision: a recipe name, a mapping, a YAML path, a Recipe or a PrecisionConfig.
        parts: other rows of the plan (attention, kernels, ...).
        tokens: number of tokens in a forward pass on one device, if known.
        compiled: whether the model's blocks are compiled.
    Raises:
        UserError: the precision is wrong; raised here if that can be seen without the model.
    """

    name = "lowprec"
    """Name of its state in a checkpoint: the key in `trainer_state.json` under
    `stateful_callbacks`. It is not the name of a class: under that the Trainer would make a new
    callback from the state, without a model."""

    def __init__(
        self,
        precision: Precision,
        *,
        parts: Iterable[PartPlan] = (),
        tokens: int | None = None,
        compiled: bool = False,
    ) -> None:
        if tokens is not None:
            tokens = whole_number(tokens, "tokens: the tokens of a forward pass")
        self.config: PrecisionConfig = parse_precision(precision)
        self.phases = self.config.phases()
        self.parts = tuple(parts)
        self.tokens = tokens
        self.compiled = compiled
        self.plan: Plan | None = None
        self.phase = 0
        self._loaded_phase: int | None = None
        """The phase of the last step before the checkpoint that was loaded."""
        self.skipped_steps = 0
        """Number of steps that loss scaling skipped."""
        self.tokens_seen = TokensSeen()
        self.ran = RanPrecision()
        self.after_conversion: Callable[[], None] = lambda: None
        """Called whenever the model has got its recipes."""
        self.probed: dict[str, LayerProbe] = {}
        """The last measured quantisation errors, by layer."""
        self._unlogged = False  # whether `probed` is in no log yet
        self._events = Events()
        self._first_step = FirstStepCheck(self._events)
        self.recovery = Recovery(self.config.guard, self._events)
        self._schedule = Schedule(ends=(0,))
        self._probe: Probe | None = None
        self._scaler: Any = None
        self._scale: float | None = None
        """The loss scale of the next step's gradients, if it is known."""
        self._last_step: int | None = None

    @property
    def events(self) -> list[dict[str, Any]]:
        """Phase changes, breaches and recoveries, oldest first."""
        return self._events.records

    @property
    def raised(self) -> dict[str, Recipe]:
        """Recipes of the layers that have more precision after a breach, by name."""
        return self.recovery.raised

    @property
    def recoveries(self) -> int:
        """Number of breaches so far."""
        return self.recovery.recoveries

    @property
    def replay_before(self) -> int | None:
        """Step of a breach after which the run has to resume from a checkpoint before that step
        (`guard.data: replay`); None otherwise."""
        return self.recovery.replay_before

    @property
    def model(self) -> nn.Module:
        """The model that is controlled; `convert` sets it."""
        return self._model

    @property
    def has_state(self) -> bool:
        """Flag: a recipe of the run keeps something in the layers."""
        return any(is_state(name) for name, _ in self._model.named_buffers())

    # Before the run

    def convert(self, model: nn.Module, device: torch.device | str | None = None) -> Plan:
        """Convert `model` in place for the first phase, with the state that any later phase or the
        guard may need."""
        self._model = model
        self._device = device
        return self._set_phase(0)

    def convert_alike(self, model: nn.Module, *, as_training: bool) -> None:
        """Convert another model, which stays in `eval()`, as the controlled one is now.

        Args:
            as_training: whether it gets the recipes of training or those of evaluation.
        """
        phases = self.phases
        if as_training:
            phases = [phase.model_copy(update={"evaluation": "training"}) for phase in phases]
        self._convert(model, phases)

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
        called: nn.Module | None = None,
    ) -> None:
        """Begin a run, or resume it after `step` steps.

        Args:
            model: prepared for training: on its device, wrapped or sharded.
            optimizer: the model's optimizer, also in Accelerate's wrapper.
            total_steps: see `make_schedule`.
            tokens_per_step: see `make_schedule`.
            scaler: the gradient scaler, if there is one.
            directory: where events.jsonl is written; None: nowhere.
            main: whether this rank reports events, in the log and in the directory.
            items_of_all_ranks: see `Watch`.
            called: the module that the training loop calls, if it wraps `model`.
        Raises:
            UserError: the schedule does not fit the run.
        """
        self._schedule = make_schedule(self.config.schedule, total_steps, tokens_per_step)
        if self._schedule.counts_tokens:
            self.tokens_seen.begin(step, tokens_per_step)
        self.tokens_seen.watch(model if called is None else called)
        self._main = main
        compile_deterministically()
        self._model = model
        self._scaler = scaler
        self._scale = None
        # Stale events are dropped after the first step, not here: an Accelerate loop starts at 0
        # before it loads its checkpoint.
        self._events.begin(
            directory if main else None,
            logs=main,
            stale_after=step if self.recovery.replay_before is None else None,
        )
        self.recovery.replay_before = None
        # A resumed run is in the phase of the step before until its next step begins.
        last = self._loaded_phase if step else None
        self._loaded_phase = None
        plan = self._set_phase(self._phase_after(step) if last is None else last)
        self._first_step.begin(model, optimizer, plan)
        self.recovery.begin(
            model,
            optimizer,
            scaler,
            device=self._device,
            step=step,
            items_of_all_ranks=items_of_all_ranks,
        )
        if self._probe is not None:
            self._probe.cancel()
        if self.config.probe_every:
            self._probe = Probe(model)
        self._last_step = total_steps

    def stop(self) -> None:
        """End the run: remove all hooks from the model."""
        self.tokens_seen.detach()
        self._first_step.stop()
        self.recovery.stop()
        if self._probe is not None:
            self._probe.cancel()

    # In the run

    def before_step(self, step: int) -> None:
        """Prepare the forward pass of the next step, after `step` finished ones."""
        self._first_step.before_step()
        phase = self._phase_after(step)
        if phase != self.phase:
            self._set_phase(phase)
            assert self.plan is not None
            number = f"phase {phase + 1} of {len(self.phases)}"
            self._events.add_phase(step, number, self.plan, self._planned.warnings)
            self._first_step.report(self.plan, step, strict=self.phases[phase].strict)
        over = self._last_step is not None and step >= self._last_step
        if not over:
            self.tokens_seen.begin_step()
        if self._probe is not None and step % self.config.probe_every == 0 and not over:
            self._probe.begin()
        if self._scale is None and self._scaler_in_use():
            self._scale = self._scaler.get_scale()

    def after_step(self, step: int) -> None:
        """Judge the step that has just finished, the last of `step`.

        Raises:
            TrainingStopped: the guard has recovered as often as it may, or the loss scale is below
                its floor.
            UserError: `strict`, and the first step multiplied by a converted weight without calling
                its layer.
        """
        self._events.forget_stale()
        if self._schedule.counts_tokens:
            self.tokens_seen.end_step()
        seen = self.tokens_seen.take_first()
        if seen is not None and self._main:
            compare_first_pass(seen, self.tokens, self._plan_for)
        if self._first_step.after_step():
            self.plan = self._first_step.correct(self._planned, self._model)
            self._first_step.report(self.plan, step, strict=self.phases[self.phase].strict)
        self.ran.add(self.plan)
        scale = self._scale
        self._scale = None if scale is None else self._scaler.get_scale()
        # Accelerate's `step_was_skipped` is false for fused optimizers: torch calls their `step`,
        # which looks for overflows itself.
        skipped = scale is not None and self._scale is not None and self._scale < scale
        self.skipped_steps += skipped
        share_histories(self._model)
        sampled = None
        if self._probe is not None and self._probe.armed:
            sampled = self.probed = self._probe.end()
            self._unlogged = True
        breach = self.recovery.observe(
            step, scale=scale, skipped=skipped, scaled=self._scaler_in_use(), sampled=sampled
        )
        if breach is not None:
            self._recover(step, breach)
            return
        if skipped and self._scaler is not None:
            check_floor(self._scaler, self.config.loss_scaling, step, self.skipped_steps)
        self.recovery.keep(step)

    def saved(self, step: int) -> None:
        """Note that a checkpoint was written after `step` steps."""
        self.recovery.keep_with_checkpoint(step)

    def scalars(self) -> dict[str, float]:
        """Return what to log beside the loss. Each measurement of quantisation errors is returned
        once."""
        values: dict[str, float] = {}
        if self._scaler_in_use():
            values |= {"loss_scale": self._scaler.get_scale(), "skipped_steps": self.skipped_steps}
        if len(self.phases) > 1:
            values["phase"] = self.phase + 1
        if self.config.guard is not None:
            values |= {"guard_recoveries": self.recoveries, "guard_raised_layers": len(self.raised)}
        values |= sqnr_scalars(self.probed) if self._unlogged else {}
        self._unlogged = False
        return values

    # In the checkpoint

    def forget(self) -> None:
        """Begin another run of the same model, without the memory of the one before. Call it before
        `start`."""
        self.skipped_steps = 0
        self.tokens_seen.total = None
        self.ran.forget()
        self.probed = {}
        self._events.records = []
        self._first_step.forget()
        self.recovery.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {
            "skipped_steps": self.skipped_steps,
            "tokens_seen": self.tokens_seen.total,
            "uncalled": self._first_step.uncalled,
            "ran": self.ran.state_dict(),
            "phase": self.phase,
            "events": self._events.lines,
            **self.recovery.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the result of `state_dict`. Call it before `start`."""
        self.skipped_steps = state["skipped_steps"]
        self.tokens_seen.total = state.get("tokens_seen")  # older checkpoints have none
        self._first_step.uncalled = state.get("uncalled")  # older checkpoints have none
        self._events.load_lines(state.get("events"))
        self.ran.load_state_dict(state.get("ran"))
        phase = state.get("phase")
        self._loaded_phase = phase if phase in range(len(self.phases)) else None
        self.recovery.load_state_dict(state)

    # Inside

    def _set_phase(self, number: int) -> Plan:
        self.phase = number
        plan = self._convert(self._model, self.phases)
        self._planned = plan.with_parts(self.parts)
        self.plan = corrected = self._first_step.correct(self._planned, self._model)
        self.after_conversion()
        return corrected

    def _convert(self, model: nn.Module, phases: Sequence[PrecisionConfig]) -> Plan:
        guard = self.config.guard
        ladder = [] if guard is None else [library.get(name) for name in guard.ladder]
        return convert(
            model,
            phases[self.phase],
            **self._facts(self.tokens),
            # The present phase is among them, so that what its layers keep stays.
            later=(*phases, *ladder),
            quiet=True,
        )

    def _phase_after(self, step: int) -> int:
        tokens = self.tokens_seen.total if self._schedule.counts_tokens else None
        return self._schedule.phase(step, tokens)

    def _plan_for(self, tokens: int | None) -> str:
        """Return the plan's summary for a number of tokens in a pass; "" on a CPU, where the plan
        does not depend on it."""
        if torch.device(self._device or "cpu").type == "cpu":
            return ""
        facts = self._facts(tokens)
        return make_plan(self._model, self.phases[self.phase], **facts).summary()

    def _facts(self, tokens: int | None) -> dict[str, Any]:
        """Return what decides the plan beside the precision."""
        return {
            "device": self._device,
            "tokens": tokens,
            "compiled": self.compiled,
            "raised": self.raised,
        }

    def _scaler_in_use(self) -> bool:
        return self._scaler is not None and self._scaler.is_enabled()

    def _recover(self, step: int, breach: Breach) -> None:
        recipes = recipes_of(self._model)
        changes = self.recovery.go_back(step, breach, recipes)
        self._scale = None  # the scaler may have that of a snapshot
        if not changes:
            none = "no layer: all have the highest precision of the ladder"
            self._events.add(step, "raised", none)
            return
        self._set_phase(self.phase)
        self._events.add(
            step,
            "raised",
            f"precision of {len(changes)} of {len(recipes)} layers",
            layers=[
                f"{name}: {recipes[name].name} -> {recipe.name}" for name, recipe in changes.items()
            ],
        )
