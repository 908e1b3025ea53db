"""LowPrecisionCallback: low precision in an ordinary transformers.Trainer.

    trainer = Trainer(model, args, ..., callbacks=[LowPrecisionCallback("fp8_blockwise")])

The callback converts the model when the Trainer hands it over, at the end of its own construction:
the model is on its device then, and no optimizer holds its parameters yet. Everything else that the
precision asks for (schedule, guard, loss scaling, probes) it does from the Trainer's events.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lowprec.conversion.config import Precision
from lowprec.conversion.plan import PartPlan, Plan
from lowprec.distributed.fsdp2 import (
    check_offloaded,
    is_offloaded,
)
from lowprec.errors import UserError
from lowprec.training.checkpoint.ended import EndedRun
from lowprec.training.checkpoint.owner import Owner, output_dir, set_aside_torn_if_free
from lowprec.training.checkpoint.running_loss import RunningLoss
from lowprec.training.checkpoint.saved import (
    load_from_trainer_state,
    put_into_trainer_state,
    write_valid_json,
)
from lowprec.training.checkpoint.saving import CheckpointWriter
from lowprec.training.checkpoint.torn import check_resumed
from lowprec.training.control.controller import PrecisionController
from lowprec.training.control.data_order import DataOrder
from lowprec.training.control.finite import LossSum
from lowprec.training.control.guard import check_replay
from lowprec.training.control.precision import PrecisionConfig
from lowprec.training.control.references import check_precomputed
from lowprec.training.control.replay import Replay
from lowprec.training.control.stop_signals import StopSignals
from lowprec.training.control.stop_trainer import SignalStop
from lowprec.training.control.trained_model import TrainedModel, add_recipe_state
from lowprec.training.control.trainer_facts import called_module, calling_trainer, check_alone
from lowprec.training.control.trainer_log import TrainerLog
from lowprec.training.optim.adamw import is_low_bit
from lowprec.training.optim.loss_scaling import configure
from lowprec.training.optim.settings import apply_when_resumed

if TYPE_CHECKING:
    from transformers import Trainer


class LowPrecisionCallback(TrainerCallback):
    """Precision as a property of the run.

    It converts the Trainer's model, logs the plan and writes it to `<output_dir>/plan.json`. It
    changes the precision by `schedule`. It sets up fp16's loss scaling, logs its scale, and stops
    at its floor. It samples quantisation errors (`probe_every`), watches for divergence and
    recovers (`guard`), and writes events to `<output_dir>/events.jsonl`. It keeps its state in the
    checkpoints, so that a resumed run continues as it would have. It sets aside checkpoints that a
    kill cut short, and those of steps that the run takes again, so that
    `resume_from_checkpoint=True` does not take them. A Trainer that saves checkpoints holds the
    lock of its `output_dir` while it trains.

    Args:
        precision: a recipe name, a mapping, a YAML path, a Recipe or a PrecisionConfig.
        parts: other rows of the plan (attention, kernels, ...).
        tokens: number of tokens in a forward pass on one device, if known. It decides which layers
            FP8 pays for (see `lowprec.convert`).
        compiled: whether the model's blocks are compiled, if neither the Trainer's `torch_compile`
            nor the modules say so.
        references: models that the Trainer compares its model with (DPO's `ref_model`), which are
            converted with it. The Trainer's own copies are found when training begins. Name one
            that FSDP2 shards, or that computes before (`precompute_ref_log_probs`).
    Raises:
        lowprec.UserError (a ValueError): the precision is wrong; raised here if that can be seen
            without the model.
    """

    def __init__(
        self,
        precision: Precision | None = None,
        *,
        parts: Iterable[PartPlan] = (),
        tokens: int | None = None,
        compiled: bool = False,
        references: Iterable[nn.Module] = (),
    ) -> None:
        if precision is None:
            raise UserError(
                "LowPrecisionCallback: in which precision? Give the Trainer an instance, such as "
                'callbacks=[LowPrecisionCallback("fp8_blockwise")]'
            )
        self.controller = PrecisionController(
            precision, parts=parts, tokens=tokens, compiled=compiled
        )
        self._trained = TrainedModel(self.controller, references, compiled)
        self._replay = Replay(self.controller)
        self._log = TrainerLog(self.controller)
        self._stop = SignalStop(lambda: self._losses.hopeless is not None)
        self._writer = CheckpointWriter(add_recipe_state)
        self._owner = Owner()
        self._ended = EndedRun()
        self._losses = LossSum()

    @property
    def precision(self) -> PrecisionConfig:
        return self.controller.config

    @property
    def plan(self) -> Plan | None:
        """The plan of the present phase; None before the Trainer exists."""
        return self.controller.plan

    def put_first(self, trainer: "Trainer") -> None:
        """Move this callback before the Trainer's other ones, so that its scalars reach those that
        the Trainer puts first (TensorBoard's, for one).

        It stays behind the one that decides whether a step is saved: the guard may have to take
        that back.
        """

        def place(callback: TrainerCallback) -> int:
            if isinstance(callback, DefaultFlowCallback):
                return 0
            return 1 if callback is self else 2

        trainer.callback_handler.callbacks.sort(key=place)
        self._log.comes_first = True

    def train(
        self,
        trainer: "Trainer",
        resume_from_checkpoint: str | bool | None = None,
        *,
        signals: StopSignals | None = None,
        resume_command: str | None = None,
    ) -> Any:
        """Call `trainer.train()`, and call it again from the last good checkpoint whenever the
        guard asks for that (`guard.data: replay`).

        A checkpoint is good if this run wrote or resumed from it, and three steps without a breach
        have followed: a bad update shows only in the steps after it. If there is none, an older one
        is taken. If the same breach comes back, the next one is older, too.

        This method also resumes fp16 under FSDP2, which the Trainer alone (transformers 5.17,
        accelerate 1.15) fails to do.

        Args:
            trainer: the Trainer that has this callback.
            resume_from_checkpoint: as for `trainer.train`.
            signals: handlers of SIGINT, SIGTERM and SIGUSR1, after which the run finishes its step,
                saves and ends. None: signals act as they do without this callback.
            resume_command: what the run names then, to resume it.
        Returns:
            The result of `trainer.train`.
        Raises:
            StoppedBySignal (a SystemExit): a signal has come, and a checkpoint is saved.
            TrainingStopped: there is no checkpoint to go back to, or the weights are not finite any
                more.
            ValueError: there is no checkpoint to resume from.
        """
        self._owner.take(trainer.args)
        try:
            self._writer.take_over(trainer)
            with (
                self._losses.raised_at_the_end(),
                self._stop.watch(trainer, signals, resume_command),
            ):
                return self._replay.train(trainer, resume_from_checkpoint)
        finally:
            self._owner.release()

    # The Trainer's events, in their order

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.should_save:
            set_aside_torn_if_free(output_dir(args))
        if args.world_size > 1:  # no rank looks for the last checkpoint before
            args.distributed_state.wait_for_everyone()  # pyright: ignore[reportOptionalMemberAccess]
        trainer = calling_trainer()
        check_alone(trainer, LowPrecisionCallback)
        check_precomputed(trainer, self.controller)
        if trainer is not None:
            self._writer.take_over(trainer)
            apply_when_resumed(trainer)
        self._trained.take(args, state, model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        controller = self.controller
        self._owner.take(args)
        trainer = calling_trainer()
        check_alone(trainer, LowPrecisionCallback)
        self._trained.begin(args, state, model, trainer)
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None:
            configure(scaler, controller.config.loss_scaling, resumed=bool(state.global_step))
        check_replay(controller.config.guard, args)
        if is_offloaded(AcceleratorState()):
            check_offloaded(low_bit=is_low_bit(optimizer))
        if state.global_step:
            check_resumed(state, self._resumed_from(args, state), args)
        self._owner.go_on(state, args)
        self._ended.begin(trainer, state)
        if trainer is not None:
            self._writer.take_over(trainer)
            load_from_trainer_state(RunningLoss(trainer), state)
        order = DataOrder.of(args, getattr(trainer, "_train_batch_size", None))
        if state.global_step and not args.ignore_data_skip:
            load_from_trainer_state(order, state)
        put_into_trainer_state(order, state)
        self._load_own_state(state)
        tokens_per_step = (
            controller.tokens
            and controller.tokens * args.gradient_accumulation_steps * args.world_size
        )
        controller.start(
            model,
            optimizer,
            step=state.global_step,
            total_steps=state.max_steps,
            tokens_per_step=tokens_per_step,
            scaler=scaler,
            directory=output_dir(args),
            main=state.is_world_process_zero,
            items_of_all_ranks=args.average_tokens_across_devices,
            called=called_module(trainer, model),
        )
        if self._trained.lacks_recipe_state(state):
            self._trained.load_recipe_state(self._replay.resumed_from(state, output_dir(args)))
        put_into_trainer_state(controller, state)
        write_valid_json(state)
        self._losses.begin(model, compiled=bool(args.torch_compile))
        self._log.begin(args, state)
        self._trained.set_finished(False)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop.begin_step()
        self._log.show_plan(args, state)
        phase = self.controller.phase
        self.controller.before_step(state.global_step)
        if self.controller.phase != phase:
            self._log.show_events(args, state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> TrainerControl:
        self.controller.after_step(state.global_step)
        self._log.show_events(args, state)
        put_into_trainer_state(self.controller, state)
        if self.controller.replay_before is not None:
            # The run goes back: the present weights are neither saved nor evaluated.
            control.should_training_stop = True
            control.should_save = False
            control.should_evaluate = False
        else:
            self._stop.end_step(state, control)
            if control.should_save and not control.should_log:
                guarded = self.precision.guard is not None
                self._losses.stop_if_hopeless(model, state, control, guarded=guarded)
        self._owner.before_save(args, control)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.controller.replay_before is not None:  # an epoch's end may save and evaluate, too
            control.should_save = False
            control.should_evaluate = False
        self._stop.end_epoch(state, control)
        self._owner.before_save(args, control)
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._owner.before_save(args)  # A best result is saved, and no other event tells.
        self._stop.look(state, control)
        return control

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> TrainerControl:
        self.controller.saved(state.global_step)
        checkpoint = output_dir(args) / f"checkpoint-{state.global_step}"
        self._replay.wrote(checkpoint)
        self._writer.complete(checkpoint, model, args, state.global_step)
        self._stop.saved(state, control)
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not {"loss", "train_loss"} & logs.keys():
            return
        values = self.controller.scalars() if "loss" in logs else {}
        if "loss" in logs:
            norm = logs.get("grad_norm")
            guarded = self.precision.guard is not None
            self._losses.stop_if_hopeless(model, state, control, norm, guarded=guarded)
        values |= self._losses.show(logs)
        logs |= values
        if state.log_history:
            state.log_history[-1].update(values)
        self._log.show_scalars(values, args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.controller.stop()
        self._ended.end()
        self._losses.end()
        self._trained.set_finished(self.controller.replay_before is None)
        if not self._replay.runs:
            self._owner.release()
        self._losses.raise_if_hopeless()

    # Inside

    def _load_own_state(self, state: TrainerState) -> None:
        """Load the controller's state from a checkpoint, or begin without one."""
        resumed = bool(state.global_step)
        # The run before may have stopped to go back, and this one may be another run all the same.
        begins = not resumed and not self._replay.goes_back
        if begins:
            self._replay.begin()
        if resumed and load_from_trainer_state(self.controller, state):
            return
        if begins or self.controller.replay_before is None:
            self.controller.forget()
            self._log.forget()

    def _resumed_from(self, args: TrainingArguments, state: TrainerState) -> list[Path]:
        """Return the checkpoints that the Trainer may have resumed from, the most likely first."""
        named = args.resume_from_checkpoint
        found = self._replay.resumed_from(state, output_dir(args))
        return [Path(named), *found] if named and Path(named).is_dir() else found
