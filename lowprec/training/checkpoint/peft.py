"""PEFT models, recognised without an import of PEFT."""

from typing import Any

from lowprec.nn.known import is_a


def is_peft(model: Any) -> bool:
    """Return whether `model` is a PeftModel."""
    return is_a(model, "peft:PeftModel")


def without_peft(model: Any) -> Any:
    """Return the model that PEFT has put adapters into; `model` itself if it is no PEFT model."""
    return model.get_base_model() if is_peft(model) else model
