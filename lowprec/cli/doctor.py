"""`lowprec doctor`: this machine and what it can do."""

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING, Any

import click

from lowprec import __version__
from lowprec.cli.common import JSON, answers
from lowprec.files import to_json

if TYPE_CHECKING:
    from lowprec.recipe import Recipe

_REQUIRED = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
)
# Distribution -> what it is for, and the extra that installs it.
_OPTIONAL = {
    "liger-kernel": ("Liger's fused kernels (kernels.liger)", "liger"),
    "transformer-engine": ("Transformer Engine (`backend: te`)", "te"),
    "torchao": ("bf16 weights and moments of 16, 8 and 4 bits (`optimizer`)", "torchao"),
    "peft": ("LoRA and other adapters", "peft"),
    "trl": ("supervised fine-tuning by SFTTrainer", "trl"),
    "wandb": ("Weights & Biases logging (trainer.report_to: wandb)", "wandb"),
}


@click.command("doctor")
@JSON
@answers
def command(as_json: bool) -> str:
    """Show this machine: device, versions, which recipes run natively, what is missing and how to
    install it."""
    from lowprec.cli.tables import doctor_table

    report = examine()
    return to_json(report, indent=1) if as_json else doctor_table(report)


def examine() -> dict[str, Any]:
    """Return this machine's device, versions, recipes and optional parts as plain data."""
    import torch

    from lowprec.recipe import library

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "lowprec": __version__ if _version("lowprec") else "source tree",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(device_type),
        "versions": {name: _version(name) for name in _REQUIRED},
        "recipes": [
            {"name": name, **_support(library.get(name), device_type)} for name in library.names()
        ],
        "optional": [
            {
                "name": name,
                "version": _version(name),
                "what": what,
                "install": None if _version(name) else f"pip install 'lowprec[{extra}]'",
            }
            for name, (what, extra) in _OPTIONAL.items()
        ],
    }


def _support(recipe: "Recipe", device_type: str) -> dict[str, Any]:
    from lowprec.gemm import select
    from lowprec.recipe import GEMMS

    supports = {
        gemm: select(*recipe.operands(gemm), device_type, sums=recipe.gemm(gemm).sums)
        for gemm in GEMMS
    }
    return {
        "native": all(support.native for _, support in supports.values()),
        "backends": {gemm: backend.name for gemm, (backend, _) in supports.items()},
        "reason": "; ".join(dict.fromkeys(support.reason for _, support in supports.values())),
    }


def _device(device_type: str) -> dict[str, Any]:
    import torch

    if device_type == "cpu":
        return {
            "type": "cpu",
            "name": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(0)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "count": torch.cuda.device_count(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
