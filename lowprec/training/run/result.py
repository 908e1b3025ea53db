"""The result of a finished run: summary.json and the model."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer

from lowprec.files import to_json, write_atomically
from lowprec.training.callback import LowPrecisionCallback
from lowprec.training.checkpoint.saving import whole_folder
from lowprec.training.control.controller import PrecisionController
from lowprec.training.data import LoadedData
from lowprec.training.file_names import MODEL, SUMMARY, UNFINISHED_SUMMARY
from lowprec.training.run.machine import device_name, peak_memory_bytes
from lowprec.training.run.progress import rows_per_step
from lowprec.training.run.setup import RunSetup
from lowprec.training.run.validation import validate


def summarise(
    setup: RunSetup,
    model: PreTrainedModel,
    trainer: Trainer,
    low_precision: LowPrecisionCallback,
    data: LoadedData,
    *,
    first_step: int,
    wall_s: float,
) -> dict[str, Any]:
    """Return the summary of a run that has trained. Its validation loss is computed now.

    Args:
        first_step: Number of steps before this run resumed, 0 if it did not.
        wall_s: Duration of the training since then [s].
    """
    args = trainer.args
    steps = trainer.state.global_step - first_step
    tokens = steps * rows_per_step(args, trainer.state) * setup.config.data.seq_len
    controller = low_precision.controller
    return {
        **what_ran(controller),
        "steps": trainer.state.global_step,
        **validate(trainer, data.token_bytes),
        "tokens_per_second": tokens / wall_s if tokens else None,
        "peak_memory_bytes": peak_memory_bytes(setup.device_type),
        "wall_s": wall_s,
        "device": device_name(setup.device_type),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": data.stats,
        "plan": low_precision.plan.totals() if low_precision.plan else None,
        "skipped_steps": controller.skipped_steps,
        "recoveries": controller.recoveries,
        "output_dir": str(args.output_dir),
    }


def what_ran(controller: PrecisionController) -> dict[str, Any]:
    """Return the precision of a run for its summary.

    Returns:
        {"asked_recipe": the recipe that the configuration asks for, or None, "recipe": the same if
        any layer ran in it, else None, "ran": the shares of weights and operations by recipe
        (`RanPrecision.shares`), "warnings": the warnings of the last plan}.
    """
    asked = controller.config.recipe
    name = None if asked is None else asked.name
    ran = controller.ran.shares(controller.plan)
    return {
        "asked_recipe": name,
        "recipe": name if name in ran["weights"] else None,
        "ran": ran,
        "warnings": [] if controller.plan is None else list(controller.plan.warnings),
    }


def save_result(trainer: Trainer, summary: dict[str, Any]) -> None:
    """Write the finished model and summary.json into the directory of the run. Every rank takes
    part.

    The model is written whole or not at all, and summary.json after it. Until then the summary has
    another name, which tells a run that resumes that model/ is its own.
    """
    directory = Path(str(trainer.args.output_dir))
    if trainer.args.should_save:
        text = to_json(summary, indent=1) + "\n"
        write_atomically(directory / UNFINISHED_SUMMARY, text)
    if trainer.args.save_strategy != "no":
        with whole_folder(directory / MODEL, args=trainer.args) as folder:
            _save_model(trainer, folder)
    if trainer.args.should_save:
        os.replace(directory / UNFINISHED_SUMMARY, directory / SUMMARY)


def _save_model(trainer: Trainer, directory: Path) -> None:
    """Save the model of a run. Every rank takes part."""
    if not trainer.is_fsdp_enabled:
        trainer.save_model(str(directory))
        return
    # `save_model` writes nothing if checkpoints are sharded. All ranks gather the weights.
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.args.should_save:
        trainer._save(str(directory), state_dict=weights)
