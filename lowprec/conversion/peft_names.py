"""The names of layers without the parts that PEFT adds to them."""

from torch import nn

_PEFT = {
    "PeftModel": ("base_model",),
    "PeftMixedModel": ("base_model",),
    "BaseTuner": ("model", "lora_model"),
    "BaseTunerLayer": ("base_layer",),
    "AuxiliaryTrainingWrapper": ("original_module", "modules_to_save", "token_adapter"),
}
"""PEFT's wrappers, by the names of their classes, so that PEFT need not be imported; for each, the
attributes that hold the module that it wraps, or its trained copy."""


def name_without_peft(model: nn.Module, name: str, stack: str = "") -> tuple[str, bool]:
    """Return the name that a layer has without PEFT, and whether PEFT added the layer: it is then
    inside a wrapper, but not the module that is wrapped.

    Args:
        stack: the last part of the name, if that is the name of a parameter.
    """
    plain: list[str] = []
    added = False
    module = model
    for part in name.removesuffix(stack).strip(".").split("."):
        kept = next(
            (_PEFT[base.__name__] for base in type(module).__mro__ if base.__name__ in _PEFT), None
        )
        copies = isinstance(module, nn.ModuleDict) and plain[-1:] == ["modules_to_save"]
        added |= kept is not None and part not in kept
        if copies:  # the part is the adapter's name
            plain.pop()
        elif kept is None or part not in kept or part == "modules_to_save":
            plain.append(part)
        module = module.get_submodule(part)
    return ".".join(filter(None, [*plain, stack])), added
