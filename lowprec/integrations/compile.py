"""`torch.compile` for the repeated blocks of a model, one compilation for all of them.

The method. A language model is a stack of identical blocks. Compiling the whole model traces every
one of them. Compiling the block traces it once, and the result serves all layers, because they have
the same code and the same shapes. This compiles much faster and loses only the fusions across block
boundaries, which are few (the residual stream is written there anyway). We use `Module.compile`,
which keeps the module itself: parameter names, state dict and hooks stay as they are.
"""

import contextlib
import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lowprec.errors import UserError
from lowprec.nn.known import known_class

Mode = Literal["blocks", "off"]

_BY_SHAPE = {"deterministic": True, "triton.autotune_pointwise": False}
"""Settings of torch._inductor.config, which is imported only when needed: it takes a second."""


@dataclass(frozen=True, kw_only=True)
class CompileChoice:
    """The number of compiled blocks, with the reason."""

    compiled: int
    """Number of compiled blocks."""
    reason: str
    """Reason for compiling or not compiling."""

    def __str__(self) -> str:
        return (
            f"{self.compiled} blocks compiled: {self.reason}"
            if self.compiled
            else f"not compiled: {self.reason}"
        )


def compile_blocks(model: nn.Module, mode: Mode, device_type: str) -> CompileChoice:
    """Compile the decoder blocks of `model` in place, at the first forward pass.

    The mode "off" does nothing. Raises UserError for a model without a stack of blocks, and on a
    CPU without the C++ compiler that TorchInductor needs.
    """
    if mode not in ("blocks", "off"):
        raise UserError(f"compile: expected 'blocks' or 'off', got {mode!r}")
    if mode == "off":
        return CompileChoice(compiled=0, reason="compile: off")
    name, blocks = find_blocks(model)
    if device_type == "cpu" and (missing := _missing_cpp_compiler()):
        raise UserError(
            f"compile: compiling for a CPU needs a C++ compiler and '{missing}' is not installed; "
            "set compile: off"
        )
    compile_deterministically()
    for block in blocks:
        block.compile()
    return CompileChoice(
        compiled=len(blocks),
        reason=f"each {type(blocks[0]).__name__} in '{name}', one compilation for all",
    )


@contextlib.contextmanager
def kernels_by_shape() -> Iterator[None]:
    """Make torch.compile choose kernels by shape alone within this context.

    Two processes then take the same kernels. By default TorchInductor times variants of a kernel
    and takes the fastest one. It does so for pointwise kernels even if deterministic algorithms are
    requested (pytorch pull request 164905). Variants round differently: one contracts a product and
    a sum to an FMA where another does not.
    """
    with importlib.import_module("torch._inductor.config").patch(_BY_SHAPE):
        yield


def compile_deterministically() -> None:
    """Apply the settings of `kernels_by_shape` to the whole process, for all later compilations.

    Does nothing unless torch.use_deterministic_algorithms is on.
    """
    if torch.are_deterministic_algorithms_enabled():
        config = importlib.import_module("torch._inductor.config")
        for name, value in _BY_SHAPE.items():
            setattr(config, name, value)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the ModuleList of the repeated blocks.

    The candidates are the ModuleLists whose children all have one class, and the longest candidate
    is returned. A block may itself hold a longer list, for example of experts. So if transformers
    declares the class of some list to be a layer (`_no_split_modules`, GradientCheckpointingLayer),
    only such lists count; otherwise, lists inside another candidate do not count. Raises UserError
    if there is no candidate.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    declared: set[str] = set(getattr(model, "_no_split_modules", None) or [])
    layers = [item for item in lists if _is_declared_layer(type(item[1][0]), declared)]
    outermost = [
        item for item in lists if not any(item[0].startswith(f"{other}.") for other, _ in lists)
    ]
    candidates = layers or outermost
    if not candidates:
        raise UserError(
            f"compile: {type(model).__name__} has no ModuleList of equal blocks to compile; set "
            "compile: off"
        )
    return max(candidates, key=lambda item: len(item[1]))


def _is_declared_layer(cls: type, declared: set[str]) -> bool:
    # Models declare the names of their layers' classes.
    layer = known_class("transformers.modeling_layers:GradientCheckpointingLayer")
    return cls.__name__ in declared or (layer is not None and issubclass(cls, layer))


def _missing_cpp_compiler() -> str | None:
    """Return the name of the C++ compiler that TorchInductor needs and that is not installed, or
    None."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", default)
    return None if shutil.which(compiler) else compiler
