"""The names of layers without the parts that PEFT adds to them."""

from torch import nn

from lowprec.nn.known import known_class

_PEFT = {
    "peft:PeftModel": ("base_model",),
    "peft:PeftMixedModel": ("base_model",),
    "peft.tuners.tuners_utils:BaseTuner": ("model", "lora_model"),
    "peft.tuners.tuners_utils:BaseTunerLayer": ("base_layer",),
    "peft.utils.other:AuxiliaryTrainingWrapper": (
        "original_module",
        "modules_to_save",
        "token_adapter",
    ),
}
"""PEFT's wrappers; for each, the attributes that hold the module that it wraps, or its trained
copy."""


def name_without_peft(model: nn.Module, name: str, stack: str = "") -> tuple[str, bool]:
    """Return the name that a layer has without PEFT, and whether PEFT added the layer: it is then
    inside a wrapper, but not the module that is wrapped.

    Args:
        stack: the last part of the name, if that is the name of a parameter.
    """
    found = ((known_class(path), parts) for path, parts in _PEFT.items())
    wrappers = [(kind, parts) for kind, parts in found if kind is not None]
    if not wrappers:  # PEFT is not imported
        return name, False
    plain: list[str] = []
    added = False
    module = model
    for part in name.removesuffix(stack).strip(".").split("."):
        kept = next((parts for kind, parts in wrappers if isinstance(module, kind)), None)
        copies = isinstance(module, nn.ModuleDict) and plain[-1:] == ["modules_to_save"]
        added |= kept is not None and part not in kept
        if copies:  # the part is the adapter's name
            plain.pop()
        elif kept is None or part not in kept or part == "modules_to_save":
            plain.append(part)
        module = module.get_submodule(part)
    return ".".join(filter(None, [*plain, stack])), added
