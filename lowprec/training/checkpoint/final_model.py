"""What is saved of a model whose run is over: its weights alone, for whoever serves it. The
checkpoints have what a run needs to go on.

A model counts as finished until it is converted or trained again, by whomever: the checkpoints of
another run have all of it.
"""

from typing import Any

from torch import nn

from lowprec.recipe.state import FINISHED, is_state
from lowprec.training.checkpoint.peft import without_peft


def follow(model: nn.Module) -> None:
    """Let `model` be saved without what a recipe keeps while it is finished; without effect on one
    that is followed already."""
    base = without_peft(model)  # what is left when the adapters are merged into it
    if FINISHED not in vars(base):
        setattr(base, FINISHED, False)
        base.register_state_dict_post_hook(_leave_state_out)
        base.register_load_state_dict_pre_hook(_keep_own_state)
    for module in (model, base):  # PEFT runs what it wraps without calling it
        if _goes_on not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_goes_on)


def set_finished(model: nn.Module, finished: bool) -> None:
    setattr(without_peft(model), FINISHED, finished)


def is_finished(model: nn.Module) -> bool:
    return getattr(without_peft(model), FINISHED, False)


def _goes_on(model: nn.Module, inputs: Any) -> None:
    # The mode first: compiled code then looks at the flag in training only.
    if model.training and getattr(model, FINISHED, False):
        set_finished(model, False)


def _leave_state_out(model: nn.Module, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    if getattr(model, FINISHED, False):
        for name in [name for name in state_dict if name.startswith(prefix) and is_state(name)]:
            del state_dict[name]


def _keep_own_state(model: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    """What was left out is not missed when it is loaded again."""
    if getattr(model, FINISHED, False):
        for name, buffer in model.named_buffers():
            if is_state(name):
                state_dict.setdefault(prefix + name, buffer.clone())
