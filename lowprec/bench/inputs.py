"""What the user of a benchmark names, and what a result tells of the machine."""

from typing import Any

import torch

from lowprec.errors import UserError, nearest
from lowprec.recipe import Recipe, library


def open_device(name: str) -> torch.device:
    """The device called `name`, cpu or cuda; UserError if there is no such device."""
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device: unknown device '{name}'; known: cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: this machine has no CUDA device; known: cpu")
    return torch.device(name)


def resolve_recipe(name: str) -> Recipe:
    """The recipe called `name`; UserError with the nearest known one."""
    if name not in library.names():
        raise UserError(f"--recipe: unknown recipe '{name}'{nearest(name, library.names())}")
    return library.get(name)


def describe(device: torch.device) -> dict[str, Any]:
    """{"device", "threads", "torch"}."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
