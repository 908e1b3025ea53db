"""A training loop on Accelerate, with a precision schedule, a guard, and checkpoints that resume
exactly.

python trainers/loop.py [RECIPE] [--resume]
accelerate launch --config_file configs/accelerate/fsdp2.yaml trainers/loop.py
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lowprec.errors import UserError, reported
from lowprec.training.accelerate import controller, prepare, steps_done
from lowprec.training.control.stop_signals import StopSignals

STEPS = 30
SAVE_AT = 15
CHECKPOINT = Path("runs/loop/checkpoint")


def main(arguments: Sequence[str]) -> None:
    """Train a tiny Llama on the text of this file, byte by byte."""
    parser = argparse.ArgumentParser(prog="loop.py", description=main.__doc__)
    parser.add_argument("recipe", nargs="?", default="fp8_blockwise")
    parser.add_argument("--resume", action="store_true", help=f"continue from {CHECKPOINT}")
    given = parser.parse_args(arguments)
    if given.resume and not CHECKPOINT.is_dir():
        raise UserError(f"--resume: no checkpoint in {CHECKPOINT}")
    precision = {
        "recipe": given.recipe,
        "schedule": [{"until": "20%", "recipe": "bf16"}, {"until": "100%"}],
        "guard": True,
    }

    torch.manual_seed(0)
    # The sampler shuffles by its own seed and the epoch, since a run that resumes has drawn other
    # random numbers when it makes its data loader.
    data = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    accelerator = Accelerator(dataloader_config=data)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes() * 60), dtype=torch.uint8).long()
    rows = list(text.split(128)[:-1])
    loader = DataLoader(rows, batch_size=8, shuffle=True)  # pyright: ignore[reportArgumentType]

    model, optimizer, loader = prepare(
        accelerator, model, optimizer, loader, precision=precision, steps=STEPS, tokens=8 * 128
    )
    first = 0
    if given.resume:
        accelerator.load_state(str(CHECKPOINT))
        first = steps_done(accelerator)
        loader = skip_first_batches(loader, first)

    with StopSignals() as signals:
        for step, batch in enumerate(loader, first + 1):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 5 == 0:
                values = controller(accelerator).scalars()
                accelerator.print(f"step {step}: loss {loss.item():.4f} {values}")
            if step == STEPS:
                break
            # Ctrl-C, or a cluster that ends the job: all ranks stop after the same step.
            stops = signals.stops()
            if stops or (step == SAVE_AT and not given.resume):
                accelerator.save_state(str(CHECKPOINT))
            if stops:
                signals.stop(
                    f"saved {CHECKPOINT} after step {step}; resume with --resume",
                    main=accelerator.is_main_process,
                )


if __name__ == "__main__":
    with reported("loop.py"):
        main(sys.argv[1:])
