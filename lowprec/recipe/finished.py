"""State dicts of a finished model: its weights alone, without what a recipe keeps (`state`).

Whoever serves a model wants the names of its weights and no others. Whoever resumes training needs
the recipe's state too, and finds it in the checkpoints, which are written before the run finishes.
So each model that is trained has a `FinishedFlag`. It acts by three hooks of the model: two of its
state dict, and one of its forward, since a model that is trained again is not finished any more.

Only these hooks hold the flag, nothing is set on the model. So the flag is copied, pickled, wrapped
and sharded with its model.
"""

from typing import Any

from torch import Tensor, nn

from lowprec.recipe.state import is_state


class FinishedFlag:
    """Flag: the run of a model has finished, so its state dicts omit recipe state."""

    def __init__(self) -> None:
        self.finished = False

    def __call__(
        self, model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
    ) -> None:
        """Leave recipe state out of a finished model's state dict."""
        if self.finished:
            for name in [name for name in state_dict if name.startswith(prefix) and is_state(name)]:
                del state_dict[name]

    def keep_own_state(
        self, model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
    ) -> None:
        """Let a finished model load a state dict without recipe state: it keeps its own."""
        if self.finished:
            for name, buffer in model.named_buffers():
                if is_state(name):
                    state_dict.setdefault(prefix + name, buffer.clone())

    def train_again(self, model: nn.Module, inputs: Any) -> None:
        """Lower the flag in a forward pass of training."""
        # The mode comes first, so that compiled code depends on the flag in training only.
        if model.training and self.finished:
            self.finished = False


def finished_flag(model: nn.Module) -> FinishedFlag | None:
    """Return the flag of `model`; None if it has none."""
    hooks = model._state_dict_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, FinishedFlag)), None)


def add_finished_flag(model: nn.Module) -> FinishedFlag:
    """Return the flag of `model`, a new one if it has none."""
    flag = finished_flag(model)
    if flag is None:
        flag = FinishedFlag()
        # The object itself, not a method: torch sets an attribute on this hook.
        model.register_state_dict_post_hook(flag)
        model.register_load_state_dict_pre_hook(flag.keep_own_state)
    if flag.train_again not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(flag.train_again)
    return flag


def begin_run(model: nn.Module) -> None:
    """Lower the flags of `model` and its submodules: another run begins."""
    for module in model.modules():
        flag = finished_flag(module)
        if flag is not None:
            flag.finished = False
