"""What a recipe keeps, beside checkpoints that hold a part of the model only: PEFT's have the
adapters, not the layers beneath them.

The file is written and read with the adapters themselves: so it is there before a checkpoint counts
as whole, and it is found wherever the Trainer goes on from. A sharded model is saved and loaded
past PEFT; there the callback does it.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowprec.recipe.state import is_state
from lowprec.training.checkpoint.files import is_whole, state_of
from lowprec.training.checkpoint.final_model import is_finished
from lowprec.training.checkpoint.peft import is_peft

FILE = "lowprec_state.safetensors"

_READ = "_lowprec_state_read"
"""Set on a model that has read its state with its adapters."""


def leaves_state_out(model: Any) -> bool:
    """Whether the Trainer's checkpoints of `model` have no buffers of its layers, and it has such
    that a recipe keeps."""
    return is_peft(model) and any(is_state(name) for name, _ in model.named_buffers())


def keep_beside_adapters(model: Any) -> None:
    """Let a model of PEFT's write the state when it saves its adapters, and read it when it loads
    them."""
    if is_peft(model) and not isinstance(vars(model).get("load_adapter"), partial):
        model.save_pretrained, model.load_adapter = partial(_save, model), partial(_load, model)


def _save(model: Any, save_directory: Any, *args: Any, **settings: Any) -> Any:
    result = type(model).save_pretrained(model, save_directory, *args, **settings)
    if leaves_state_out(model) and not is_finished(model) and settings.get("is_main_process", True):
        save_state(model, Path(save_directory))
    return result


def _load(model: Any, model_id: Any, adapter_name: str, *args: Any, **settings: Any) -> Any:
    result = type(model).load_adapter(model, model_id, adapter_name, *args, **settings)
    place = Path(
        model_id
    )  # of this adapter; one that is not called "default" lies below what the others share
    found = load_state(model, place) or (
        place.name == adapter_name and load_state(model, place.parent)
    )
    setattr(model, _READ, found)
    return result


def has_read_state(model: nn.Module) -> bool:
    """Whether the adapters that `model` loaded last had the state beside them; asked once."""
    return vars(model).pop(_READ, False)


def save_state(model: Any, checkpoint: Path) -> None:
    state = {
        name: buffer.detach().cpu().contiguous()
        for name, buffer in model.named_buffers()
        if is_state(name)
    }
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
    """Whether a TrainerState was read from this checkpoint: the callback is told of the state, not
    of the place."""
    if not is_whole(checkpoint):
        return False
    held = state_of(checkpoint)
    return held["global_step"] == state.global_step and held["log_history"] == state.log_history
