"""LowPrecisionCallback: low precision in an ordinary transformers.Trainer.

    trainer = Trainer(model, args, ..., callbacks=[LowPrecisionCallback("fp8_blockwise")])

The callback converts the model when the Trainer hands it over, at the end of its own construction:
the model is on its device then, and no optimizer holds its parameters yet. Everything else that the
precision asks for (schedule, guard, loss scaling, probes) it does from the Trainer's events.
"""

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from transformers import DefaultFlowCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import ParallelMode

from lowprec.conversion.plan import PartPlan, Plan
from lowprec.distributed.fsdp2 import (
    SUMS_IN_FP32,
    check_offloaded,
    check_strategy,
    is_offloaded,
    sum_in_fp32,
)
from lowprec.errors import TrainingStopped, UserError
from lowprec.files import keep_lines_until
from lowprec.training.checkpoint import files as checkpoint_files
from lowprec.training.checkpoint.final_model import follow, set_finished
from lowprec.training.checkpoint.hf_names import accept_original_names
from lowprec.training.checkpoint.recipe_state import (
    has_read_state,
    is_checkpoint_of,
    keep_beside_adapters,
    leaves_state_out,
    load_state,
    save_state,
)
from lowprec.training.control.controller import SETTLED, PrecisionController
from lowprec.training.control.guard import check_replay
from lowprec.training.control.wandb_log import log_events, log_plan, log_scalars
from lowprec.training.file_names import METRICS, PLAN
from lowprec.training.log import show_log
from lowprec.training.optim.adamw import is_low_bit
from lowprec.training.optim.loss_scaling import (
    NO_FP16_ON_A_CPU,
    check_weights,
    configure,
    prepare_to_load,
)

logger = logging.getLogger("lowprec")

STATE = "lowprec"
"""Where the callback's state is in `trainer_state.json`, under `stateful_callbacks`. It is not the
class's name: the Trainer would make a new callback from what it finds under that, without a
model."""


def _set_aside_torn(directory: Path) -> None:
    """Set torn checkpoints aside; one so young that it may be written right now is waited for."""
    end, waits = time.monotonic() + checkpoint_files.STILL_WRITTEN, False
    while True:
        over = time.monotonic() > end
        for torn in checkpoint_files.set_aside_torn(directory):
            logger.warning("a checkpoint that was not written to its end is set aside as %s", torn)
        young = [
            checkpoint
            for checkpoint in checkpoint_files.checkpoints(directory)
            if not checkpoint_files.is_whole(checkpoint)
        ]
        if not young or over:
            return
        if not waits:
            logger.warning(
                "%s may be written right now: waiting %g s for its end",
                young[0],
                checkpoint_files.STILL_WRITTEN,
            )
        waits = True
        time.sleep(min(0.1, checkpoint_files.STILL_WRITTEN))


