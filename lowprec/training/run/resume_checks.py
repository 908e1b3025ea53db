"""Checks of a run that resumes from a checkpoint, and the record of its configuration.

The resumed run must train the same model with the same kind of optimizer as the run that wrote the
checkpoint. The checks write nothing, and they run before anything is written.
"""

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowprec.config.schema import parse
from lowprec.config.yaml import dump, load_mapping
from lowprec.errors import UserError, shown
from lowprec.files import write_atomically
from lowprec.training.checkpoint import files as checkpoint_files
from lowprec.training.checkpoint.history import REPLACED
from lowprec.training.control.data_order import DataOrder, processes_of
from lowprec.training.file_names import CONFIG
from lowprec.training.log import show_log
from lowprec.training.optim.adamw import OptimizerConfig
from lowprec.training.run.contents import is_finished, past_configs
from lowprec.training.run.models import differences
from lowprec.training.run.resume_changes import changes, check_changes
from lowprec.training.run.training_args import check_trainer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, TrainingArguments

logger = logging.getLogger("lowprec")

_STEERING = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir")
"""Keys of `trainer:` that say where a run writes and how it starts. They are not kept in
config.yaml, so a repetition of the run states them anew."""

_SAME_STATE = ("adamw_torch", "adamw_torch_fused")
"""Optimizers of transformers that can load each other's state."""


def check_steps_left(checkpoint: Path, steps: int) -> None:
    """Raise UserError if a run of `steps` steps has nothing left to do after a complete checkpoint.

    A run that was killed between its last step and its summary has its end left to do.
    """
    done = checkpoint_files.global_step(checkpoint)
    finished = is_finished(checkpoint_files.run_of(checkpoint))
    if done > steps or (done == steps and finished):
        state = ", and the run is finished" if finished else ""
        raise UserError(
            f"trainer.resume_from_checkpoint: {checkpoint} is the end of its run, after {done} "
            f"steps{state}; to resume from it, raise trainer.max_steps (or num_train_epochs, in a "
            "run without max_steps)"
        )


def check_same_model(
    checkpoint: Path,
    config: "PretrainedConfig",
    data: dict[str, Any],
    *,
    any_vocabulary: bool = False,
) -> None:
    """Raise UserError if a checkpoint holds another model than this run trains.

    Args:
        checkpoint: Checkpoint to resume from.
        config: Configuration of this run's model.
        data: Configuration of this run. It is compared instead if the checkpoint has no
            configuration of a model, as a sharded one.
        any_vocabulary: Flag: the size of the vocabulary is not known yet, so it is not compared.
    """
    if (checkpoint / "config.json").is_file():
        changed = differences(config, checkpoint, ("vocab_size",) if any_vocabulary else ())
        if changed:
            details = "; ".join(
                f"{name} is {before} there, {now} here" for name, (before, now) in changed.items()
            )
            raise UserError(f"model: {checkpoint} is of another model: {details}")
        return
    before = _config_until(checkpoint)
    if before is not None and before.get("model") != data.get("model"):
        raise UserError(
            f"model: {checkpoint} is of another model, {before.get('model')}, not "
            f"{data.get('model')}"
        )


def check_same_optimizer(checkpoint: Path, data: dict[str, Any]) -> None:
    """Raise UserError if this run's optimizer can't load the optimizer state of a checkpoint."""
    before = _config_until(checkpoint)
    if before is None or not any(checkpoint.glob("optimizer*")):
        # A checkpoint of trainer.save_only_model has no optimizer state: the optimizer starts anew.
        return
    old, new = (
        parse(OptimizerConfig, config.get("optimizer") or {}, "optimizer")
        for config in (before, data)
    )
    for name in ("weights", "moments"):
        was = getattr(old, name)
        now = getattr(new, name)
        if was != now:
            raise UserError(
                f"optimizer.{name}: {checkpoint} has the state of an optimizer with {was}, not "
                f"{now}; resume with {name}: {was}"
            )
    was, now = (
        (config.get("trainer") or {}).get("optim") or _SAME_STATE[0] for config in (before, data)
    )
    if was != now and not {was, now} <= set(_SAME_STATE):
        raise UserError(
            f"trainer.optim: {checkpoint} has the state of {was}, not of {now}; resume with "
            f"trainer.optim={was}"
        )


def check_settings(checkpoint: Path, data: dict[str, Any], args: "TrainingArguments") -> None:
    """Raise UserError if a setting has changed that must not: see `resume_changes.py`.

    Args:
        checkpoint: Checkpoint to resume from.
        data: Configuration of this run.
        args: Arguments of this run's Trainer.
    """
    before = _config_until(checkpoint)
    if before is not None:
        old, new = (_with_types(config) for config in (before, data))
        changed = changes(old, new)
        check_changes(changed, (_schedule(old), _schedule(new)))
    if not args.ignore_data_skip:
        _check_order(checkpoint, before, DataOrder.of(args))


