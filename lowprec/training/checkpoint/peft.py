"""PEFT models, recognised by the name of their class, so that PEFT is not imported."""

from typing import Any


def is_peft(model: Any) -> bool:
    """Return whether `model` is a PeftModel."""
    return any(kind.__name__ == "PeftModel" for kind in type(model).__mro__)


def without_peft(model: Any) -> Any:
    """Return the model that PEFT has put adapters into; `model` itself if it is no PEFT model."""
    return model.get_base_model() if is_peft(model) else model
