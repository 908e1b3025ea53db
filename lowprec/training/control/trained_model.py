"""The model of a Trainer: its conversion, early or late, and the hooks that it needs."""

import logging
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.state import AcceleratorState
from torch import nn

from lowprec.distributed.fsdp2 import SUMS_IN_FP32, sum_in_fp32
from lowprec.nn.known import is_fsdp2
from lowprec.recipe.finished import FinishedFlag
from lowprec.training.checkpoint.final_model import follow
from lowprec.training.checkpoint.hf_names import accept_original_names
from lowprec.training.checkpoint.recipe_state import (
    RecipeState,
    StateBesideAdapters,
    keep_beside_adapters,
    leaves_state_out,
)
from lowprec.training.checkpoint.saved import load_tensors, save_tensors
from lowprec.training.control.controller import PrecisionController
from lowprec.training.control.references import References
from lowprec.training.control.trainer_facts import (
    check_can_convert_late,
    check_fp16,
    check_spread,
    sees_compiled,
    state_is_lost,
)
from lowprec.training.log import show_plan

if TYPE_CHECKING:
    from transformers import Trainer, TrainerState, TrainingArguments

logger = logging.getLogger("lowprec")


class TrainedModel:
    """The model that a Trainer trains, and those that it is compared with.

    Args:
        controller: converts them.
        references: see `LowPrecisionCallback`.
        compiled: see `LowPrecisionCallback`.
    """

    def __init__(
        self, controller: PrecisionController, references: Iterable[nn.Module], compiled: bool
    ) -> None:
        self.controller = controller
        self._references = References(controller, references)
        self._declared_compiled = compiled
        self._taken: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """The models that were converted before a Trainer prepared them."""
        self._hooked: nn.Module | None = None
        """The model that has the hooks."""
        self._finished: FinishedFlag | None = None
        """The flag of the hooked model."""
        self._adapters: StateBesideAdapters | None = None
        """Set if the hooked model is one of PEFT's."""

    def take(self, args: "TrainingArguments", state: "TrainerState", model: Any) -> None:
        """Check the Trainer's arguments, convert its model, and log the plan."""
        check_spread(args, keeps=self.controller.config.keeps_state)
        accelerator = AcceleratorState()
        check_fp16(args, model)
        accept_original_names(model)
        self._finished = follow(model)
        self._adapters = keep_beside_adapters(model, self._finished)
        self._hooked = model
        self._references.begin()
        self.controller.compiled = sees_compiled(self._declared_compiled, args, model)
        plan = self.controller.convert(model, args.device)
        changed = sum_in_fp32(accelerator, model)
        self._taken.add(model)
        if state.is_world_process_zero:
            show_plan(plan)
            if args.fsdp and not accelerator.is_fsdp2:
                logger.warning(
                    "fsdp: Accelerate shards on GPUs only; here each process has the whole model"
                )
            if changed:
                logger.info(SUMS_IN_FP32)

    def begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        model: Any,
        trainer: "Trainer | None",
    ) -> None:
        """Convert what the training that begins has, and is not converted yet: another model than
        at first, one of a callback that was added later, references."""
        if model is not self._hooked:
            self._take_late(args, state, model, trainer)
        found = self._references.find(trainer, model)
        if found and state.is_world_process_zero:
            logger.info("%s: converted as the model that it is compared with", ", ".join(found))
        # It may have been compiled since it was converted.
        self.controller.compiled = sees_compiled(self._declared_compiled, args, model, warns=True)

    def set_finished(self, finished: bool) -> None:
        """Set the flag that the model's run has finished."""
        assert self._finished is not None
        self._finished.finished = finished

    def lacks_recipe_state(self, state: "TrainerState") -> bool:
        """Return True if a model that has resumed did not find its recipe state where its weights
        were. It is asked once for each time that training begins."""
        was_read = self._adapters is not None and self._adapters.take_was_read()
        return not was_read and bool(state.global_step) and leaves_state_out(self.controller.model)

    def load_recipe_state(self, checkpoints: Iterable[Path]) -> None:
        """Load the recipe state that lies beside the adapters in the first of `checkpoints` that
        has some; log a warning if none has."""
        state = RecipeState(self.controller.model)
        if not any(load_tensors(state, checkpoint) for checkpoint in checkpoints):
            logger.warning(
                "the checkpoint holds adapters only: rounding keys and amax histories begin anew"
            )

    def _take_late(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        model: Any,
        trainer: "Trainer | None",
    ) -> None:
        """Convert a model that the Trainer has prepared already."""
        known = model in self._taken
        if not known:
            check_can_convert_late(model)
        self.take(args, state, model)
        if not known and state.global_step and self.controller.has_state:
            raise state_is_lost(trainer)


def add_recipe_state(model: Any, folder: Path) -> None:
    """Write recipe state beside the adapters in `folder`, if the Trainer leaves it out."""
    if is_fsdp2(model) and leaves_state_out(model):
        save_tensors(RecipeState(model), folder)
