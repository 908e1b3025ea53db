"""A table of the settings that a run may change when it resumes: applied, refused or harmless.

    APPLIED    the run goes on with the new value from the first step on
    REFUSED    one line says which value to resume with
    CHECKED    another check compares what the setting stands for: the model, the tokenizer, the
               optimizer, the sequences of a step and their order
    HARMLESS   it changes how a run is computed, watched or saved, not what it trains

transformers would take the settings of the optimizer and the learning rate from the checkpoint, in
silence. `lowprec/training/optim/settings.py` applies the new ones.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from lowprec.errors import UserError


class Change(enum.Enum):
    """The treatment of a setting that changes."""

    APPLIED = enum.auto()
    REFUSED = enum.auto()
    CHECKED = enum.auto()
    HARMLESS = enum.auto()


SECTIONS: dict[str, Change] = {
    "model": Change.CHECKED,
    "data": Change.APPLIED,
    "data.tokenizer": Change.CHECKED,
    "data.vocab_size": Change.CHECKED,
    "data.cache_dir": Change.HARMLESS,
    "precision": Change.APPLIED,
    "attention": Change.APPLIED,
    "kernels": Change.HARMLESS,
    "optimizer": Change.CHECKED,
    "compile": Change.HARMLESS,
    "device": Change.HARMLESS,
    "lora": Change.REFUSED,
    "sft": Change.APPLIED,
}
"""The sections of a configuration but `trainer`, and the settings in them that differ from the rest
of their section. New data are read from the place at which the run is."""

_APPLIED = (
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps max_steps num_train_epochs "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor "
    "neftune_noise_alpha average_tokens_across_devices bf16 fp16 tf32 bf16_full_eval "
    "fp16_full_eval ignore_data_skip remove_unused_columns label_names"
)
_REFUSED = (
    "optim_args optim_target_modules auto_find_batch_size dataloader_drop_last "
    "train_sampling_strategy length_column_name accelerator_config parallelism_config deepspeed "
    "metric_for_best_model greater_is_better"
)
_CHECKED = (
    "optim per_device_train_batch_size gradient_accumulation_steps seed data_seed fsdp fsdp_config"
)
_HARMLESS = (
    "output_dir resume_from_checkpoint overwrite_output_dir gradient_checkpointing "
    "gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode "
    "use_liger_kernel liger_kernel_config use_cache torch_empty_cache_steps logging_strategy "
    "logging_steps logging_first_step log_on_each_node logging_nan_inf_filter "
    "include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name "
    "project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps "
    "eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start "
    "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
    "batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node "
    "save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id "
    "hub_strategy hub_always_push hub_revision load_best_model_at_end "
    "restore_callback_states_from_checkpoint full_determinism use_cpu dataloader_num_workers "
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters "
    "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug "
    "skip_memory_metrics do_train do_eval do_predict local_rank"
)

TRAINER: dict[str, Change] = {
    **dict.fromkeys(_APPLIED.split(), Change.APPLIED),
    **dict.fromkeys(_REFUSED.split(), Change.REFUSED),
    **dict.fromkeys(_CHECKED.split(), Change.CHECKED),
    **dict.fromkeys(_HARMLESS.split(), Change.HARMLESS),
}
"""Every field of TrainingArguments."""

_BY_FORMULA = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)
"""Schedules that compute the learning rate from the step alone, so that a new one can be applied.
The others remember the losses that they have seen."""

_OF_THE_RATE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs")


def rule(setting: str) -> Change:
    """Return what becomes of a setting, by its dotted path. A field that the table does not have,
    of a later version of transformers, is refused."""
    section, _, name = setting.partition(".")
    if section == "trainer":
        return TRAINER.get(name, Change.REFUSED)
    return SECTIONS.get(setting, SECTIONS.get(section, Change.REFUSED))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ between two configurations, by their dotted paths:
    (value before, value now). A setting without a value has its default."""
    old = _flat(before)
    new = _flat(now)
    found = {}
    for path in dict.fromkeys((*old, *new)):
        values = [settings.get(path, _default(path)) for settings in (old, new)]
        if values[0] != values[1]:
            found[path] = (values[0], values[1])
    return found


def check_changes(changed: Mapping[str, tuple[Any, Any]], schedules: tuple[str, str]) -> None:
    """Raise UserError for the first setting that must not change.

    Args:
        changed: Result of `changes`.
        schedules: `lr_scheduler_type` before and now.
    """
    for path, (before, now) in changed.items():
        name = path.removeprefix("trainer.")
        by_formula = all(schedule in _BY_FORMULA for schedule in schedules)
        if rule(path) is Change.REFUSED:
            reason = "can't change when a run resumes"
        elif path.startswith("trainer.") and name in _OF_THE_RATE and not by_formula:
            schedule = next(name for name in schedules if name not in _BY_FORMULA)
            reason = f"can't change with the schedule {schedule}, which remembers losses"
        else:
            continue
        raise UserError(
            f"{path}: {reason}: the checkpoint was written with {_yaml(before)}, not {_yaml(now)}; "
            f"resume with {path}={_yaml(before)}"
        )


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a configuration by their dotted paths, two levels deep."""
    found: dict[str, Any] = {}
    for section, value in data.items():
        if isinstance(value, Mapping) and section != "lora":
            found |= {f"{section}.{key}": inner for key, inner in value.items()}
        else:
            found[section] = value
    return found


def _default(path: str) -> Any:
    """Return the value of a setting that a configuration leaves out."""
    section, _, name = path.partition(".")
    if section == "lora":
        return False
    if section != "trainer":
        return None
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    field = fields.get(name)
    if field is None or field.default is dataclasses.MISSING:
        return None
    return field.default


def _yaml(value: Any) -> str:
    """Return a value as a user would write it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
