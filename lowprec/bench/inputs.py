"""The user's inputs to a benchmark, and the description of the machine in its result."""

from typing import Any

import torch

from lowprec.errors import UserError, nearest
from lowprec.recipe import Recipe, library


def open_device(name: str) -> torch.device:
    """Return the device called `name`, cpu or cuda. Raise UserError if there is no such device."""
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device: unknown device '{name}'; known: cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: this machine has no CUDA device; known: cpu")
    return torch.device(name)


def resolve_recipe(name: str) -> Recipe:
    """Return the recipe called `name`. Raise UserError with the nearest known name."""
    if name not in library.names():
        raise UserError(f"--recipe: unknown recipe '{name}'{nearest(name, library.names())}")
    return library.get(name)


def describe(device: torch.device) -> dict[str, Any]:
    """Return {"device": name, "threads": number of CPU threads, "torch": version}."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
