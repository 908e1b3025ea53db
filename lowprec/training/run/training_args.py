"""`trainer:` of a run -> transformers.TrainingArguments, checked field by field."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from lowprec.config.schema import parse_value
from lowprec.conversion.plan import PartPlan
from lowprec.distributed.fsdp2 import shards
from lowprec.errors import UserError, nearest
from lowprec.recipe import Recipe
from lowprec.training.optim.loss_scaling import NO_FP16_ON_A_CPU

OWN_KEYS = {"resume_from_checkpoint": bool | str, "overwrite_output_dir": bool}
"""Keys under `trainer:` that steer the run and are no TrainingArguments (the Trainer itself ignores
the first)."""

_WIDER = {"fsdp": bool | str | list[str] | None}
"""Fields that take more than their annotation in TrainingArguments says."""

_DEFAULTS: dict[str, Any] = {"logging_steps": 10, "report_to": "none", "save_total_limit": 2}

_LEAST: dict[str, tuple[float, bool]] = {
    "per_device_train_batch_size": (1, False),
    "per_device_eval_batch_size": (1, False),
    "gradient_accumulation_steps": (1, False),
    "learning_rate": (0, False),
    "weight_decay": (0, False),
    "num_train_epochs": (0, True),
}
"""The least that a setting may be, and whether it must be more: transformers takes what is less,
and fails in the middle."""


def check_trainer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with each value as the type that its field has.

    Raises:
        UserError: unknown field (with the nearest known), value of the wrong type.
    """
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    known = (
        {
            field.name: hints[field.name]
            for field in dataclasses.fields(TrainingArguments)
            if field.init
        }
        | _WIDER
        | OWN_KEYS
    )
    for key in settings:
        if key not in known:
            raise UserError(f"trainer.{key}: unknown key{nearest(key, known)}")
    parsed = {
        key: parse_value(known[key], value, f"trainer.{key}") for key, value in settings.items()
    }
    for key, (lowest, above) in _LEAST.items():
        value = parsed.get(key)
        if isinstance(value, int | float) and (value < lowest or (above and value == lowest)):
            raise UserError(
                f"trainer.{key}: expected a number {'above' if above else 'from'} {lowest:g}, got "
                f"{value}"
            )
    if parsed.get("use_liger_kernel"):
        raise UserError(
            "trainer.use_liger_kernel: say kernels.liger: auto, which knows what a recipe has "
            "converted"
        )
    if parsed.get("max_steps") == 0:
        raise UserError(
            "trainer.max_steps: 0 steps train nothing; `lowprec plan` shows what would be done"
        )
    return parsed


def training_arguments(
    settings: Mapping[str, Any], device_type: str, autocast: Mapping[str, Any]
) -> Any:
    """TrainingArguments for a run on a device; its directory is set when it is known.

    Raises:
        UserError: what TrainingArguments itself refuses.
    """
    from transformers import TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    given = {key: value for key, value in settings.items() if key not in OWN_KEYS} | dict(autocast)
    if given.get("save_strategy") == "no":
        given.setdefault("save_total_limit", None)
    try:
        args = TrainingArguments(**{**_DEFAULTS, **_on(device_type), **given})
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()  # which says if its package is missing
        return args
    except (ValueError, ImportError, TypeError, RuntimeError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from None


def total_steps(args: Any, examples: int) -> int:
    """The optimizer steps of a run on so many training examples, as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = examples
    for size in (args.train_batch_size, args.world_size):  # each rank has as many batches
        batches = batches // size if args.dataloader_drop_last else -(-batches // size)
    return math.ceil(
        args.num_train_epochs * max(1, -(-batches // args.gradient_accumulation_steps))
    )


def _on(device_type: str) -> dict[str, Any]:
    return {"use_cpu": True, "dataloader_pin_memory": False} if device_type == "cpu" else {}


def autocast_settings(
    settings: Mapping[str, Any],
    recipe: Recipe | None,
    device_type: str,
    *,
    bf16_weights: bool = False,
) -> tuple[dict[str, Any], PartPlan]:
    """The Trainer's `bf16` and `fp16` for a run, and what to say of them in the plan.

    On an accelerator the part of the model that has no recipe runs in the recipe's `rest` format,
    unless the user says otherwise. On a CPU 16-bit arithmetic is fast only with hardware for it, so
    autocast is off everywhere and only the linear layers' operands are rounded.

    Args:
        bf16_weights: whether they are kept in bf16. Accelerate makes fp32 of them when it shards
            under autocast, which they can do without.
    Raises:
        UserError: fp16 on a CPU (loss scaling without fp16 arithmetic would be for nothing), or
            both at once; fp16 with bf16 weights that are sharded.
    """
    bf16, fp16 = bool(settings.get("bf16", False)), bool(settings.get("fp16", False))
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
    if (
        not bf16
        and not fp16
        and recipe is not None
        and "bf16" not in settings
        and "fp16" not in settings
    ):
        bf16, fp16 = recipe.rest.name == "bf16", recipe.rest.name == "fp16"
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
    choice = "bf16" if bf16 else "fp16, dynamic loss scaling" if fp16 else "off"
    return {"bf16": bf16, "fp16": fp16}, PartPlan(
        name="autocast", choice=choice, reason=f"by {origin}"
    )
