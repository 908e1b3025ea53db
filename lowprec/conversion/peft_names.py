"""Names of layers without the parts that PEFT adds to them."""

from torch import nn

_PEFT = {
    "PeftModel": ("base_model",),
    "PeftMixedModel": ("base_model",),
    "BaseTuner": ("model", "lora_model"),
    "BaseTunerLayer": ("base_layer",),
    "AuxiliaryTrainingWrapper": ("original_module", "modules_to_save", "token_adapter"),
}
"""PEFT's wrappers, by the name of their class so that PEFT need not be imported, and where each
keeps what was there before it."""


def name_without_peft(model: nn.Module, name: str, stack: str = "") -> tuple[str, bool]:
    """The name that a layer has without PEFT, and whether PEFT added it: whether it lies in a
    wrapper, but is not what that wraps.

    `stack`: the last part of the name, if that is a parameter's.
    """
    plain, added, module = [], False, model
    for part in name.removesuffix(stack).strip(".").split("."):
        kept = next(
            (_PEFT[base.__name__] for base in type(module).__mro__ if base.__name__ in _PEFT), None
        )
        copies = isinstance(module, nn.ModuleDict) and plain[-1:] == ["modules_to_save"]
        added |= kept is not None and part not in kept
        if copies:  # by the adapter's name
            plain.pop()
        elif kept is None or part not in kept or part == "modules_to_save":
            plain.append(part)
        module = module.get_submodule(part)
    return ".".join(filter(None, [*plain, stack])), added
