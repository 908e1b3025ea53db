"""Codes that outlive one call of a layer, so that nothing is quantised twice. Eager code only: a
compiler finds what is equal by itself.

Weights. In training a weight's codes, and those of its transpose, serve until it changes: over the
micro-batches of an accumulated step, when activation checkpointing computes again, and in the
backward. A change is seen by

* the tensor's version, which every in-place operation of torch counts;
* an optimizer's step, any optimizer's that derives from torch.optim.Optimizer: some write through
  `.data`, which no version counts. What is computed inside a step (a closure) uses no kept codes;
* another parameter object, or other memory, in the weight's place.

A sharded weight (FSDP2) is never kept: its gathered form lives in memory that is filled again
behind every version's back. Whoever writes a weight through `.data` outside of an optimizer calls
`forget_weights`.

Inputs. Layers called one after the other with the same tensor, as q, k and v are, share its codes.
They are dropped with the tensor.
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

from lowprec.quant import QTensor
from lowprec.quant.triton_quantize import Directions, quantize_both

Codes = tuple[QTensor | None, QTensor | None]


@dataclass(kw_only=True)
class _Weight:
    parameter: weakref.ref[Tensor]
    memory: StorageWeakRef
    """The parameter and its memory themselves, not their addresses, which may be given out
    again."""
    state: tuple[Any, ...]
    codes: Codes

    def is_of(self, weight: Tensor, state: tuple[Any, ...]) -> bool:
        same = self.parameter() is weight and self.state == state and not self.memory.expired()
        return same and self.memory.cdata == weight.untyped_storage()._cdata


@dataclass(kw_only=True)
class _Input:
    tensor: weakref.ref[Tensor]
    version: int
    dtype: torch.dtype
    wanted: Directions
    codes: Codes


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


def weight_codes(module: nn.Module, w_NK: Tensor, wanted: Directions) -> Codes:
    """The codes of a module's weight and of its transpose, as wanted, or more; (None, None) for a
    weight that must not be kept."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if _in_step or weight.is_inference() or getattr(module, "sharded", False):
        return None, None
    state = (
        _steps,
        weight._version,
        weight.data_ptr(),
        weight.stride(),
        weight.dtype,
        wanted.along_rows,
    )
    entry = _weights.get(module)
    if (
        entry is None
        or not entry.is_of(weight, state)
        or (wanted.cols and (entry.codes[1] is None or entry.codes[1].spec != wanted.along_cols))
    ):
        memory = StorageWeakRef(weight.untyped_storage())
        entry = _Weight(
            parameter=weakref.ref(weight),
            memory=memory,
            state=state,
            codes=quantize_both(w_NK, wanted),
        )
        _weights[module] = entry
    return entry.codes


def forget(module: nn.Module) -> None:
    """Drop the codes of one module's weight, and the reference to it."""
    _weights.pop(module, None)


def forget_weights() -> None:
    """Drop the codes of all weights: after writing through `.data`, where nothing counts the
    change."""
    _weights.clear()


def shared_codes(x: Tensor, x_MK: Tensor, wanted: Directions) -> Codes:
    """The codes of x_MK, which is x as a matrix, cast perhaps, and of its transpose; made anew
    unless the last call was for the same x."""
    global _input
    if x.is_inference():
        return quantize_both(x_MK, wanted)
    last = _input
    if (
        last is not None
        and last.tensor() is x
        and last.version == x._version
        and last.dtype == x_MK.dtype
        and last.wanted == wanted
    ):
        return last.codes
    codes = quantize_both(x_MK, wanted)
    _input = _Input(
        tensor=weakref.ref(x, _drop_input),
        version=x._version,
        dtype=x_MK.dtype,
        wanted=wanted,
        codes=codes,
    )
    return codes


def _drop_input(reference: Any) -> None:
    global _input
    if _input is not None and _input.tensor is reference:
        _input = None
