"""A small Trainer on a CPU for the tests: a Llama of two layers that learns to count, or some English."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


def small_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, use_cache=False)
    )


def counting(rows: int = 32) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in torch.arange(64).repeat(rows // 2).view(rows, 32)]


def prose(rows: int) -> list[dict[str, torch.Tensor]]:
    """Windows of a text that no model of this size learns by heart, as letters modulo 64."""
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long() % 64
    return [{"input_ids": row, "labels": row} for row in text[: 64 * rows].view(rows, 64)]


def small_trainer(
    folder: Path, *callbacks: TrainerCallback, model: Any = None, data: Any = None, evaluated: Any = None, **arguments: Any
) -> Trainer:
    settings: dict[str, Any] = {"max_steps": 12, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "report_to": "none"}
    settings |= {"logging_steps": 1, "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    model = small_model() if model is None else model
    datasets: dict[str, Any] = {"train_dataset": data or counting(), "eval_dataset": evaluated}
    return Trainer(model, args, callbacks=list(callbacks), **datasets)


def losses(trainer: Trainer) -> dict[int, float]:
    """By step; of a step that was logged twice, the later."""
    return {record["step"]: record["loss"] for record in trainer.state.log_history if "loss" in record}
