"""Low precision in a training loop of one's own on Accelerate.

    model, optimizer, loader = prepare(accelerator, model, optimizer, loader, precision="fp8_blockwise", steps=1000)

takes the place of `accelerator.prepare`. From then on every `optimizer.step()` that is a step (not one within gradient accumulation) moves
the schedule on, lets the guard look, and counts what loss scaling skips. `accelerator.save_state` and `load_state` keep and restore all of
it. What to log is in `controller(accelerator).scalars()`.
"""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from lowprec.errors import UserError
from trainers.amp import check_weights, configure
from trainers.callback import show_log
from trainers.controller import PrecisionController
from trainers.wandb_log import log_plan

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
        accelerator: an accelerate.Accelerator; its mixed precision is autocast's. fp16 (which it refuses on a CPU) gets the precision's
            loss scaling.
        model, optimizer: not prepared yet; the optimizer may hold the model's parameters already, which stay the same objects.
        others: data loaders, learning-rate schedulers.
        precision: a recipe name, a mapping, a YAML path, a Recipe or a PrecisionConfig. `guard.data` must be "skip": only the loop itself
            could go back in its data.
        steps: optimizer steps of the whole run; phases that end at a share of it need it.
        tokens: of a forward pass on one device; phases in tokens need it.
        compiled: whether the blocks are compiled.
        directory: where events.jsonl is written; nowhere if left out.
    Returns:
        What `accelerator.prepare` returns for them, in the same order.
    Raises:
        UserError: the precision is wrong, or does not fit this run.
    """
    controller = PrecisionController(precision, tokens=tokens, compiled=compiled)
    guard = controller.config.guard
    if guard is not None and guard.data == "replay":
        raise UserError("precision.guard.data: replay needs a loop that can go back in its data; in one of your own take skip")
    if isinstance(model, list | tuple) or not isinstance(model, nn.Module):
        raise UserError(f"prepare takes one model after the accelerator, got {type(model).__name__}")
    if accelerator.mixed_precision == "fp16":
        check_weights(model)
    plan = controller.convert(model, accelerator.device)
    if accelerator.is_main_process:
        show_log()
        logger.info("%s", plan)
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
    prepared = accelerator.prepare(model, optimizer, *others)
    if accelerator.scaler is not None:
        configure(accelerator.scaler, controller.config.loss_scaling)
    per_step = tokens and tokens * accelerator.num_processes * accelerator.gradient_accumulation_steps
    run = _Run(
        controller,
        model=accelerator.unwrap_model(prepared[0]),
        optimizer=prepared[1],
        settings={
            "total_steps": steps,
            "tokens_per_step": per_step,
            "scaler": accelerator.scaler,
            "directory": None if directory is None else Path(directory),
            "main": accelerator.is_main_process,
        },
    )
    accelerator.register_for_checkpointing(run)
    if accelerator.is_main_process:
        log_plan(plan)
    return prepared


def controller(accelerator: Any) -> PrecisionController:
    """What `prepare` made for it: plan, phase, events, scalars. UserError if that was never called."""
    for registered in accelerator._custom_objects:
        if isinstance(registered, _Run):
            return registered.controller
    raise UserError("this Accelerator has no precision: call trainers.accelerate.prepare first")


class _Run:
    """Counts the optimizer's steps and drives the controller by them; what a checkpoint holds of both."""

    def __init__(self, controller: PrecisionController, model: nn.Module, optimizer: Any, settings: dict[str, Any]) -> None:
        self.controller, self.model, self.optimizer, self.settings = controller, model, optimizer, settings
        self.step = 0
        self._begin()
        inner = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            if optimizer.gradient_state.sync_gradients:
                self.step += 1
                controller.after_step(self.step, skipped=optimizer.step_was_skipped)
                controller.before_step(self.step)
            return result

        optimizer.step = step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, **self.controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.controller.load_state_dict(state)
        self._begin()

    def _begin(self) -> None:
        self.controller.start(self.model, self.optimizer, step=self.step, **self.settings)
        self.controller.before_step(self.step)
