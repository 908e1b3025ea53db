"""What a run that goes on from a checkpoint must have in common with the one that wrote it, and
what it keeps of that one.

The checks write nothing, and come before anything is written.
"""

import logging
from pathlib import Path
from typing import Any

from lowprec.config.schema import parse
from lowprec.config.yaml import dump, load_mapping
from lowprec.errors import UserError
from lowprec.files import write_atomically
from lowprec.training.checkpoint import files as checkpoint_files
from lowprec.training.file_names import CONFIG
from lowprec.training.log import show_log
from lowprec.training.optim.adamw import OptimizerConfig
from lowprec.training.run.models import differences

logger = logging.getLogger("lowprec")

_STEERING = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir")
"""What says where a run goes and how it begins; whoever repeats it says it anew."""

_SAME_STATE = ("adamw_torch", "adamw_torch_fused")
"""Optimizers of transformers that go on with each other's state."""


def check_goes_on(checkpoint: Path, steps: int) -> None:
    """UserError if a run of so many steps has nothing left to do after a whole checkpoint;
    transformers would do a step too many."""
    done = checkpoint_files.global_step(checkpoint)
    if done >= steps:
        raise UserError(
            f"trainer.resume_from_checkpoint: {checkpoint} is the end of its run, after {done} "
            "steps; more trainer.max_steps (or "
            "num_train_epochs, in a run without them) go on from it"
        )


def check_same_model(
    checkpoint: Path, config: Any, data: dict[str, Any], *, any_vocabulary: bool = False
) -> None:
    """UserError if a checkpoint is of another model than a run's.

    Args:
        checkpoint: to go on from.
        config: the model's, of transformers.
        data: the run's configuration, which is compared where the checkpoint has no model's
            (sharded ones have none).
        any_vocabulary: the size of the vocabulary is not known yet.
    """
    if (checkpoint / "config.json").is_file():
        changed = differences(config, checkpoint, ("vocab_size",) if any_vocabulary else ())
        if changed:
            what = "; ".join(
                f"{name} is {before} there, {now} here" for name, (before, now) in changed.items()
            )
            raise UserError(f"model: {checkpoint} is of another model: {what}")
        return
    before = _until(checkpoint)
    if before is not None and before.get("model") != data.get("model"):
        raise UserError(
            f"model: {checkpoint} is of another model, {before.get('model')}, not "
            f"{data.get('model')}"
        )


def check_same_optimizer(checkpoint: Path, data: dict[str, Any]) -> None:
    """UserError if the optimizer's state in a checkpoint is not one that a run's optimizer can go
    on with."""
    before = _until(checkpoint)
    if before is None or not any(
        checkpoint.glob("optimizer*")
    ):  # trainer.save_only_model: the optimizer starts anew
        return
    old, new = (
        parse(OptimizerConfig, each.get("optimizer") or {}, "optimizer") for each in (before, data)
    )
    for name in ("weights", "moments"):
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            raise UserError(
                f"optimizer.{name}: {checkpoint} has the state of an optimizer with {was}, not "
                f"{now}; go on with {name}: {was}"
            )
    was, now = (
        (each.get("trainer") or {}).get("optim") or _SAME_STATE[0] for each in (before, data)
    )
    if was != now and not {was, now} <= set(_SAME_STATE):
        raise UserError(
            f"trainer.optim: {checkpoint} has the state of {was}, not of {now}; go on with "
            f"trainer.optim={was}"
        )


def write_config(directory: Path, checkpoint: Path | None, data: dict[str, Any]) -> None:
    """config.yaml; another one that a resumed run had until now becomes config-<step>.yaml."""
    kept, before = _kept(data), None if checkpoint is None else _until(checkpoint)
    if checkpoint is not None and before is not None and before != kept:
        step = checkpoint_files.global_step(checkpoint)
        changed = [
            key for key in dict.fromkeys((*before, *kept)) if before.get(key) != kept.get(key)
        ]
        show_log()
        logger.warning(
            "the run goes on with another configuration than until step %d: %s changed",
            step,
            ", ".join(changed),
        )
        write_atomically(directory / f"config-{step}.yaml", dump(before))
    write_atomically(directory / CONFIG, dump(kept))


def _until(checkpoint: Path) -> dict[str, Any] | None:
    """The configuration of a run until it wrote a checkpoint, if it is there."""
    directory = checkpoint_files.run_of(checkpoint)
    # The first is there if the run has gone on from that step before.
    paths = (
        directory / f"config-{checkpoint_files.global_step(checkpoint)}.yaml",
        directory / CONFIG,
    )
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else _kept(load_mapping(path))


def _kept(data: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without what steers it."""
    trainer = {
        key: value for key, value in (data.get("trainer") or {}).items() if key not in _STEERING
    }
    return {**data, "trainer": trainer} if "trainer" in data else data
