"""Low precision in transformers' Trainer: one callback."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lowprec import LowPrecisionCallback

config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
model = LlamaForCausalLM(config)
rows = [{"input_ids": row, "labels": row} for row in torch.arange(256).repeat(64).view(-1, 128)]
args = TrainingArguments("runs/hf_trainer", max_steps=20, logging_steps=5, report_to="none")
callback = LowPrecisionCallback("fp8_blockwise")
Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()  # pyright: ignore[reportArgumentType]
