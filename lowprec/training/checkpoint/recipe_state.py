"""Recipe state next to PEFT adapter checkpoints: those hold the adapters, not the layers beneath
them, whose buffers a recipe keeps.

The file is written and read together with the adapters. So it is there before a checkpoint counts
as complete, and it is found wherever the Trainer resumes from. The Trainer saves and loads a
sharded model without PEFT's methods; the callback saves and loads the file then.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.recipe.finished import FinishedFlag
from lowprec.recipe.state import is_state
from lowprec.training.checkpoint.peft import is_peft
from lowprec.training.checkpoint.saved import load_tensors, save_tensors


class RecipeState:
    """The buffers of a model that recipes keep, as a part of a checkpoint."""

    name = "lowprec_state"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return {
            name: buffer.detach().cpu().contiguous()
            for name, buffer in self.model.named_buffers()
            if is_state(name)
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy into the buffers of the same name and shape; the rest of `state` is ignored."""
        for name, buffer in self.model.named_buffers():
            if name in state and state[name].shape == buffer.shape:
                buffer.copy_(state[name])


def leaves_state_out(model: nn.Module) -> bool:
    """Return whether the Trainer's checkpoints of `model` lack recipe state that the model has."""
    return is_peft(model) and any(is_state(name) for name, _ in model.named_buffers())


class StateBesideAdapters:
    """Makes a PEFT model write recipe state when it saves its adapters, and read it when it loads
    them.

    It takes the place of the model's methods `save_pretrained` and `load_adapter`.
    """

    def __init__(self, model: Any, finished: FinishedFlag) -> None:
        self.model = model
        self._finished = finished
        self._was_read = False
        model.save_pretrained = self.save_pretrained
        model.load_adapter = self.load_adapter

    def save_pretrained(self, save_directory: Any, *args: Any, **settings: Any) -> Any:
        """Save the adapters by PEFT and, unless the run has finished, recipe state beside them."""
        result = type(self.model).save_pretrained(self.model, save_directory, *args, **settings)
        wanted = leaves_state_out(self.model) and not self._finished.finished
        if wanted and settings.get("is_main_process", True):
            save_tensors(RecipeState(self.model), Path(save_directory))
        return result

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **settings: Any) -> Any:
        """Load an adapter by PEFT, and recipe state if it lies beside it."""
        load = type(self.model).load_adapter
        result = load(self.model, model_id, adapter_name, *args, **settings)
        state = RecipeState(self.model)
        folder = Path(model_id)
        # An adapter that is not called "default" lies in a folder of its name, below the state.
        self._was_read = load_tensors(state, folder) or (
            folder.name == adapter_name and load_tensors(state, folder.parent)
        )
        return result

    def take_was_read(self) -> bool:
        """Return whether the adapters that were loaded last had recipe state beside them, and
        forget it."""
        was_read = self._was_read
        self._was_read = False
        return was_read


def keep_beside_adapters(model: Any, finished: FinishedFlag) -> StateBesideAdapters | None:
    """Return the StateBesideAdapters of a PEFT model, a new one if it has none; None for another
    model.

    Args:
        finished: the model's flag; while it is up the adapters are saved alone.
    """
    if not is_peft(model):
        return None
    present = getattr(vars(model).get("load_adapter"), "__self__", None)
    if isinstance(present, StateBesideAdapters):
        return present
    return StateBesideAdapters(model, finished)
