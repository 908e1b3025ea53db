"""Models of PEFT's, told by the name of their class so that PEFT need not be imported."""

from typing import Any


def is_peft(model: Any) -> bool:
    return any(kind.__name__ == "PeftModel" for kind in type(model).__mro__)


def without_peft(model: Any) -> Any:
    """The model that PEFT has put adapters into; `model` itself if it is none of PEFT's."""
    return model.get_base_model() if is_peft(model) else model
