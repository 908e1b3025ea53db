"""An ordinary transformers Trainer with one line more: LowPrecisionCallback.

python examples/hf_trainer.py fp8_blockwise
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lowprec import LowPrecisionCallback

config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
)
text = torch.frombuffer(bytearray(Path(__file__).read_bytes() * 40), dtype=torch.uint8).long()
rows = [{"input_ids": row, "labels": row} for row in text.split(128)[:-1]]

trainer = Trainer(
    model=LlamaForCausalLM(config),
    args=TrainingArguments(
        output_dir="runs/hf_trainer",
        max_steps=20,
        learning_rate=3e-3,
        logging_steps=5,
        report_to="none",
    ),
    train_dataset=rows,  # pyright: ignore[reportArgumentType]
    callbacks=[LowPrecisionCallback(sys.argv[1] if len(sys.argv) > 1 else "fp8_blockwise")],
)
trainer.train()
