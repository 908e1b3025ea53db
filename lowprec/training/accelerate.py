"""Low precision in a training loop of one's own on Accelerate.

    model, optimizer, loader = prepare(
        accelerator, model, optimizer, loader, precision="fp8_blockwise", steps=1000
    )

takes the place of `accelerator.prepare`. From then on each call of `optimizer.step()` that really
steps (outside of gradient accumulation) advances the schedule, is checked by the guard, and is
counted if loss scaling skips it. `accelerator.save_state` and `load_state` save and restore all of
it, and `load_state` refuses files that hold code. `controller(accelerator).scalars()` returns what
to log.
"""

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DynamoBackend
from torch import nn

from lowprec.config.schema import whole_number
from lowprec.conversion.config import Precision
from lowprec.distributed.fsdp2 import (
    SUMS_IN_FP32,
    check_offloaded,
    check_strategy,
    is_offloaded,
    sum_in_fp32,
)
from lowprec.distributed.processes import on_main_process
from lowprec.errors import UserError
from lowprec.training.checkpoint.accelerate_state import save_whole
from lowprec.training.checkpoint.folders import check_model
from lowprec.training.checkpoint.no_code import check_no_code
from lowprec.training.checkpoint.of_accelerate import (
    check_size_of_a_step,
    folder_to_load,
    is_of_a_run,
    place_in_older,
    size_of_a_step,
)
from lowprec.training.checkpoint.saved import read_json, save_json
from lowprec.training.control.controller import PrecisionController
from lowprec.training.control.references import References
from lowprec.training.control.schedule import make_schedule
from lowprec.training.control.wandb_log import log_plan
from lowprec.training.log import show_plan
from lowprec.training.optim.adamw import is_low_bit, keeps_bf16_weights
from lowprec.training.optim.loss_scaling import check_weights, configure, prepare_to_load

logger = logging.getLogger("lowprec")

_RUNS: "weakref.WeakKeyDictionary[Accelerator, _Run]" = weakref.WeakKeyDictionary()
"""The run of each Accelerator that `prepare` was called with."""


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *others: Any,
    precision: Precision,
    steps: int | None = None,
    tokens: int | None = None,
    compiled: bool = False,
    references: Iterable[nn.Module] = (),
    directory: str | Path | None = None,
) -> tuple[Any, ...]:
    """Convert `model` in place, then `accelerator.prepare(model, optimizer, *others)`.

    Args:
        accelerator: its mixed precision is autocast's. fp16 gets the precision's loss scaling.
        model: not prepared yet.
        optimizer: not prepared yet. It may hold the model's parameters already; they stay the same
            objects.
        others: data loaders, learning-rate schedulers.
        precision: a recipe name, a mapping, a YAML path, a Recipe or a PrecisionConfig.
            `guard.data` must be "skip": only the loop itself could go back in its data.
        steps: number of optimizer steps of the whole run; phases that end at a share of it need it.
        tokens: number of tokens in a forward pass on one device, if known. It decides which layers
            FP8 pays for (see `lowprec.convert`).
        compiled: whether the blocks are compiled, if the accelerator's dynamo backend does not say
            so.
        references: models that the loop compares `model` with. They are converted with it, in each
            phase, and put into `eval()` without gradients.
        directory: where events.jsonl is written; None: nowhere.
    Returns:
        The result of `accelerator.prepare` for model, optimizer and others, in this order.
    Raises:
        UserError: the precision is wrong, or does not fit this run. Nothing has been converted or
            prepared then.
    """
    steps = None if steps is None else whole_number(steps, "steps: the steps of the run")
    dynamo = accelerator.state.dynamo_plugin
    compiled = compiled or (dynamo is not None and dynamo.backend != DynamoBackend.NO)
    controller = PrecisionController(precision, tokens=tokens, compiled=compiled)
    _check(accelerator, model, optimizer, controller)
    per_step = (
        controller.tokens
        and controller.tokens * accelerator.num_processes * accelerator.gradient_accumulation_steps
    )
    make_schedule(controller.config.schedule, steps, per_step)
    References(controller, references).begin()
    plan = controller.convert(model, accelerator.device)
    changed = sum_in_fp32(accelerator.state, model)
    if accelerator.is_main_process:
        show_plan(plan)
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
            "called": prepared[0],
        },
    )
    run.keep_with(accelerator)
    if accelerator.is_main_process:
        log_plan(plan)
    return prepared


def controller(accelerator: Accelerator) -> PrecisionController:
    """Return the controller that `prepare` made: it has the plan, the phase, events and scalars.
    Raise UserError if `prepare` was never called."""
    run = _find(accelerator)
    if run is None:
        raise UserError(
            "this Accelerator has no precision: call lowprec.training.accelerate.prepare first"
        )
    return run.controller


def steps_done(accelerator: Accelerator) -> int:
    """Return the number of finished optimizer steps, also of those before `load_state`. Raise
    UserError if `prepare` was never called."""
    controller(accelerator)
    run = _find(accelerator)
    assert run is not None
    return run.step


