"""A pretraining run, from its configuration to the saved model."""

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from lowprec.distributed.fsdp2 import shards
from lowprec.distributed.processes import distributed_state, is_main_process, on_main_process
from lowprec.errors import TrainingStopped, UserError
from lowprec.training.callback import LowPrecisionCallback
from lowprec.training.checkpoint import files as checkpoint_files
from lowprec.training.checkpoint.folders import check_tokenizer
from lowprec.training.checkpoint.no_code import check_no_code
from lowprec.training.control.stop_signals import StopSignals
from lowprec.training.data import LoadedData
from lowprec.training.log import show_log, show_warnings
from lowprec.training.run import directory as run_directory
from lowprec.training.run import resume_checks
from lowprec.training.run.arguments import make_arguments
from lowprec.training.run.build import build_trained_model, build_trainer, load_examples
from lowprec.training.run.config import RunConfig
from lowprec.training.run.machine import keep_freed_memory
from lowprec.training.run.models import build_config
from lowprec.training.run.plan import plan_parts, plan_run
from lowprec.training.run.result import save_result, summarise
from lowprec.training.run.resume_command import resume_command
from lowprec.training.run.setup import RunSetup
from lowprec.training.run.training_args import total_steps

logger = logging.getLogger("lowprec")


def train(config: RunConfig, data: dict[str, Any], config_path: str | Path) -> dict[str, Any]:
    """Train the run that `config` describes, and return the contents of its summary.json.

    Args:
        config: Configuration of the run.
        data: The same configuration as plain data, which is kept with the run.
        config_path: Path that the configuration came from. Its name names the run's directory.
    Raises:
        UserError: something is wrong in the configuration, the data or the output directory. It is
            raised before any training.
        TrainingStopped: training can't continue.
        StoppedBySignal (a SystemExit): SIGINT, SIGTERM or SIGUSR1 has come, and a checkpoint is
            saved.
    """
    # Everything that can be checked without the data is checked first: loading data takes long.
    plan = plan_run(config, trains=True)
    setup = RunSetup.of(config)
    reads = [Path(path) for path in (config.model.path, config.data.tokenizer) if path is not None]
    if config.data.tokenizer is not None:
        check_tokenizer(Path(config.data.tokenizer), "data.tokenizer")
    _, checkpoint = run_directory.locate(config_path, setup.trainer, reads=reads)
    if checkpoint is not None:
        _check_resumable(setup, checkpoint, data)
    args, autocast = make_arguments(setup)
    if is_main_process():
        show_warnings(plan)

    disable_progress_bar()  # transformers' own bar: the run has one.
    if setup.device_type == "cpu":
        keep_freed_memory()
    processes = distributed_state(setup.device_type)
    examples = load_examples(config, processes)
    model_config = build_config(config.model, len(examples.tokenizer))
    steps = total_steps(args, len(examples.train))
    setup.check_schedule(steps)
    if checkpoint is not None:
        resume_checks.check_same_model(checkpoint, model_config, data)
        resume_checks.check_same_tokenizer(checkpoint, examples.tokenizer, data)
        resume_checks.check_settings(checkpoint, data, args)
        resume_checks.check_steps_left(checkpoint, steps)
    model, liger = build_trained_model(setup, model_config, examples)

    # Nothing has been written so far.
    directory, checkpoint = on_main_process(
        processes, lambda: run_directory.prepare(config_path, setup.trainer, reads=reads)
    )
    try:
        if checkpoint is not None:  # Another process may have gone on until the lock was held.
            resume_checks.check_steps_left(checkpoint, steps)
        _start_directory(args, directory, checkpoint, data)
        low_precision = LowPrecisionCallback(
            config.precision,
            parts=plan_parts(setup, autocast, liger),
            tokens=setup.tokens,
            compiled=setup.compiled,
        )
        trainer = build_trainer(config, model, args, examples, low_precision)
        first_step = 0 if checkpoint is None else checkpoint_files.global_step(checkpoint)
        start = time.perf_counter()
        with StopSignals() as signals:
            low_precision.train(
                trainer,
                None if checkpoint is None else str(checkpoint),
                signals=signals,
                resume_command=resume_command(directory),
            )
            wall_s = time.perf_counter() - start
            if first_step < steps:
                _check_trained(trainer, first_step, examples)

            summary = summarise(
                setup, model, trainer, low_precision, examples, first_step=first_step, wall_s=wall_s
            )
            save_result(trainer, summary)
            _check_finite(trainer, summary)
        return summary
    finally:
        run_directory.release(directory)


def _check_resumable(setup: RunSetup, checkpoint: Path, data: dict[str, Any]) -> None:
    """Raise UserError if the run can't resume from `checkpoint`, as far as the configuration
    shows."""
    check_no_code(checkpoint)
    if setup.max_steps is not None:
        resume_checks.check_steps_left(checkpoint, setup.max_steps)
    # A preset takes its vocabulary from the tokenizer, which is not loaded yet.
    resume_checks.check_same_model(
        checkpoint,
        build_config(setup.config.model, 1),
        data,
        any_vocabulary=setup.config.model.preset is not None,
    )
    resume_checks.check_same_optimizer(checkpoint, data)
    resume_checks.check_sharding(checkpoint, shards(setup.trainer))


def _start_directory(
    args: TrainingArguments, directory: Path, checkpoint: Path | None, data: dict[str, Any]
) -> None:
    """Make `directory` the output of the run, write config.yaml, and set aside what a resumed run
    will do again."""
    args.output_dir = str(directory)
    if args.should_save:
        if checkpoint is not None:
            show_log()
            step = checkpoint_files.global_step(checkpoint)
            logger.info("resuming from %s, after step %d", checkpoint, step)
            run_directory.go_on_from(directory, checkpoint, args.save_total_limit)
        resume_checks.write_config(directory, checkpoint, data)
    if "wandb" in (args.report_to or ()):
        os.environ.setdefault("WANDB_DIR", str(directory))


def _check_finite(trainer: Trainer, summary: dict[str, Any]) -> None:
    """Raise TrainingStopped if the run has ended with a loss that is not finite."""
    last = next((logs["loss"] for logs in reversed(trainer.state.log_history) if "loss" in logs), 0)
    found = {"loss": last, "val_loss": summary["val_loss"]}
    if bad := {name: value for name, value in found.items() if not math.isfinite(value)}:
        losses = " and ".join(f"{name} {value}" for name, value in bad.items())
        raise TrainingStopped(
            f"the run has ended with {losses}; lower the learning rate, take another recipe, or "
            f"let precision.guard: true watch it (results: {summary['output_dir']})"
        )


def _check_trained(trainer: Trainer, first_step: int, examples: LoadedData) -> None:
    """Raise UserError if no step was trained, because the data does not fill a batch."""
    if trainer.state.global_step == first_step:
        raise UserError(
            f"data: {len(examples.train)} sequences are no batch of "
            f"{trainer.args.train_batch_size}: no step was trained"
        )
