"""Logs of a run in a Trainer beyond the Trainer's own: the plan on disk, and the plan, events and
scalars in Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lowprec.training.control.controller import PrecisionController
from lowprec.training.control.wandb_log import log_events, log_plan, log_scalars
from lowprec.training.file_names import PLAN

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments


class TrainerLog:
    """Keeps the plan on disk, and the active wandb run, up to date with the controller."""

    def __init__(self, controller: PrecisionController) -> None:
        self.controller = controller
        self.comes_first = False
        """Flag: the callback comes before those that log, so its scalars reach them."""
        self._plan_is_due = False
        """Flag: wandb has not got the plan of this run yet."""
        self._shown = 0
        """Number of events that the plan on disk and wandb know of."""

    def begin(self, args: "TrainingArguments", state: "TrainerState") -> None:
        """Write the plan of a run that begins or resumes."""
        self._save_plan(args, state)
        self._plan_is_due = True

    def forget(self) -> None:
        """Begin another run, whose events are counted from 0."""
        self._shown = 0

    def show_plan(self, args: "TrainingArguments", state: "TrainerState") -> None:
        """Log the plan to wandb when the run's first step begins. (When training begins is too
        early: if wandb's callback comes later, it has not started the wandb run then.)"""
        plan = self.controller.plan
        if self._plan_is_due and _logs_to_wandb(args, state) and plan is not None:
            log_plan(plan, state.global_step)
        self._plan_is_due = False

    def show_events(self, args: "TrainingArguments", state: "TrainerState") -> None:
        """Write the plan again, and log new events to wandb, if there are any."""
        events = self.controller.events[self._shown :]
        if not events:
            return
        self._shown = len(self.controller.events)
        self._save_plan(args, state)
        plan = self.controller.plan
        if _logs_to_wandb(args, state) and plan is not None:
            log_events(events, plan)

    def show_scalars(
        self, values: Mapping[str, float], args: "TrainingArguments", state: "TrainerState"
    ) -> None:
        """Log scalars to wandb, unless its callback gets them in the Trainer's logs."""
        if values and _logs_to_wandb(args, state) and not self.comes_first:
            log_scalars(values, state.global_step)

    def _save_plan(self, args: "TrainingArguments", state: "TrainerState") -> None:
        if state.is_world_process_zero and self.controller.plan is not None:
            assert args.output_dir is not None
            self.controller.plan.save(Path(args.output_dir) / PLAN)


def _logs_to_wandb(args: "TrainingArguments", state: "TrainerState") -> bool:
    return state.is_world_process_zero and "wandb" in (args.report_to or ())
