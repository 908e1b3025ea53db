"""Low precision in a training loop of one's own on Accelerate.

    model, optimizer, loader = prepare(accelerator, model, optimizer, loader,
    precision="fp8_blockwise", steps=1000)

takes the place of `accelerator.prepare`. From then on every `optimizer.step()` that is a step (not
one within gradient accumulation) moves the schedule on, lets the guard look, and counts what loss
scaling skips. `accelerator.save_state` and `load_state` keep and restore all of it. What to log is
in `controller(accelerator).scalars()`.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn

from lowprec.config.schema import whole_number
from lowprec.distributed.fsdp2 import (
    SUMS_IN_FP32,
    check_offloaded,
    check_strategy,
    is_offloaded,
    sum_in_fp32,
)
from lowprec.errors import UserError
from lowprec.training.control.controller import PrecisionController
from lowprec.training.control.schedule import make_schedule
from lowprec.training.control.wandb_log import log_plan
from lowprec.training.log import show_log
from lowprec.training.optim.adamw import is_low_bit, keeps_bf16_weights
from lowprec.training.optim.loss_scaling import check_weights, configure, prepare_to_load

logger = logging.getLogger("lowprec")


def prepare(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    *others: Any,
    precision: Any,
    steps: int | None = None,
    tokens: int | None = None,
    compiled: bool = False,
    directory: str | Path | None = None,
) -> tuple[Any, ...]:
    """Convert `model` in place, then `accelerator.prepare(model, optimizer, *others)`.

    Args:
        accelerator: an accelerate.Accelerator; its mixed precision is autocast's. fp16 gets the
            precision's loss scaling.
        model, optimizer: not prepared yet; the optimizer may hold the model's parameters already,
            which stay the same objects.
        others: data loaders, learning-rate schedulers.
        precision: a recipe name, a mapping, a YAML path, a Recipe or a PrecisionConfig.
            `guard.data` must be "skip": only the loop itself could go back in its data.
        steps: optimizer steps of the whole run; phases that end at a share of it need it.
        tokens: of a forward pass on one device; phases in tokens need it.
        compiled: whether the blocks are compiled, if the accelerator's dynamo backend does not say
            so.
        directory: where events.jsonl is written; nowhere if left out.
    Returns:
        What `accelerator.prepare` returns for them, in the same order.
    Raises:
        UserError: the precision is wrong, or does not fit this run. Nothing has been converted or
            prepared then.
    """
    steps = None if steps is None else whole_number(steps, "steps: the steps of the run")
    compiled = compiled or accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    controller = PrecisionController(precision, tokens=tokens, compiled=compiled)
    _check(accelerator, model, optimizer, controller)
    per_step = (
        controller.tokens
        and controller.tokens * accelerator.num_processes * accelerator.gradient_accumulation_steps
    )
    make_schedule(controller.config.schedule, steps, per_step)
    plan = controller.convert(model, accelerator.device)
    changed = sum_in_fp32(accelerator.state, model)
    if accelerator.is_main_process:
        show_log()
        logger.info("%s", plan)
        if changed:
            logger.info(SUMS_IN_FP32)
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
    prepared = accelerator.prepare(model, optimizer, *others)
    if accelerator.scaler is not None:
        configure(accelerator.scaler, controller.config.loss_scaling)
    run = _Run(
        controller,
        model=accelerator.unwrap_model(prepared[0], keep_torch_compile=False),
        optimizer=prepared[1],
        settings={
            "total_steps": steps,
            "tokens_per_step": per_step,
            "scaler": accelerator.scaler,
            "directory": None if directory is None else Path(directory),
            "main": accelerator.is_main_process,
        },
    )
    run.keep_with(accelerator)
    if accelerator.is_main_process:
        log_plan(plan)
    return prepared


def controller(accelerator: Any) -> PrecisionController:
    """What `prepare` made for it: plan, phase, events, scalars. UserError if that was never
    called."""
    run = _find(accelerator)
    if run is None:
        raise UserError(
            "this Accelerator has no precision: call lowprec.training.accelerate.prepare first"
        )
    return run.controller


def _find(accelerator: Any) -> "_Run | None":
    return next(
        (registered for registered in accelerator._custom_objects if isinstance(registered, _Run)),
        None,
    )


def _check(accelerator: Any, model: Any, optimizer: Any, controller: PrecisionController) -> None:
    """UserError for what can't be trained."""
    if not isinstance(model, nn.Module):
        raise UserError(
            f"prepare takes one model after the accelerator, got {type(model).__name__}"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            f"prepare takes the model's optimizer after the model, got {type(optimizer).__name__}"
        )
    if _find(accelerator) is not None:
        raise UserError(
            "this Accelerator has a model with a precision already: make another Accelerator for "
            "another model"
        )
    guard = controller.config.guard
    if guard is not None and guard.data == "replay":
        raise UserError(
            "precision.guard.data: replay needs a loop that can go back in its data; in one of "
            "your own take skip"
        )
    check_strategy(accelerator)
    if is_offloaded(accelerator.state):
        check_offloaded(
            scaled=accelerator.mixed_precision == "fp16",
            low_bit=is_low_bit(optimizer),
            keeps=controller.config.keeps_state,
        )
    if (
        accelerator.is_fsdp2
        and accelerator.mixed_precision != "no"
        and keeps_bf16_weights(optimizer)
    ):
        raise UserError(
            f"mixed_precision: {accelerator.mixed_precision}, under which Accelerate's FSDP2 makes "
            "fp32 of this optimizer's bf16 weights; "
            "they compute in bf16 with mixed_precision: no"
        )
    if accelerator.mixed_precision == "fp16":
        check_weights(model)
        if accelerator.scaler is None:
            raise UserError(
                "mixed_precision: Accelerate has neither fp16 autocast nor loss scaling on "
                f"{accelerator.device}; take bf16"
            )