def _find(accelerator: Accelerator) -> "_Run | None":
    return _RUNS.get(accelerator)


def _check(
    accelerator: Accelerator, model: Any, optimizer: Any, controller: PrecisionController
) -> None:
    """Raise UserError for a run that can't be trained."""
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
    """A run on Accelerate: counts the optimizer's steps and drives the controller by them.

    `accelerator.save_state` writes it to `lowprec_run.json`. An object that is registered with the
    accelerator would be in a pickle, which Accelerate executes when it loads it.
    """

    name = "lowprec_run"
    """Name of its file in a checkpoint."""

    def __init__(
        self,
        controller: PrecisionController,
        model: nn.Module,
        optimizer: Any,
        settings: dict[str, Any],
    ) -> None:
        self.controller = controller
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.step = 0
        """Number of finished optimizer steps."""
        self._size: dict[str, int | None] = {}
        """The size of an optimizer step; `keep_with` sets it."""
        self._counts = True
        """Flag: calls of the optimizer's step are steps of the run."""
        self._begin()
        inner = optimizer.step

        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            if self._counts and optimizer.gradient_state.sync_gradients:
                self.step += 1
                self._compare_length()
                controller.after_step(self.step)
                controller.before_step(self.step)
            return result

        # It has to be a method: a learning-rate scheduler that is made later looks for its
        # function.
        optimizer.step = MethodType(step, optimizer)

    def keep_with(self, accelerator: Accelerator) -> None:
        """Add this run to the accelerator's checkpoints."""
        _RUNS[accelerator] = self
        self._size = size_of_a_step(accelerator, self.controller.tokens)
        accelerator.save_state = self._saving(accelerator, accelerator.save_state)
        accelerator.load_state = self._loading(accelerator, accelerator.load_state)

    def state_dict(self) -> dict[str, Any]:
        scaler = self.settings["scaler"]
        return {
            "step": self.step,
            "scaler": None if scaler is None else scaler.state_dict(),
            "size_of_a_step": self._size,
            **self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        scaler = self.settings["scaler"]
        self.step = state["step"]
        if scaler is not None and state["scaler"]:
            # Accelerate has loaded it, too. But under FSDP2 it did so before the empty step of the
            # optimizer (see `_uncounted`), which changes the scaler.
            scaler.load_state_dict(state["scaler"])
            configure(scaler, self.controller.config.loss_scaling, resumed=True)
        self.controller.load_state_dict(state)
        self._begin()

    def _begin(self) -> None:
        self.controller.start(self.model, self.optimizer, step=self.step, **self.settings)
        self.controller.before_step(self.step)

    def _compare_length(self) -> None:
        """Warn if the run goes on after the declared number of steps."""
        declared = self.settings["total_steps"]
        if declared is not None and self.step == declared + 1 and self.settings["main"]:
            logger.warning(
                "steps=%d was declared, and the run goes on: shares of the run's steps were shares "
                "of that number",
                declared,
            )

    def _prepare_to_save(self) -> None:
        if self.settings["scaler"] is not None:
            prepare_to_load(self.settings["scaler"], next(self.model.parameters()).device)
        self.controller.saved(self.step)

    def _saving(
        self, accelerator: Accelerator, save_state: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Return `accelerator.save_state`, which writes a checkpoint whole, with this run."""

        @functools.wraps(save_state)
        def save(*args: Any, **kwargs: Any) -> Any:
            self._prepare_to_save()
            return save_whole(
                accelerator,
                functools.partial(self._uncounted, save_state),
                inspect.signature(save_state).bind(*args, **kwargs),
                add=lambda folder: save_json(self, folder),
                step=self.step,
            )

        return save

    def _loading(
        self, accelerator: Accelerator, load_state: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Return `accelerator.load_state`, which refuses code in the files, and loads this run
        last."""

        @functools.wraps(load_state)
        def load(input_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
            folder = folder_to_load(accelerator, input_dir)
            if folder is None:  # Accelerate says what is wrong.
                return load_state(input_dir, *args, **kwargs)
            on_main_process(
                PartialState() if accelerator.num_processes > 1 else None,
                lambda: check_model(folder, "load_state"),
            )
            check_no_code(folder)
            state = read_json(self, folder)
            if state is not None:
                if not is_of_a_run(state):
                    raise UserError(f"{folder / 'lowprec_run.json'}: is not the state of a run")
                check_size_of_a_step(folder, state.get("size_of_a_step"), self._size)
                self._uncounted(load_state, input_dir, *args, **kwargs)
                self.load_state_dict(state)
                return
            objects = accelerator._custom_objects
            objects.insert(place_in_older(folder), self)
            try:
                self._uncounted(load_state, input_dir, *args, **kwargs)
            finally:
                objects.remove(self)

        return load

    def _uncounted(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `method` without counting steps.

        A sharded optimizer without state makes it by an empty step, on gradients of zero, when it
        is saved or loaded (torch.distributed.checkpoint.state_dict, `_init_optim_state`).
        """
        self._counts = False
        try:
            return method(*args, **kwargs)
        finally:
            self._counts = True
