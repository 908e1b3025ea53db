"""Checkpoints that `accelerator.save_state` wrote: which one is loaded, and the state of a run in
it."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lowprec.errors import UserError
from lowprec.training.checkpoint.no_code import load_data

logger = logging.getLogger("lowprec")


def folder_to_load(accelerator: Accelerator, input_dir: str | None) -> Path | None:
    """Return the folder that `accelerator.load_state` reads; None if there is none."""
    if input_dir is not None:
        folder = Path(input_dir).expanduser()
        return folder if folder.is_dir() else None
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        return None
    numbers = {}
    for path in Path(str(accelerator.project_dir), "checkpoints").glob("*"):
        if found := re.findall(r"[0-9]+", path.name):
            numbers[path] = int(found[0])
    return max(numbers, key=lambda path: numbers[path], default=None)


def is_of_a_run(state: Mapping[str, Any]) -> bool:
    """Return True if `state` is that of a run."""
    return {"step", "scaler", "skipped_steps", "recoveries", "raised"} <= state.keys()


def place_in_older(folder: Path) -> int:
    """Return the number of this run among the registered objects of a checkpoint in which it is
    one of them, as earlier versions wrote it.

    Raises:
        UserError: it is not among them.
    """
    for path in folder.glob("custom_checkpoint_*.pkl"):
        state = load_data(path)
        if isinstance(state, dict) and is_of_a_run(state):
            return int(path.stem.rpartition("_")[2])
    raise UserError(
        f"{folder}: holds no lowprec_run.json: it was not saved by an Accelerator with a precision"
    )


def size_of_a_step(accelerator: Accelerator, tokens: int | None) -> dict[str, int | None]:
    """Return what makes the size of an optimizer step, to be kept with a checkpoint.

    Args:
        tokens: Number of tokens in a forward pass on one device, if it is known.
    """
    return {
        "tokens": tokens,
        "accumulation": accelerator.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
    }


def check_size_of_a_step(
    folder: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> None:
    """Compare the size of an optimizer step with that of the run that wrote a checkpoint. Log a
    line if it may differ: a loop may give each process another batch.

    Args:
        before: The size then; None if the checkpoint does not have it.
        now: The size of this run's steps.
    Raises:
        UserError: both sizes are known, and they differ.
    """
    if before is None or before == now:
        return
    parts = [each["accumulation"] * each["processes"] for each in (before, now)]
    if before["tokens"] and now["tokens"]:
        sizes = [part * each["tokens"] for part, each in zip(parts, (before, now), strict=True)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{folder}: a step of the checkpoint's run has {sizes[0]} tokens, a step of this "
                f"run {sizes[1]}; resume with {before['tokens']} tokens in a forward pass, "
                f"gradient_accumulation_steps={before['accumulation']} and {before['processes']} "
                "processes, or another product of the same size"
            )
    elif parts[0] != parts[1]:
        logger.warning(
            "%s: a step of the checkpoint's run was %d forward passes over all processes, here it "
            "is %d: batches of the same size make other steps",
            folder,
            *parts,
        )
