"""Where a run writes, so that no run ever overwrites another.

runs/<config name>/<number>/
    config.yaml     the resolved configuration; `lowprec train` takes it again
    plan.json       what ran in which precision
    metrics.jsonl   one line per logged step
    events.jsonl    phases of the precision, breaches and recoveries, if there were any
    summary.json    the result
    checkpoint-N/   transformers' checkpoints
    model/          the finished model, for `from_pretrained`, without what only training needs
"""

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowprec.errors import UserError
from lowprec.files import write_atomically

CONFIG, PLAN, METRICS, EVENTS, SUMMARY = "config.yaml", "plan.json", "metrics.jsonl", "events.jsonl", "summary.json"
MODEL = "model"
_CHECKPOINT, _PAST_CONFIG = re.compile(r"checkpoint-(\d+)"), re.compile(r"config-\d+\.yaml")


def locate(config_path: str | Path, trainer: Mapping[str, Any], root: Path = Path("runs")) -> tuple[Path | None, Path | None]:
    """The directory of a run and the checkpoint to resume from; nothing is made or deleted.

    Without `trainer.output_dir` the directory is None, the next number under runs/<config name>; resuming then means the last of those
    that has a checkpoint.

    Raises:
        UserError: the directory holds another run and neither resume nor overwrite was asked for, or there is nothing to resume from.
    """
    resume = trainer.get("resume_from_checkpoint") or False
    output = Path(trainer["output_dir"]) if trainer.get("output_dir") else None
    if isinstance(resume, str):
        checkpoint = Path(resume)
        if not is_whole(checkpoint):
            what = "no checkpoint that was written to its end" if checkpoint.is_dir() else "no such checkpoint"
            last = last_checkpoint(checkpoint)
            hint = f"; did you mean {last}?" if last else "; true takes the last one" if not checkpoint.exists() else ""
            raise UserError(f"trainer.resume_from_checkpoint: {what}: {checkpoint}{hint}")
        if output is not None and output.resolve() != checkpoint.resolve().parent:
            _check_free(output, trainer)
        return _writable(output or checkpoint.parent), checkpoint
    if resume:
        family = root / Path(config_path).stem
        candidates = [output] if output is not None else sorted(_numbered(family), reverse=True)
        for candidate in candidates:
            if (checkpoint := last_checkpoint(candidate)) is not None:
                return candidate, checkpoint
        raise UserError(f"trainer.resume_from_checkpoint: no checkpoint in {output or family}")
    if output is None:
        _writable(root / Path(config_path).stem)
    else:
        _check_free(output, trainer)
        _writable(output)
    return output, None


def _check_free(output: Path, trainer: Mapping[str, Any]) -> None:
    if _holds_run(output) and not trainer.get("overwrite_output_dir"):
        raise UserError(
            f"trainer.output_dir: {output} holds another run; choose another, or say trainer.resume_from_checkpoint=true to go on with "
            "it or trainer.overwrite_output_dir=true to delete it"
        )


def _writable(directory: Path) -> Path:
    """The directory; UserError if nothing can be written there, whether it exists or would have to be made."""
    existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"trainer.output_dir: {directory} can't be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"trainer.output_dir: no permission to write to {existing}")
    return directory


def prepare(config_path: str | Path, trainer: Mapping[str, Any], root: Path = Path("runs")) -> tuple[Path, Path | None]:
    """As `locate`; the directory is made, and a run that may be overwritten is deleted from it."""
    output, checkpoint = locate(config_path, trainer, root)
    try:
        return _made(config_path, output, checkpoint, root)
    except OSError as error:
        raise UserError(f"trainer.output_dir: {error.filename or output} can't be made: {error.strerror}") from None


def _made(config_path: str | Path, output: Path | None, checkpoint: Path | None, root: Path) -> tuple[Path, Path | None]:
    if output is None:
        return _next_number(root / Path(config_path).stem), None
    other = checkpoint is not None and output.resolve() != checkpoint.resolve().parent
    if (checkpoint is None or other) and _holds_run(output):
        _delete_run(output)
    output.mkdir(parents=True, exist_ok=True)
    return output, checkpoint


def check_goes_on(checkpoint: Path, trainer: Mapping[str, Any]) -> None:
    """UserError if a run that resumes from a whole checkpoint has nothing left to do; transformers would do a step too many."""
    from transformers import TrainingArguments

    state = state_of(checkpoint)
    end = trainer.get("max_steps", -1)
    if end <= 0:
        same = trainer.get("num_train_epochs", TrainingArguments.num_train_epochs) <= state["num_train_epochs"]
        end = state["max_steps"] if same else state["global_step"] + 1
    if state["global_step"] >= end:
        raise UserError(
            f"trainer.resume_from_checkpoint: {checkpoint} is the end of its run, after {state['global_step']} steps; more "
            "trainer.max_steps go on from it"
        )


def last_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step in `directory` that was written to its end. (Its trainer_state.json is written last.)"""
    return max(filter(is_whole, checkpoints(directory)), key=step_of, default=None)


STILL_WRITTEN = 5.0
"""Seconds since its last file changed after which nobody writes a checkpoint any more."""


def set_aside_torn(directory: Path) -> list[Path]:
    """Rename the checkpoints in `directory` that were not written to their end, so that nothing resumes from them; their new names.

    One that another process may be writing right now stays.
    """
    renamed = []
    for checkpoint in checkpoints(directory):
        try:
            changed = max(path.stat().st_mtime for path in (checkpoint, *checkpoint.iterdir()))
        except FileNotFoundError:  # a file that another process has just renamed or deleted
            continue
        if not is_whole(checkpoint) and time.time() - changed > STILL_WRITTEN:
            target = checkpoint.with_name(f"torn-{checkpoint.name}")
            if target.exists():
                shutil.rmtree(target)
            renamed.append(checkpoint.rename(target))
    return renamed


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file after `step`, which a run that goes on from there will write again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the line that a kill cut short
            continue
        if isinstance(record, dict) and record.get("step", step) <= step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        state_of(checkpoint)
    except (OSError, ValueError):  # killed before, or in the middle of, writing it
        return False
    return True


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What a whole checkpoint holds of the Trainer's state. OSError or ValueError for one that is not whole."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def global_step(checkpoint: Path) -> int:
    """The step that a whole checkpoint was written after, by what is in it."""
    return state_of(checkpoint)["global_step"]


def step_of(path: Path) -> int:
    """The step that a checkpoint was written after, by its name."""
    match = _CHECKPOINT.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def checkpoints(directory: Path) -> list[Path]:
    return [path for path in directory.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def _holds_run(directory: Path) -> bool:
    return any((directory / name).exists() for name in (CONFIG, PLAN, METRICS, EVENTS, SUMMARY, MODEL)) or bool(checkpoints(directory))


def _delete_run(directory: Path) -> None:
    """Delete what a run writes; other files stay."""
    for path in (*checkpoints(directory), *directory.glob("torn-checkpoint-*"), directory / MODEL):
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob("config-*.yaml"):
        if _PAST_CONFIG.fullmatch(path.name):
            path.unlink()
    for name in (CONFIG, PLAN, METRICS, EVENTS, SUMMARY):
        (directory / name).unlink(missing_ok=True)


def _numbered(family: Path) -> list[Path]:
    return [path for path in family.glob("*") if path.is_dir() and path.name.isdigit()]


def _next_number(family: Path) -> Path:
    family.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in _numbered(family)), default=0)
    while True:
        number += 1
        try:
            os.mkdir(family / f"{number:03d}")  # fails if another process took the number in between
        except FileExistsError:
            continue
        return family / f"{number:03d}"
