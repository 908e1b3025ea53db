"""A training loop of one's own on Accelerate, with a precision schedule, a guard, and checkpoints
that resume exactly.

python examples/accelerate_loop.py [fp8_blockwise] [--resume]
accelerate launch --config_file configs/accelerate/fsdp2.yaml examples/accelerate_loop.py
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lowprec.training.accelerate import controller, prepare

STEPS, SAVE_AT, CHECKPOINT = 30, 15, Path("runs/accelerate_loop/checkpoint")

resume = "--resume" in sys.argv
recipe = next((word for word in sys.argv[1:] if not word.startswith("-")), "fp8_blockwise")
precision = {
    "recipe": recipe,
    "schedule": [{"until": "20%", "recipe": "bf16"}, {"until": "100%"}],
    "guard": True,
}

torch.manual_seed(0)
# A sampler that shuffles by its own seed and the epoch: a run that resumes has other random numbers
# when it makes its data loader.
accelerator = Accelerator(
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
).to(accelerator.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
text = torch.frombuffer(bytearray(Path(__file__).read_bytes() * 80), dtype=torch.uint8).long()
loader = DataLoader(list(text.split(128)[:-1]), batch_size=8, shuffle=True)  # pyright: ignore[reportArgumentType]

model, optimizer, loader = prepare(
    accelerator, model, optimizer, loader, precision=precision, steps=STEPS, tokens=8 * 128
)
first = 0
if resume:
    accelerator.load_state(str(CHECKPOINT))
    first = SAVE_AT
    loader = skip_first_batches(loader, first)

for step, batch in enumerate(loader, first + 1):
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        accelerator.print(
            f"step {step}: loss {loss.item():.4f} {controller(accelerator).scalars()}"
        )
    if step == SAVE_AT and not resume:
        accelerator.save_state(str(CHECKPOINT))
    if step == STEPS:
        break
