"""Operands that outlive one call of a layer, so that nothing is quantised twice.

Eager code only: a compiler finds equal computations by itself.

Weights. In training, the operands of a weight serve until it changes: in the micro-batches of an
accumulated step, when activation checkpointing computes the forward again, and in the backward. A
change is noticed by

* the tensor's version, which every in-place operation of torch counts;
* the step of any optimizer that derives from torch.optim.Optimizer: some write through `.data`,
  which no version counts. Code that runs inside a step (a closure) uses no kept operands;
* another parameter object, or other memory, in the weight's place.

A sharded weight (FSDP2) is never kept: the memory of its gathered form is refilled, and no version
counts that. A program that writes a weight through `.data` outside an optimizer calls
`forget_weights`.

Inputs. Layers that are called one after the other with the same tensor, as q, k and v are, share
its operands. They are dropped with the tensor.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lowprec.quant import QTensor, TwoWay
from lowprec.quant.triton_quantize import Directions, quantize_both


@dataclass(kw_only=True)
class _Weight:
    """The operands of a weight, and the state by which a change of the weight is noticed."""

    parameter: weakref.ref[Tensor]
    """The parameter itself, not its address, which may be given out again."""
    memory: StorageWeakRef
    """Its memory itself, likewise."""
    state: tuple[Any, ...]
    operands: TwoWay

    def is_of(self, weight: Tensor, state: tuple[Any, ...]) -> bool:
        same = self.parameter() is weight and self.state == state and not self.memory.expired()
        return same and self.memory.cdata == weight.untyped_storage()._cdata

    def has_cols(self, wanted: Directions) -> bool:
        cols = self.operands.cols
        return isinstance(cols, QTensor) and cols.spec == wanted.along_cols


@dataclass(kw_only=True)
class _Input:
    """The operands of the last input."""

    tensor: weakref.ref[Tensor]
    version: int
    dtype: torch.dtype
    wanted: Directions
    operands: TwoWay

    def is_of(self, x: Tensor, dtype: torch.dtype, wanted: Directions) -> bool:
        same = self.tensor() is x and self.version == x._version
        return same and self.dtype == dtype and self.wanted == wanted


_weights: weakref.WeakKeyDictionary[nn.Module, _Weight] = weakref.WeakKeyDictionary()
_input: _Input | None = None
_steps = 0
_in_step = False


def _before_step(*_: Any) -> None:
    global _in_step
    _in_step = True


def _after_step(*_: Any) -> None:
    global _in_step, _steps
    _in_step = False
    _steps += 1


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


def weight_codes(module: nn.Module, w_NK: Tensor, wanted: Directions) -> TwoWay:
    """Return the operands of a module's weight, from an earlier call if it has not changed since.

    They may have a direction that is not wanted now. They are empty for a weight that must not be
    kept.

    Args:
        w_NK: the weight, detached.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if _in_step or weight.is_inference() or getattr(module, "sharded", False):
        return TwoWay()
    state = (
        _steps,
        weight._version,
        weight.data_ptr(),
        weight.stride(),
        weight.dtype,
        wanted.along_rows,
    )
    entry = _weights.get(module)
    unchanged = entry is not None and entry.is_of(weight, state)
    if entry is not None and unchanged and (not wanted.cols or entry.has_cols(wanted)):
        return entry.operands
    entry = _Weight(
        parameter=weakref.ref(weight),
        memory=StorageWeakRef(weight.untyped_storage()),
        state=state,
        operands=quantize_both(w_NK, wanted),
    )
    _weights[module] = entry
    return entry.operands


def forget(module: nn.Module) -> None:
    """Drop the operands of one module's weight, and the reference to it."""
    _weights.pop(module, None)


def forget_weights() -> None:
    """Drop the operands of all weights. Call it after writing weights through `.data`, where
    nothing counts the change."""
    _weights.clear()


def shared_codes(x: Tensor, x_MK: Tensor, wanted: Directions) -> TwoWay:
    """Return the operands of an input, from the last call if that was for the same tensor.

    Args:
        x: the layer's input, by which other layers with the same input find the operands.
        x_MK: the input as a matrix, in autocast's dtype where that is on.
    """
    global _input
    if x.is_inference():
        return quantize_both(x_MK, wanted)
    if _input is not None and _input.is_of(x, x_MK.dtype, wanted):
        return _input.operands
    made = quantize_both(x_MK, wanted)
    _input = _Input(
        tensor=weakref.ref(x, _drop_input),
        version=x._version,
        dtype=x_MK.dtype,
        wanted=wanted,
        operands=made,
    )
    return made


def _drop_input(reference: Any) -> None:
    global _input
    if _input is not None and _input.tensor is reference:
        _input = None
