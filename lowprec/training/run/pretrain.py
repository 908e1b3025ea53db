"""A training run from its configuration: data, model, precision, the Trainer, and the result.

`plan_run` tells what a run would do, without data and without weights; `train` does it.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    get_scheduler,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from lowprec.attention import parse
from lowprec.attention.hf import attach, describe
from lowprec.conversion.convert import make_plan
from lowprec.conversion.plan import PartPlan, Plan
from lowprec.distributed.fsdp2 import check_can_shard, check_offloaded, offloads
from lowprec.distributed.processes import (
    distributed_state,
    name_the_cpu,
    on_main_process,
    use_one_gpu,
    world_size,
)
from lowprec.errors import UserError
from lowprec.files import keep_lines_until, write_atomically
from lowprec.integrations.compile import compile_blocks
from lowprec.integrations.liger import apply_liger, plan_liger
from lowprec.training.callback import LowPrecisionCallback
from lowprec.training.checkpoint import files as checkpoint_files
from lowprec.training.control.guard import check_replay
from lowprec.training.control.schedule import make_schedule
from lowprec.training.data import DataConfig, LoadedData, load_data
from lowprec.training.data.corpus import open_corpus
from lowprec.training.file_names import METRICS, MODEL, SUMMARY
from lowprec.training.log import show_log
from lowprec.training.optim.adamw import OptimizerConfig, build, prepare_weights
from lowprec.training.run import directory as run_directory
from lowprec.training.run import resume_checks
from lowprec.training.run.config import RunConfig
from lowprec.training.run.machine import (
    device_name,
    flops_per_token,
    keep_freed_memory,
    peak_memory_bytes,
    resolve_device,
)
from lowprec.training.run.models import build_config, build_model, check_length
from lowprec.training.run.progress import MetricsCallback, ProgressBar, ThroughputCallback
from lowprec.training.run.training_args import (
    autocast_settings,
    check_trainer,
    total_steps,
    training_arguments,
)
from lowprec.training.run.validation import validate

logger = logging.getLogger("lowprec")


def plan_run(config: RunConfig) -> Plan:
    """The plan of a run on this machine; the model is built on the meta device, its data is not
    touched.

    Raises:
        UserError: whatever `train` would find wrong before it loads data.
    """
    device_type = resolve_device(config.device)
    settings = check_trainer(config.trainer)
    model_config = build_config(config.model, _planned_vocabulary(config.data))
    check_length(model_config, config.data.seq_len)
    with torch.device("meta"):
        model = build_model(
            config.model.model_copy(update={"path": None}), model_config, attn_implementation="sdpa"
        )
    # Of each phase, for its errors; the first one's is shown.
    plan, *_ = (
        make_plan(model, phase, device=device_type, **_pass(config, settings))
        for phase in config.precision.phases()
    )
    _, autocast = _autocast(config, settings, device_type)
    liger = plan_liger(
        model,
        config.kernels.liger,
        device_type=device_type,
        compiled_blocks=config.compile == "blocks",
        head_is_low_precision=_head_is_low_precision(model, plan),
    )
    if (steps := settings.get("max_steps", -1)) > 0:
        make_schedule(
            config.precision.schedule, steps, _tokens_per_step(config, settings), warn=False
        )
    return plan.with_parts(_parts(config, device_type, autocast, liger))


def train(config: RunConfig, data: dict[str, Any], config_path: str | Path) -> dict[str, Any]:
    """Run it. Returns what summary.json holds.

    Args:
        config: the run.
        data: the same as plain data, kept with the run.
        config_path: where it came from; its name names the run's directory.
    Raises:
        UserError: before any training, for whatever is wrong in the configuration, the data or the
            output directory.
    """
    # Whatever can be wrong without the data is found before it is loaded, which may take long.
    plan_run(config)
    settings = check_trainer(config.trainer)
    reads = [Path(path) for path in (config.model.path, config.data.tokenizer) if path is not None]
    _, found = run_directory.locate(config_path, settings, reads=reads)
    if found is not None:
        if (steps := settings.get("max_steps", -1)) > 0:
            resume_checks.check_steps_left(found, steps)
        resume_checks.check_same_model(
            found,
            build_config(config.model, 1),
            data,
            any_vocabulary=config.model.preset is not None,
        )
        resume_checks.check_same_optimizer(found, data)

    device_type = resolve_device(config.device)
    autocast, autocast_part = _autocast(config, settings, device_type)
    args = training_arguments(settings, device_type, autocast)
    if (gpus := use_one_gpu(args)) > 1:
        show_log()
        logger.warning(
            "one process trains on one GPU of %d; torchrun or accelerate launch take all "
            "(docs/training.md)",
            gpus,
        )
    name_the_cpu(args)
    check_can_shard(args)
    if offloads(args):
        check_offloaded(
            scaled=args.fp16,
            low_bit=config.optimizer != OptimizerConfig(),
            keeps=config.precision.keeps_state,
        )
    check_replay(config.precision.guard, args)
    if _optimizer(config.optimizer, args) is None:
        _check_optimizer(args)
    _check_scheduler(args)
    disable_progress_bar()  # transformers' own: the run has one
    if device_type == "cpu":
        keep_freed_memory()
    processes = distributed_state(device_type)
    loaded = _load(config, processes)
    model_config = build_config(config.model, len(loaded.tokenizer))
    steps = total_steps(args, len(loaded.train))
    make_schedule(config.precision.schedule, steps, _tokens_per_step(config, settings), warn=False)
    if found is not None:
        resume_checks.check_same_model(found, model_config, data)
        resume_checks.check_steps_left(found, steps)
    model, liger = _build(config, settings, device_type, model_config, loaded)

    # Nothing has been written so far.
    directory, checkpoint = on_main_process(
        processes, lambda: run_directory.prepare(config_path, settings, reads=reads)
    )
    args.output_dir = str(directory)
    if args.should_save:
        resume_checks.write_config(directory, checkpoint, data)
        if checkpoint is not None:
            show_log()
            logger.info(
                "going on from %s, after step %d",
                checkpoint,
                checkpoint_files.global_step(checkpoint),
            )
            keep_lines_until(directory / METRICS, checkpoint_files.global_step(checkpoint))
    if "wandb" in args.report_to:
        os.environ.setdefault("WANDB_DIR", str(directory))

    parts = _parts(config, device_type, autocast_part, liger)
    low_precision = LowPrecisionCallback(config.precision, parts=parts, **_pass(config, settings))
    trainer = _trainer(model, args, loaded, low_precision, config)
    start, first_step = (
        time.perf_counter(),
        0 if checkpoint is None else checkpoint_files.global_step(checkpoint),
    )
    low_precision.train(trainer, str(checkpoint) if checkpoint is not None else None)
    wall_s = time.perf_counter() - start
    if trainer.state.global_step == first_step:
        raise UserError(
            f"data: {len(loaded.train)} sequences are no batch of {args.train_batch_size}: no step "
            "was trained"
        )
    tokens = (
        (trainer.state.global_step - first_step)
        * args.train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size
    )
    summary = {
        "recipe": config.precision.recipe.name if config.precision.recipe else None,
        "steps": trainer.state.global_step,
        **validate(trainer, loaded.token_bytes),
        "tokens_per_second": tokens * config.data.seq_len / wall_s if tokens else None,
        "peak_memory_bytes": peak_memory_bytes(device_type),
        "wall_s": wall_s,
        "device": device_name(device_type),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": loaded.stats,
        "plan": low_precision.plan.totals() if low_precision.plan else None,
        "skipped_steps": low_precision.controller.skipped_steps,
        "recoveries": low_precision.controller.recoveries,
        "output_dir": str(directory),
    }
    if args.should_save:
        write_atomically(directory / SUMMARY, json.dumps(summary, indent=1) + "\n")
    if args.save_strategy != "no":
        _save_model(trainer, directory / MODEL)
    return summary


def _load(config: RunConfig, processes: Any) -> LoadedData:
    with processes.main_process_first() if processes else contextlib.nullcontext():
        return load_data(
            config.data, document_positions=parse(config.attention.mask).needs_documents
        )


def _build(
    config: RunConfig,
    settings: dict[str, Any],
    device_type: str,
    model_config: Any,
    loaded: LoadedData,
) -> tuple[Any, Any]:
    """The model with its attention, fused kernels and compiled blocks, in high precision; what is
    used of Liger."""
    check_length(model_config, config.data.seq_len)
    if config.model.preset is not None:
        model_config.bos_token_id = model_config.eos_token_id = loaded.tokenizer.eos_token_id
    set_seed(settings.get("seed", 42))
    model = build_model(config.model, model_config, attn_implementation="sdpa")
    prepare_weights(model, config.optimizer)
    attach(model, parse(config.attention.mask))
    plan = make_plan(model, config.precision, device=device_type, **_pass(config, settings))
    liger = apply_liger(
        model,
        config.kernels.liger,
        device_type=device_type,
        compiled_blocks=config.compile == "blocks",
        head_is_low_precision=_head_is_low_precision(model, plan),
    )
    compile_blocks(model, config.compile, device_type)
    return model, liger


def _trainer(
    model: Any, args: Any, loaded: Any, low_precision: LowPrecisionCallback, config: RunConfig
) -> Trainer:
    throughput = ThroughputCallback(
        config.data.seq_len, flops_per_token(model, config.data.seq_len)
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=loaded.train,
        eval_dataset=loaded.validation,
        processing_class=loaded.tokenizer,
        data_collator=default_data_collator,
        callbacks=[low_precision, throughput, MetricsCallback(), ProgressBar()],
        optimizer_cls_and_kwargs=_optimizer(config.optimizer, args),
    )
    for replaced in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(replaced)
    # What adds to the logs comes before what shows them (wandb, say, which the Trainer puts first).
    callbacks = trainer.callback_handler.callbacks
    callbacks.sort(key=lambda callback: callback is not throughput)
    low_precision.put_first(trainer)
    return trainer


def _optimizer(config: OptimizerConfig, args: Any) -> Any:
    """What the Trainer makes its optimizer of; None for its own choice."""
    if config == OptimizerConfig():
        return None
    if not args.optim.startswith("adamw_torch"):
        raise UserError(
            "optimizer: these weights and moments are AdamW's, but trainer.optim is "
            f"{args.optim.value}"
        )

    class AdamW(torch.optim.Optimizer):  # anything else the Trainer takes for a factory
        def __new__(cls, parameters: Any, **settings: Any) -> Any:
            return build(config, parameters, **settings)

    betas = (args.adam_beta1, args.adam_beta2)
    settings = {
        "lr": args.learning_rate,
        "betas": betas,
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    weight = torch.nn.Linear(1, 1)
    prepare_weights(weight, config)
    AdamW(weight.parameters(), **settings)  # what is wrong in it shows now
    return AdamW, settings


def _check_optimizer(args: Any) -> None:
    """UserError if the Trainer can't make this optimizer of its own, which it would tell once the
    run's directory is there."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        if "pass a" not in str(error):  # some want the model, which is not built yet
            raise UserError(
                f"trainer.optim: {args.optim.value}: {' '.join(str(error).split())}"
            ) from None


