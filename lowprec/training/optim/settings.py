"""New settings of the optimizer and the learning rate, applied to a run that resumes.

The Trainer loads its optimizer and scheduler with all that they held when the checkpoint was
written: the learning rate, its decay, the weight decay. Settings that have changed since would be
ignored in silence.
"""

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger("lowprec")

_SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")
"""Entries of a parameter group that are settings. The others are state, or belong to the kind of
the optimizer."""


def apply_when_resumed(trainer: "Trainer") -> None:
    """Make the optimizer of `trainer` have its own settings after it has loaded a checkpoint.

    The learning rate of the next step is that of the Trainer's schedule at that step, as if the run
    had had these settings from its begin. Moments, and the count of steps, are the checkpoint's.
    """
    if "_load_optimizer_and_scheduler" in vars(trainer):
        return
    load = trainer._load_optimizer_and_scheduler

    @functools.wraps(load)
    def load_and_apply(checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer: Any = trainer.optimizer
        wanted = [_settings(group) for group in optimizer.param_groups]
        load(checkpoint)
        held = [_settings(group) for group in optimizer.param_groups]
        apply_settings(optimizer, trainer.lr_scheduler, wanted)
        if changed := _changed(held, wanted):
            logger.warning("the optimizer's settings from here on: %s", ", ".join(changed))

    trainer._load_optimizer_and_scheduler = load_and_apply


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: _copy(group[name]) for name in _SETTINGS if name in group}


def _changed(held: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[str]:
    """Return a text for each setting that differs."""
    changed = {}
    for old, new in zip(held, wanted, strict=True):
        for name, value in new.items():
            if name in old and old[name] != value:
                label = "learning rate" if name == "initial_lr" else name
                changed[f"{label} {old[name]} -> {value}"] = None
    return list(changed)


def apply_settings(optimizer: Any, scheduler: Any, wanted: list[dict[str, Any]]) -> None:
    """Give the parameter groups of a loaded optimizer the settings `wanted`, one dict a group.

    The learning rate follows from a schedule that computes it from the step alone. Another
    schedule keeps the rate that it was loaded with.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate's wrapper
    by_formula = isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    for group, settings in zip(optimizer.param_groups, wanted, strict=True):
        for name, value in settings.items():
            if by_formula or name != "initial_lr":
                _set(group, name, value)
    if not by_formula:
        return
    scheduler.base_lrs = [_copy(group["initial_lr"]) for group in optimizer.param_groups]
    step = scheduler.last_epoch
    rates = [
        base * factor(step)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        _set(group, "lr", rate)
    scheduler._last_lr = [_copy(group["lr"]) for group in optimizer.param_groups]


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    """Set an entry of a parameter group; a tensor keeps its identity."""
    held = group.get(name)
    if isinstance(held, Tensor):
        held.fill_(float(value))
    else:
        group[name] = _copy(value)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
