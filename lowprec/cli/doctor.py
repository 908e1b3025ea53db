"""What this machine is and what it can do: `lowprec doctor` and `lowprec recipes`."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from lowprec.gemm import select
from lowprec.recipe import GEMMS, Recipe, library

_REQUIRED = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
)
_OPTIONAL = {
    "liger-kernel": ("Liger's fused kernels (kernels.liger)", "pip install 'lowprec[liger]'"),
    "transformer-engine": ("Transformer Engine (`backend: te`)", "pip install 'lowprec[te]'"),
    "torchao": (
        "bf16 weights and moments of 16, 8 and 4 bits (`optimizer`)",
        "pip install 'torchao>=0.18'",
    ),
    "wandb": (
        "Weights & Biases logging (trainer.report_to: wandb)",
        "pip install 'lowprec[wandb]'",
    ),
}


def examine() -> dict[str, Any]:
    """Device, versions, recipes and optional parts of this machine, as plain data."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "lowprec": importlib.metadata.version("lowprec") if _version("lowprec") else "source tree",
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
                "install": None if _version(name) else install,
            }
            for name, (what, install) in _OPTIONAL.items()
        ],
    }


def describe_recipes() -> list[dict[str, Any]]:
    """Each named recipe: what it is, its GEMMs as equations, and what the rest of the model
    computes in."""
    return [
        {"name": recipe.name, "about": recipe.about, "rest": recipe.rest.name}
        | {gemm: recipe.equation(gemm) for gemm in GEMMS}
        for recipe in map(library.get, library.names())
    ]


def _support(recipe: Recipe, device_type: str) -> dict[str, Any]:
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
