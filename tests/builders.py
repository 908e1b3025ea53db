"""Tiny Llamas, data for them, and Trainers of both on a CPU."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_config(**settings: Any) -> LlamaConfig:
    """Return a Llama's configuration of `SIZES`; `settings` replace or add fields."""
    return LlamaConfig(**{**SIZES, "use_cache": False, **settings})


def tiny_llama(seed: int | None = 0, **settings: Any) -> LlamaForCausalLM:
    """Return a Llama of `tiny_config(**settings)`, its weights drawn from `seed`, or with None from torch's generator as it is."""
    if seed is not None:
        torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**settings))


def counting(rows: int = 32) -> list[dict[str, torch.Tensor]]:
    """Return `rows` sequences of 32 tokens that count from 0 to 63 and again, for a vocabulary of 64."""
    return [{"input_ids": row, "labels": row} for row in torch.arange(64).repeat(rows // 2).view(rows, 32)]


def prose(rows: int) -> list[dict[str, torch.Tensor]]:
    """Return `rows` windows of 64 letters, modulo 64, of a text that no model of this size learns by heart."""
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long() % 64
    return [{"input_ids": row, "labels": row} for row in text[: 64 * rows].view(rows, 64)]


def small_trainer(
    folder: Path, *callbacks: TrainerCallback, model: Any = None, data: Any = None, evaluated: Any = None, **arguments: Any
) -> Trainer:
    """Return a Trainer of twelve steps on a CPU, of `tiny_llama()` on `counting()`; `arguments` are further TrainingArguments."""
    settings: dict[str, Any] = {"max_steps": 12, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "report_to": "none"}
    settings |= {"logging_steps": 1, "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    model = tiny_llama() if model is None else model
    datasets: dict[str, Any] = {"train_dataset": data or counting(), "eval_dataset": evaluated}
    return Trainer(model, args, callbacks=list(callbacks), **datasets)


def losses(trainer: Trainer) -> dict[int, float]:
    """Return the loss by step; the later one of a step that was logged twice."""
    return {record["step"]: record["loss"] for record in trainer.state.log_history if "loss" in record}
