"""Builds what a run trains with: its examples, its model in high precision, and its Trainer.

The model is converted to low precision later, by LowPrecisionCallback, when it is on its device.
"""

import contextlib
from typing import TYPE_CHECKING

from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from lowprec.attention import parse
from lowprec.attention.hf import attach
from lowprec.integrations.compile import compile_blocks
from lowprec.integrations.liger import LigerPlan, apply_liger
from lowprec.training.callback import LowPrecisionCallback
from lowprec.training.data import LoadedData, load_data
from lowprec.training.optim.adamw import prepare_weights
from lowprec.training.run.config import RunConfig
from lowprec.training.run.machine import flops_per_token
from lowprec.training.run.model_checks import check_forward
from lowprec.training.run.models import build_model, check_length
from lowprec.training.run.optimizer import optimizer_for_trainer
from lowprec.training.run.plan import head_is_low_precision
from lowprec.training.run.progress import MetricsCallback, ProgressBar, ThroughputCallback
from lowprec.training.run.setup import RunSetup

if TYPE_CHECKING:
    from accelerate import PartialState


def load_examples(config: RunConfig, processes: "PartialState | None") -> LoadedData:
    """Return the examples of a run. The main process fills the cache before the others read it."""
    positions = parse(config.attention.mask).needs_documents
    with processes.main_process_first() if processes else contextlib.nullcontext():
        return load_data(config.data, document_positions=positions)


def build_trained_model(
    setup: RunSetup, model_config: PretrainedConfig, data: LoadedData
) -> tuple[PreTrainedModel, LigerPlan]:
    """Return the model of a run in high precision, and the Liger kernels in it.

    The model has its attention mask, its fused kernels and its compiled blocks.
    """
    config = setup.config
    check_length(model_config, config.data.seq_len)
    if config.model.preset is not None:
        model_config.bos_token_id = data.tokenizer.eos_token_id
        model_config.eos_token_id = data.tokenizer.eos_token_id
    set_seed(setup.trainer.get("seed", 42))
    model = build_model(config.model, model_config, attn_implementation="sdpa")
    prepare_weights(model, config.optimizer)
    attach(model, parse(config.attention.mask))
    check_forward(model, config.data.seq_len, config.attention.mask)
    plan = setup.plan_layers(model, config.precision)
    liger = apply_liger(
        model,
        config.kernels.liger,
        device_type=setup.device_type,
        compiled_blocks=setup.compiled,
        head_is_low_precision=head_is_low_precision(model, plan),
    )
    compile_blocks(model, config.compile, setup.device_type)
    return model, liger


def build_trainer(
    config: RunConfig,
    model: PreTrainedModel,
    args: TrainingArguments,
    data: LoadedData,
    low_precision: LowPrecisionCallback,
) -> Trainer:
    """Return the Trainer of a run. It converts `model` by `low_precision`."""
    seq_len = config.data.seq_len
    throughput = ThroughputCallback(seq_len, flops_per_token(model, seq_len))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
        callbacks=[low_precision, throughput, MetricsCallback(), ProgressBar()],
        optimizer_cls_and_kwargs=optimizer_for_trainer(config.optimizer, args),
    )
    for replaced in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(replaced)
    # Callbacks that add to the logs come before those that show them, such as wandb's, which the
    # Trainer puts first.
    callbacks = trainer.callback_handler.callbacks
    callbacks.sort(key=lambda callback: callback is not throughput)
    low_precision.put_first(trainer)
    return trainer
