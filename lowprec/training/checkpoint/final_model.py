"""The flag that a model's run has finished, for models as the Trainer holds them: PEFT's, and
compiled ones. See `lowprec.recipe.finished`."""

from torch import nn

from lowprec.recipe.finished import FinishedFlag, add_finished_flag
from lowprec.training.checkpoint.peft import without_peft


def follow(model: nn.Module) -> FinishedFlag:
    """Return the flag of `model`. While it is up, the model is saved without recipe state.

    The flag belongs to the model inside of PEFT's: that model is left when the adapters are merged
    into it. It is lowered when the model is trained or converted again.
    """
    compiled_from = getattr(model, "_orig_mod", model)
    flag = add_finished_flag(without_peft(compiled_from))
    # PEFT runs the model inside without calling it, so its own model needs the hook, too.
    if flag.train_again not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(flag.train_again)
    return flag