class _Run:
    """Counts the optimizer's steps and drives the controller by them; what a checkpoint holds of
    both."""

    def __init__(
        self,
        controller: PrecisionController,
        model: nn.Module,
        optimizer: Any,
        settings: dict[str, Any],
    ) -> None:
        self.controller, self.model, self.optimizer, self.settings = (
            controller,
            model,
            optimizer,
            settings,
        )
        self.step = 0
        self._counts = True
        self._begin()
        inner = optimizer.step

        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            if self._counts and optimizer.gradient_state.sync_gradients:
                self.step += 1
                controller.after_step(self.step)
                controller.before_step(self.step)
            return result

        # A method, since a learning-rate scheduler that is made after this looks for its function.
        optimizer.step = MethodType(step, optimizer)

    def keep_with(self, accelerator: Any) -> None:
        """Be in the accelerator's checkpoints from now on."""
        accelerator.register_for_checkpointing(self)
        accelerator.save_state = self._aside(accelerator.save_state, self._about_to_save)
        accelerator.load_state = self._aside(accelerator.load_state)

    def state_dict(self) -> dict[str, Any]:
        scaler = self.settings["scaler"]
        return {
            "step": self.step,
            "scaler": None if scaler is None else scaler.state_dict(),
            **self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        scaler = self.settings["scaler"]
        self.step = state["step"]
        if scaler is not None and state["scaler"]:
            # Accelerate has loaded it, too, but under FSDP2 before the step that `_aside` tells of,
            # which moves it on.
            scaler.load_state_dict(state["scaler"])
            configure(scaler, self.controller.config.loss_scaling, resumed=True)
        self.controller.load_state_dict(state)
        self._begin()

    def _begin(self) -> None:
        self.controller.start(self.model, self.optimizer, step=self.step, **self.settings)
        self.controller.before_step(self.step)

    def _about_to_save(self) -> None:
        if self.settings["scaler"] is not None:
            prepare_to_load(self.settings["scaler"], next(self.model.parameters()).device)
        self.controller.saved(self.step)

    def _aside(
        self, method: Callable[..., Any], first: Callable[[], None] = lambda: None
    ) -> Callable[..., Any]:
        """`method` without counting steps: sharded optimizers make their state by a step on
        gradients of zero, when it is saved or loaded before there is any
        (torch.distributed.checkpoint.state_dict, `_init_optim_state`)."""

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            first()
            self._counts = False
            try:
                return method(*args, **kwargs)
            finally:
                self._counts = True

        return wrapped