def _check_scheduler(args: Any) -> None:
    """UserError for a learning-rate schedule that lacks a setting, or has one that it does not
    know."""
    optimizer, steps = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate), 1000
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            args.get_warmup_steps(steps),
            steps,
            args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"trainer.lr_scheduler_kwargs: {args.lr_scheduler_type.value}: "
            f"{' '.join(str(error).split())}"
        ) from None


def _save_model(trainer: Trainer, directory: Path) -> None:
    if not trainer.is_fsdp_enabled:
        trainer.save_model(str(directory))
        return
    # `save_model` writes nothing where checkpoints are sharded; every rank takes part in gathering
    # the weights.
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.args.should_save:
        trainer._save(str(directory), state_dict=weights)


def _autocast(
    config: RunConfig, settings: dict[str, Any], device_type: str
) -> tuple[dict[str, Any], PartPlan]:
    return autocast_settings(
        settings,
        config.precision.recipe,
        device_type,
        bf16_weights=config.optimizer.weights == "bf16",
    )


def _pass(config: RunConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """What decides where FP8 pays: the tokens of a forward pass, and whether the blocks are
    compiled."""
    batch = settings.get(
        "per_device_train_batch_size", TrainingArguments.per_device_train_batch_size
    )
    return {"tokens": batch * config.data.seq_len, "compiled": config.compile == "blocks"}


def _tokens_per_step(config: RunConfig, settings: dict[str, Any]) -> int:
    accumulated = settings.get(
        "gradient_accumulation_steps", TrainingArguments.gradient_accumulation_steps
    )
    return _pass(config, settings)["tokens"] * accumulated * world_size()


def _parts(config: RunConfig, device_type: str, autocast: PartPlan, liger: Any) -> list[PartPlan]:
    """What the plan shows besides the linear layers."""
    kernel, reason = describe(config.attention.mask, device_type)
    used = ", ".join(liger.applied)
    reasons = "; ".join(
        f"{names}: {why}"
        for why, names in _grouped((k.reason, k.name) for k in liger.kernels if not k.used).items()
    )
    blocks = "each decoder block by torch.compile, in place" if config.compile == "blocks" else ""
    parts = [
        autocast,
        PartPlan(name="attention", choice=f"{config.attention.mask} by {kernel}", reason=reason),
        PartPlan(name="liger", choice=used or "none", reason=reasons),
        PartPlan(name="compile", choice=config.compile, reason=blocks),
    ]
    precision, guard = config.precision, config.precision.guard
    if precision.schedule:
        recipes = [
            "none" if phase.recipe is None else phase.recipe.name for phase in precision.phases()
        ]
        phases = (
            f"{recipe} until {phase.until}"
            for recipe, phase in zip(recipes, precision.schedule, strict=True)
        )
        parts.append(PartPlan(name="schedule", choice=", ".join(phases)))
    if guard is not None:
        does = f"snapshots every {guard.snapshot_every} steps, ladder {' < '.join(guard.ladder)}, data {guard.data}"
        parts.append(PartPlan(name="guard", choice=f"on: {does}"))
    return parts


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """{key: "a, b"} from (key, a), (key, b)."""
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return {key: ", ".join(values) for key, values in groups.items()}


def _head_is_low_precision(model: Any, plan: Plan) -> bool:
    head = model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if module is head}
    return any(layer.converted and layer.name in names for layer in plan.layers)


def _planned_vocabulary(config: DataConfig) -> int:
    """The vocabulary that `config`'s tokenizer will have at most, without training it."""
    from lowprec.training.data.tokenizer import load_tokenizer

    if config.tokenizer == "bpe":
        return config.vocab_size
    return len(load_tokenizer(config, open_corpus(config)))
