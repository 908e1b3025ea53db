"""Makes TrainingArguments of the `trainer:` section of a run, and checks each field."""

import dataclasses
import math
import os
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowprec.config.schema import parse_value
from lowprec.conversion.plan import PartPlan
from lowprec.distributed.fsdp2 import shards
from lowprec.errors import UserError, nearest
from lowprec.recipe import Recipe
from lowprec.training.optim.loss_scaling import NO_FP16_ON_A_CPU
from lowprec.training.run.trainer_fields import PATHS, check_field

if TYPE_CHECKING:
    from transformers import TrainingArguments

OWN_KEYS = {"resume_from_checkpoint": bool | str, "overwrite_output_dir": bool}
"""Keys below `trainer:` that are not fields of TrainingArguments, with their types. (The Trainer
itself ignores the first one.)"""

_WIDER = {"fsdp": bool | str | list[str] | None}
"""Types of the fields that accept more than their annotation in TrainingArguments."""

_DEFAULTS: dict[str, Any] = {"logging_steps": 10, "report_to": "none", "save_total_limit": 2}


def check_trainer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, each value converted to the type of its field.

    Raises:
        UserError: a key is unknown, or a value has the wrong type or is none that the field may
            have.
    """
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    fields = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    known = {name: hints[name] for name in fields} | _WIDER | OWN_KEYS
    for key in settings:
        if key not in known:
            raise UserError(f"trainer.{key}: unknown key{nearest(key, known)}")
    parsed = {
        key: parse_value(known[key], value, f"trainer.{key}") for key, value in settings.items()
    }
    if parsed.get("max_steps") == 0:
        raise UserError(
            "trainer.max_steps: 0 steps train nothing; `lowprec plan` shows what would be done"
        )
    for key, value in parsed.items():
        check_field(key, known[key], value)
    for key in PATHS:
        if isinstance(parsed.get(key), str):
            parsed[key] = os.path.expanduser(parsed[key])
    if parsed.get("deepspeed"):
        raise UserError("trainer.deepspeed: low precision needs one process, DDP or FSDP2")
    if parsed.get("use_liger_kernel"):
        raise UserError(
            "trainer.use_liger_kernel: say kernels.liger: auto, which knows what a recipe has "
            "converted"
        )
    return parsed


def training_arguments(
    settings: Mapping[str, Any], device_type: str, autocast: Mapping[str, Any]
) -> "TrainingArguments":
    """Return the TrainingArguments of a run. `output_dir` is set later, when it is known.

    Raises:
        UserError: TrainingArguments refuses the settings, or a package of `report_to` is missing.
    """
    from transformers import TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    given = {key: value for key, value in settings.items() if key not in OWN_KEYS} | dict(autocast)
    if given.get("save_strategy") == "no":
        given.setdefault("save_total_limit", None)
    on_cpu = {"use_cpu": True, "dataloader_pin_memory": False} if device_type == "cpu" else {}
    try:
        args = TrainingArguments(**{**_DEFAULTS, **on_cpu, **given})
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()  # It raises if its package is missing.
        return args
    except Exception as error:
        # transformers, Accelerate and the readers of JSON files raise exceptions of many classes.
        known = isinstance(error, ValueError | ImportError | TypeError | RuntimeError)
        kind = "" if known else f"{type(error).__name__}: "
        raise UserError(f"trainer: {kind}{error}") from error


def total_steps(args: "TrainingArguments", examples: int) -> int:
    """Return the number of optimizer steps of a run on `examples` training examples, counted as the
    Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = examples
    # Examples make batches; batches are shared out, the same number to each rank.
    for size in (args.train_batch_size, args.world_size):
        batches = batches // size if args.dataloader_drop_last else -(-batches // size)
    steps_per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * steps_per_epoch)


def autocast_settings(
    settings: Mapping[str, Any],
    recipe: Recipe | None,
    device_type: str,
    *,
    bf16_weights: bool = False,
) -> tuple[dict[str, Any], PartPlan]:
    """Return the Trainer's `bf16` and `fp16` for a run, and their row in the plan.

    On an accelerator the parts of the model without a recipe run in the recipe's `rest` format,
    unless `settings` say otherwise. On a CPU 16-bit arithmetic is fast only with hardware for it.
    So autocast is off there, and only the operands of linear layers are rounded.

    Args:
        bf16_weights: Flag: the weights are kept in bf16. Accelerate would cast them to fp32 when it
            shards under autocast. They do not need autocast.
    Raises:
        UserError: fp16 on a CPU (loss scaling without fp16 arithmetic would have no use), fp16 and
            bf16 together, or fp16 with bf16 weights that are sharded.
    """
    bf16 = bool(settings.get("bf16", False))
    fp16 = bool(settings.get("fp16", False))
    if bf16 and fp16:
        raise UserError("trainer: bf16 and fp16 exclude each other")
    if device_type == "cpu":
        if fp16:
            raise UserError(NO_FP16_ON_A_CPU)
        return {"bf16": False}, PartPlan(
            name="autocast",
            choice="off",
            reason="16-bit arithmetic is emulated on a CPU, in the linear layers alone",
        )
    if recipe is not None and "bf16" not in settings and "fp16" not in settings:
        bf16 = recipe.rest.name == "bf16"
        fp16 = recipe.rest.name == "fp16"
        origin = f"recipe {recipe.name}"
    else:
        origin = "trainer"
    if bf16_weights and shards(settings):
        if fp16:
            raise UserError(
                "optimizer.weights: bf16 weights that FSDP2 shards compute in bf16; take another "
                "recipe than fp16, or weights: fp32"
            )
        return {"bf16": False}, PartPlan(
            name="autocast",
            choice="off",
            reason="the weights are bf16, and FSDP2 keeps them so without it",
        )
    if bf16:
        choice = "bf16"
    elif fp16:
        choice = "fp16, dynamic loss scaling"
    else:
        choice = "off"
    return {"bf16": bf16, "fp16": fp16}, PartPlan(
        name="autocast", choice=choice, reason=f"by {origin}"
    )