class LowPrecisionCallback(TrainerCallback):
    """Precision as a property of the run.

    It converts the Trainer's model, logs the plan and writes it to `<output_dir>/plan.json`;
    changes the precision by `schedule`; sets up fp16's loss scaling, logs its scale, and stops at
    its floor; samples quantisation errors (`probe_every`); watches for divergence and recovers
    (`guard`); writes what happened to `<output_dir>/events.jsonl`; and keeps its state in the
    checkpoints, so that a resumed run goes on as it would have. Checkpoints that a kill cut short
    are set aside, so that `resume_from_checkpoint=True` does not take them.

    Args:
        precision: a recipe name, a mapping, a YAML path, a Recipe or a PrecisionConfig.
        parts: what else the plan should show (attention, kernels, ...).
        tokens: of a forward pass on one device, if known; it decides which layers FP8 pays for (see
            `lowprec.convert`), and phases in tokens need it.
        compiled: whether the model's blocks are compiled, if the Trainer's `torch_compile` does not
            say so.
    Raises:
        lowprec.UserError (a ValueError): the precision is wrong; at once where that can be seen
        without the model.
    """

    def __init__(
        self,
        precision: Any,
        *,
        parts: Iterable[PartPlan] = (),
        tokens: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.controller = PrecisionController(
            precision, parts=parts, tokens=tokens, compiled=compiled
        )
        self._told = 0
        self._comes_first = self._begun = self._goes_back = False
        self._hooked: Any = None
        self._checkpoints: list[Path] = []
        """Those that this run wrote or went on from, oldest first."""

    @property
    def precision(self) -> Any:
        return self.controller.config

    @property
    def plan(self) -> Plan | None:
        """Of the present phase; None before the Trainer exists."""
        return self.controller.plan

    def put_first(self, trainer: Any) -> None:
        """Come before the Trainer's other callbacks, so that what this one logs also reaches those
        that it puts first (TensorBoard's).

        But after the one that decides whether a step is saved: the guard may have to take that
            back.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks.sort(
            key=lambda callback: (
                0 if isinstance(callback, DefaultFlowCallback) else 1 if callback is self else 2
            )
        )
        self._comes_first = True

    def train(self, trainer: Any, resume_from_checkpoint: str | bool | None = None) -> Any:
        """`trainer.train()`, and again from the last good checkpoint whenever the guard wants to go
        back to it (`guard.data: replay`).

        Good is one of this run's that three steps without a breach have followed, if there is one:
        a bad update shows only in the steps after it. It is an older one than last time if that did
        not help.

        It also resumes fp16 under FSDP2, which the Trainer alone (transformers 5.17, accelerate
        1.15) fails to do.

        Raises:
            TrainingStopped: there is no such checkpoint.
            ValueError: nor is there one to resume from.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(trainer.args.output_dir)
            if resume_from_checkpoint is None:  # as the Trainer says it
                raise ValueError(
                    f"No valid checkpoint found in output directory ({trainer.args.output_dir})"
                )
        if resume_from_checkpoint:
            begun = Path(resume_from_checkpoint)
            older = [
                path
                for path in checkpoint_files.checkpoints(begun.parent)
                if checkpoint_files.step_of(path) < checkpoint_files.global_step(begun)
            ]
            self._checkpoints = [*older, begun]
        last: tuple[int, Path] | None = None
        while True:
            scaler = trainer.accelerator.scaler
            if resume_from_checkpoint and scaler is not None:
                prepare_to_load(scaler, trainer.args.device)
            try:
                output = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
            finally:
                self._goes_back = False
            before = self.controller.replay_before
            if before is None:
                return output
            directory = Path(trainer.args.output_dir)
            checkpoint = self._to_go_back_to(before, last)
            if checkpoint is None:
                raise TrainingStopped(
                    f"guard: no checkpoint before step {before} in {directory} to go back to: save "
                    "more often"
                )
            last = before, checkpoint
            if trainer.state.is_world_process_zero:
                keep_lines_until(directory / METRICS, checkpoint_files.global_step(checkpoint))
            resume_from_checkpoint, self._goes_back = str(checkpoint), True

    def _to_go_back_to(self, before: int, last: tuple[int, Path] | None) -> Path | None:
        """The checkpoint for a breach at step `before`; `last`: the step of the breach before that,
        and where the run went back to then."""
        steps = {
            path: checkpoint_files.global_step(path)
            for path in self._checkpoints
            if checkpoint_files.is_whole(path)
        }
        whole = sorted(
            (path for path, step in steps.items() if step < before), key=lambda path: steps[path]
        )
        good = [path for path in whole if steps[path] <= before - SETTLED]
        if last is not None and before <= last[0] + SETTLED:  # the same trouble once more
            good = [path for path in good if steps[path] < steps[last[1]]]
        return good[-1] if good else whole[0] if whole else None

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if args.should_save:
            _set_aside_torn(Path(args.output_dir))
        if args.world_size > 1:  # nobody looks for the last checkpoint before
            args.distributed_state.wait_for_everyone()
        if getattr(control, "_lowprec", self) is not self:
            raise UserError(
                "this Trainer has two LowPrecisionCallbacks: one decides the precision of its model"
            )
        if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
            raise UserError(
                f"one process with {args.n_gpu} GPUs: the Trainer would copy the model to all of "
                "them in every step (nn.DataParallel), and "
                "what the layers of a recipe keep would be lost with the copies; start the program "
                "by torchrun or accelerate launch, or on "
                "one GPU by CUDA_VISIBLE_DEVICES=0"
            )
        accelerator = AcceleratorState()
        check_strategy(accelerator)
        if is_offloaded(accelerator):
            check_offloaded(scaled=args.fp16, keeps=self.controller.config.keeps_state)
        control._lowprec = self
        self._hook(args, model)
        self.controller.compiled = self.controller.compiled or bool(args.torch_compile)
        plan = self.controller.convert(model, args.device)
        changed = sum_in_fp32(accelerator, model)
        if state.is_world_process_zero:
            show_log()
            logger.info("%s", plan)
            if args.fsdp and not accelerator.is_fsdp2:
                logger.warning(
                    "fsdp: Accelerate shards on GPUs only; here each process has the whole model"
                )
            if changed:
                logger.info(SUMS_IN_FP32)

    def _hook(self, args: Any, model: Any) -> None:
        if args.fp16:
            check_weights(model)
            if args.device.type == "cpu":
                raise UserError(NO_FP16_ON_A_CPU)
        accept_original_names(model)
        follow(model)
        keep_beside_adapters(model)
        self._hooked = model

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        controller, scaler = self.controller, getattr(optimizer, "scaler", None)
        held = state.stateful_callbacks.get(STATE) if state.global_step else None
        if scaler is not None:
            configure(scaler, controller.config.loss_scaling, resumed=bool(state.global_step))
        check_replay(controller.config.guard, args)
        if is_offloaded(AcceleratorState()):
            check_offloaded(low_bit=is_low_bit(optimizer))
        if model is not self._hooked:  # the Trainer's model_init has made another one
            self._hook(args, model)
            if state.global_step and controller.has_state:
                raise UserError(
                    "a model of model_init loads its checkpoint before it is converted, without "
                    "what its recipe keeps: give the Trainer a "
                    "model instead"
                )
        begins = (
            not state.global_step and not self._goes_back
        )  # although the run before may have stopped to go back
        if begins:
            self._checkpoints = []
        if held is not None:
            controller.load_state_dict(held)
        elif begins or controller.replay_before is None:
            controller.forget()
            self._told = 0
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
            directory=Path(args.output_dir),
            main=state.is_world_process_zero,
            items_of_all_ranks=args.average_tokens_across_devices,
        )
        if not has_read_state(model) and state.global_step and leaves_state_out(model):
            self._load_left_out(model, args, state)
        self._keep(state)
        if state.is_world_process_zero and controller.plan is not None:
            controller.plan.save(Path(args.output_dir) / PLAN)
        self._begun = True
        set_finished(model, False)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (
            self._begun
            and "wandb" in args.report_to
            and state.is_world_process_zero
            and self.controller.plan is not None
        ):
            # Not when training begins: wandb's callback, if it comes after this one, has not
            # started the run then.
            log_plan(self.controller.plan, state.global_step)
        self._begun = False
        phase = self.controller.phase
        self.controller.before_step(state.global_step)
        if self.controller.phase != phase:
            self._tell(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.controller.after_step(state.global_step)
        self._tell(args, state)
        self._keep(state)
        if self.controller.replay_before is not None:
            # Whatever is due at this step would keep or judge weights that are given up.
            control.should_training_stop, control.should_save, control.should_evaluate = (
                True,
                False,
                False,
            )
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.controller.replay_before is not None:  # what an epoch's end makes due, too
            control.should_save = control.should_evaluate = False
        return control

    def on_save(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.controller.saved(state.global_step)
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._checkpoints = [path for path in self._checkpoints if path != checkpoint] + [
            checkpoint
        ]
        if args.should_save and leaves_state_out(model) and type(model).__name__.startswith("FSDP"):
            save_state(model, checkpoint)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        values = self.controller.scalars()
        logs |= values
        if state.log_history:
            state.log_history[-1].update(values)
        if (
            values
            and "wandb" in args.report_to
            and state.is_world_process_zero
            and not self._comes_first
        ):
            log_scalars(values, state.global_step)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.controller.stop()
        set_finished(model, self.controller.replay_before is None)

    def _load_left_out(self, model: Any, args: Any, state: Any) -> None:
        here = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        found = [
            path for path in (*reversed(self._checkpoints), here) if is_checkpoint_of(path, state)
        ]
        if not any(load_state(model, path) for path in found):
            logger.warning(
                "the checkpoint holds adapters only: rounding keys and histories of amaxes begin "
                "anew"
            )

    def _keep(self, state: Any) -> None:
        """The state goes into whatever checkpoint is written next."""
        state.stateful_callbacks[STATE] = self.controller.state_dict()

    def _tell(self, args: Any, state: Any) -> None:
        """Bring the plan on disk and wandb up to date with what has happened."""
        events = self.controller.events[self._told :]
        if not events:
            return
        self._told = len(self.controller.events)
        if not state.is_world_process_zero or self.controller.plan is None:
            return
        self.controller.plan.save(Path(args.output_dir) / PLAN)
        if "wandb" in args.report_to:
            log_events(events, self.controller.plan)
