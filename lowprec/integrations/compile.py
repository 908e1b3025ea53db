"""`torch.compile` for the repeated blocks of a model, one compilation for all of them.

The method. A language model is a stack of identical blocks. Compiling the whole model traces every
one of them; compiling the block traces it once, and the result serves all the layers, because they
have the same code and the same shapes. That is much faster to compile and loses only the fusions
across block boundaries, which are few (the residual stream is written there anyway).
`Module.compile` is used, which keeps the module itself: parameter names, state dict and hooks stay
as they are.
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

Mode = Literal["blocks", "off"]

_BY_SHAPE = {"deterministic": True, "triton.autotune_pointwise": False}
"""Settings of torch._inductor, which takes a second to import: not before it is needed."""


@dataclass(frozen=True, kw_only=True)
class CompileChoice:
    """How many blocks are compiled, and why."""

    compiled: int
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.compiled} blocks compiled: {self.reason}"
            if self.compiled
            else f"not compiled: {self.reason}"
        )


def compile_blocks(model: nn.Module, mode: Mode, device_type: str) -> CompileChoice:
    """Compile the decoder blocks of `model` in place (lazily: at the first forward pass); "off"
    does nothing.

    Raises UserError for a model without a stack of blocks, and on a CPU without the C++ compiler
    that TorchInductor needs.
    """
    if mode not in ("blocks", "off"):
        raise UserError(f"compile: expected 'blocks' or 'off', got {mode!r}")
    if mode == "off":
        return CompileChoice(compiled=0, reason="compile: off")
    name, blocks = find_blocks(model)
    if device_type == "cpu" and (missing := _missing_cpp_compiler()):
        raise UserError(
            f"compile: compiling for a CPU needs a C++ compiler and '{missing}' is not installed; "
            "set it to off"
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
    """What torch.compile compiles within takes kernels by their shapes alone, so that two processes
    take the same ones.

    By itself TorchInductor times variants of a kernel and takes the fastest, of pointwise ones even
    where deterministic algorithms are asked for (pytorch pull request 164905). Variants round
    differently; one contracts a product and a sum to an FMA where another does not.
    """
    with importlib.import_module("torch._inductor.config").patch(_BY_SHAPE):
        yield


def compile_deterministically() -> None:
    """`kernels_by_shape` for all that this process compiles from now on, if
    torch.use_deterministic_algorithms is on; else nothing."""
    if torch.are_deterministic_algorithms_enabled():
        config = importlib.import_module("torch._inductor.config")
        for name, value in _BY_SHAPE.items():
            setattr(config, name, value)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the ModuleList of the repeated blocks.

    It is the longest ModuleList whose children have one class, if possible a class that
    transformers declares to be a layer (`_no_split_modules`, GradientCheckpointingLayer): a block
    may itself hold a longer list, of experts say. Otherwise lists inside of another candidate do
    not count. Raises UserError if there is none.
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
            f"compile: {type(model).__name__} has no ModuleList of equal blocks to compile; set it "
            "to off"
        )
    return max(candidates, key=lambda item: len(item[1]))


def _is_declared_layer(cls: type, declared: set[str]) -> bool:
    # By name, so that a model from elsewhere does not make this import transformers.
    return cls.__name__ in declared or any(
        base.__name__ == "GradientCheckpointingLayer" for base in cls.__mro__
    )


def _missing_cpp_compiler() -> str | None:
    """The C++ compiler that TorchInductor would call, if it is not there."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", default)
    return None if shutil.which(compiler) else compiler
