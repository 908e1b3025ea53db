"""What a recipe keeps, beside checkpoints that hold a part of the model only: PEFT's have the adapters, not the layers beneath them."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lowprec.recipe.state import is_state
from trainers.rundir import is_whole, state_of

FILE = "lowprec_state.safetensors"


def leaves_state_out(model: Any) -> bool:
    """Whether the Trainer's checkpoints of `model` have no buffers of its layers, and it has such that a recipe keeps."""
    return any(kind.__name__ == "PeftModel" for kind in type(model).__mro__) and any(is_state(name) for name, _ in model.named_buffers())


def save_state(model: Any, checkpoint: Path) -> None:
    state = {name: buffer.detach().cpu().contiguous() for name, buffer in model.named_buffers() if is_state(name)}
    unfinished = checkpoint / f".{FILE}"
    save_file(state, unfinished)
    os.replace(unfinished, checkpoint / FILE)


@torch.no_grad()
def load_state(model: Any, checkpoint: Path) -> bool:
    """Whether the checkpoint had any; what the model has no place for is left."""
    if not (checkpoint / FILE).is_file():
        return False
    state = load_file(checkpoint / FILE)
    for name, buffer in model.named_buffers():
        if name in state and state[name].shape == buffer.shape:
            buffer.copy_(state[name])
    return True


def is_checkpoint_of(checkpoint: Path, state: Any) -> bool:
    """Whether a TrainerState was read from this checkpoint: the callback is told of the state, not of the place."""
    if not is_whole(checkpoint):
        return False
    held = state_of(checkpoint)
    return held["global_step"] == state.global_step and held["log_history"] == state.log_history