def _check_order(checkpoint: Path, before: dict[str, Any] | None, order: DataOrder) -> None:
    """Raise UserError if this run would go on at another place of the data."""
    held = checkpoint_files.state_of(checkpoint).get("stateful_callbacks") or {}
    state = held.get(order.name)
    processes = processes_of(checkpoint)
    if state is None and before is not None and processes is not None:
        # A checkpoint of an earlier version.
        trainer = _with_types(before).get("trainer") or {}
        state = {
            "batch": trainer.get("per_device_train_batch_size", 8),
            "accumulation": trainer.get("gradient_accumulation_steps", 1),
            "processes": processes,
            "seed": trainer.get("data_seed") or trainer.get("seed", 42),
        }
    if state is not None:
        try:
            order.load_state_dict(state)
        except UserError as error:
            raise UserError(f"trainer.{error}") from None


def check_same_tokenizer(checkpoint: Path, tokenizer: Any, data: dict[str, Any]) -> None:
    """Raise UserError if the ids of a run's tokens stand for other text than those of a
    checkpoint."""
    file = checkpoint / "tokenizer.json"
    if file.is_file():
        here = json.loads(tokenizer.backend_tokenizer.to_str())
        try:
            there = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file}: holds no tokenizer: {error}") from None
        parts = ("model", "added_tokens", "normalizer", "pre_tokenizer")
        same = all(here.get(part) == there.get(part) for part in parts)
    else:
        before = _config_until(checkpoint) or data
        same = not {"data.tokenizer", "data.vocab_size"} & changes(before, data).keys()
    if not same:
        raise UserError(
            f"data.tokenizer: {checkpoint} was trained with another tokenizer, whose tokens have "
            f"other ids; resume with data.tokenizer={checkpoint if file.is_file() else 'it'}"
        )


def check_sharding(checkpoint: Path, sharded: bool) -> None:
    """Raise UserError if a checkpoint is sharded and the run is not, or the other way round."""
    has_shards = any(checkpoint.glob("pytorch_model_fsdp*"))
    if has_shards and not sharded:
        raise UserError(
            f"trainer.fsdp: {checkpoint} is sharded, and this run is not; resume with the "
            "trainer.fsdp and the processes that it was written with"
        )
    if sharded and not has_shards:
        raise UserError(
            f"trainer.fsdp: {checkpoint} is not sharded, and this run is; resume without "
            "trainer.fsdp, or begin a run from it by model.path"
        )


def _with_types(data: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration whose settings below `trainer` have the types of their fields."""
    try:
        trainer = check_trainer(data.get("trainer") or {})
    except UserError:  # An earlier version may have written it.
        return data
    return {**data, "trainer": trainer}


def _schedule(data: dict[str, Any]) -> str:
    schedule = (data.get("trainer") or {}).get("lr_scheduler_type") or "linear"
    return getattr(schedule, "value", schedule)


def write_config(directory: Path, checkpoint: Path | None, data: dict[str, Any]) -> None:
    """Write config.yaml. If a resumed run had another configuration until its checkpoint, keep that
    one as config-<step>.yaml and log what changed. Those of later steps are set aside."""
    now = _without_steering(data)
    before = None if checkpoint is None else _config_until(checkpoint)
    if checkpoint is not None and before is not None and before != now:
        step = checkpoint_files.global_step(checkpoint)
        changed = changes(_with_types(before), _with_types(now))
        show_log()
        logger.warning(
            "the run resumes with another configuration than until step %d: %s changed",
            step,
            ", ".join(f"{path} {shown(was)} -> {shown(to)}" for path, (was, to) in changed.items())
            or "its words",
        )
        write_atomically(directory / f"config-{step}.yaml", dump(before))
    write_atomically(directory / CONFIG, dump(now))
    for until, path in past_configs(directory):
        # Later ones are those of steps that the run takes again.
        if checkpoint is not None and until > checkpoint_files.global_step(checkpoint):
            os.replace(path, path.with_name(REPLACED + path.name))


def _config_until(checkpoint: Path) -> dict[str, Any] | None:
    """Return the configuration that a run had until it wrote `checkpoint`; None if it is not
    kept."""
    directory = checkpoint_files.run_of(checkpoint)
    step = checkpoint_files.global_step(checkpoint)
    # config-<N>.yaml exists if the run has resumed with another configuration after step N.
    later = [path for until, path in past_configs(directory) if until >= step]
    path = later[0] if later else directory / CONFIG
    return _without_steering(load_mapping(path)) if path.is_file() else None


def _without_steering(data: dict[str, Any]) -> dict[str, Any]:
    """Return a run's configuration without the keys in `_STEERING`."""
    trainer = {
        key: value for key, value in (data.get("trainer") or {}).items() if key not in _STEERING
    }
    return {**data, "trainer": trainer} if "trainer" in data else data
