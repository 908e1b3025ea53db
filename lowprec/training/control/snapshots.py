"""Snapshots of a run in host memory: weights, buffers and optimizer state, to restore without
reading a checkpoint.

A snapshot is copied out and back in place, tensor by tensor. So parameters and optimizer state keep
their identity, and hooks, compiled code and sharding are not affected. A tensor that is made of
others is copied by its parts: a DTensor by its local shard, torchao's quantised optimizer state by
its codes and scales. A snapshot has neither random number generators nor the position in the data,
nor the learning rate, whose schedule continues.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowprec.nn.codes import forget_weights

_NOT_KEPT = ("params", "lr")
"""Entries of an optimizer's parameter groups that a snapshot does not have."""


@dataclass(frozen=True)
class _Held:
    """The copy of a tensor in host memory."""

    parts: list[Tensor]
    """Copies of the plain tensors that it is made of."""
    form: Any
    """The way that it is made of them, see `_form`."""


@dataclass
class _Snapshot:
    """The state of a run after a step."""

    step: int
    tensors: dict[str, _Held] = field(default_factory=dict)
    """Parameters and buffers by name."""
    state: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Optimizer state by the number of the parameter; each tensor in it is a `_Held`."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """The optimizer's parameter groups, without parameters and tensors."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State dict of the gradient scaler; empty without one."""

    def held(self) -> dict[Any, _Held]:
        """Return all copies, by a name or a pair (parameter number, key of its optimizer state)."""
        state = {
            (number, key): value
            for number, values in self.state.items()
            for key, value in values.items()
            if isinstance(value, _Held)
        }
        return {**self.tensors, **state}


class Snapshots:
    """The newest `keep` snapshots of a model and its optimizer. Each takes as much host memory as
    these take on their device."""

    def __init__(self, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"at least one snapshot is kept, got {keep}")
        self.keep = keep
        self._snapshots: list[_Snapshot] = []

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps after which the snapshots were taken, oldest first."""
        return tuple(snapshot.step for snapshot in self._snapshots)

    @torch.no_grad()
    def take(self, step: int, model: nn.Module, optimizer: Any, scaler: Any = None) -> None:
        """Copy the state after optimizer step `step`: trainable parameters, all buffers, the
        optimizer's state and groups, the scaler's state.

        From a GPU the copies go to pinned memory, in the order of the current stream, without
        waiting. Snapshots of this step and later ones are dropped: the run has gone back behind
        them. The memory of the oldest snapshot is used again.

        Args:
            optimizer: a torch.optim.Optimizer, also in Accelerate's wrapper.
            scaler: a torch.amp.GradScaler; its scale is read, which waits for the device.
        """
        self._snapshots = [snapshot for snapshot in self._snapshots if snapshot.step < step]
        old = self._snapshots.pop(0).held() if len(self._snapshots) == self.keep else {}
        optimizer = _unwrapped(optimizer)
        snapshot = _Snapshot(step)
        for name, tensor in _trained(model).items():
            snapshot.tensors[name] = _copy_out(tensor, old.get(name))
        for number, parameter in enumerate(_parameters(optimizer)):
            values = optimizer.state.get(parameter, {})
            snapshot.state[number] = {
                key: _copy_out(value, old.get((number, key)))
                if isinstance(value, Tensor)
                else deepcopy(value)
                for key, value in values.items()
            }
        snapshot.groups = [
            {
                key: deepcopy(value)
                for key, value in group.items()
                if key not in _NOT_KEPT and not isinstance(value, Tensor)
            }
            for group in optimizer.param_groups
        ]
        snapshot.scaler = deepcopy(scaler.state_dict()) if scaler is not None else {}
        self._snapshots.append(snapshot)

    def drop_newest(self) -> None:
        """Drop the newest snapshot, so that another one can replace it."""
        self._snapshots.pop()

    @torch.no_grad()
    def restore(
        self, model: nn.Module, optimizer: Any, scaler: Any = None, before: int | None = None
    ) -> int:
        """Restore the newest snapshot, or the newest of step `before` or earlier; drop later ones.
        Return its step.

        Optimizer state that did not exist at that step is dropped. Buffers that the model did not
        have then, or had in another shape, keep their values: a recipe that has changed since may
        have brought them. Gradients keep their values, too.

        Raises:
            LookupError: there is no such snapshot.
        """
        while self._snapshots and before is not None and self._snapshots[-1].step > before:
            self._snapshots.pop()
        if not self._snapshots:
            raise LookupError(
                "no snapshot to go back to"
                if before is None
                else f"no snapshot of step {before} or earlier"
            )
        snapshot = self._snapshots[-1]
        optimizer = _unwrapped(optimizer)
        for name, tensor in _trained(model).items():
            if name in snapshot.tensors:
                _copy_back(snapshot.tensors[name], tensor)
        _restore_optimizer(snapshot, optimizer)
        if scaler is not None and snapshot.scaler:
            scaler.load_state_dict(deepcopy(snapshot.scaler))
        # The cache of codes notices a copy into a plain weight. It does not notice a copy into the
        # parts of a weight that is made of other tensors.
        forget_weights()
        return snapshot.step


def _restore_optimizer(snapshot: _Snapshot, optimizer: torch.optim.Optimizer) -> None:
    if not any(snapshot.state.values()):
        optimizer.state.clear()
    for number, parameter in enumerate(_parameters(optimizer)):
        saved = snapshot.state.get(number)
        if not saved:
            optimizer.state.pop(parameter, None)
            continue
        state = optimizer.state[parameter]
        for key in [key for key in state if key not in saved]:
            del state[key]
        for key, value in saved.items():
            if not isinstance(value, _Held):
                state[key] = deepcopy(value)
            elif not (isinstance(state.get(key), Tensor) and _copy_back(value, state[key])):
                parts = iter(value.parts)
                state[key] = _build(
                    value.form, lambda device, parts=parts: next(parts).to(device, copy=True)
                )
    for group, saved in zip(optimizer.param_groups, snapshot.groups, strict=False):
        group.update(deepcopy(saved))


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes in a model: trainable parameters and buffers, by name."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        # After a forward pass without a backward FSDP2 may hold gathered parameters. The next
        # forward would use them instead of the restored shards.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    trainable = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return {**trainable, **dict(model.named_buffers())}


def _parts(tensor: Any) -> list[Tensor]:
    """Return the plain tensors that a tensor is made of, which share its memory: a DTensor's local
    shard, the codes and scales of quantised state."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.detach()]
    names, _ = tensor.__tensor_flatten__()
    inner = [getattr(tensor, name) for name in names]
    return [part for value in inner if isinstance(value, Tensor) for part in _parts(value)]


def _form(tensor: Any) -> Any:
    """Return a description of how a tensor is made of its parts, for `_build`. It is the device for
    a plain tensor; for another value than a tensor, such as a DTensor's mesh, it is the value."""
    if not isinstance(tensor, Tensor):
        return tensor
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.device
    names, context = tensor.__tensor_flatten__()
    return (
        type(tensor),
        {name: _form(getattr(tensor, name)) for name in names},
        context,
        tensor.size(),
        tensor.stride(),
    )


def _build(form: Any, part: Callable[[torch.device], Tensor]) -> Any:
    """Make a tensor of the form `form`. `part` returns the next plain tensor, on the given
    device."""
    if isinstance(form, torch.device):
        return part(form)
    if not isinstance(form, tuple):
        return form
    kind, inner, context, size, stride = form
    return kind.__tensor_unflatten__(
        {name: _build(of_part, part) for name, of_part in inner.items()}, context, size, stride
    )


def _fits(parts: list[Tensor], others: list[Tensor]) -> bool:
    return [(part.shape, part.dtype) for part in parts] == [
        (other.shape, other.dtype) for other in others
    ]


def _copy_out(tensor: Tensor, old: _Held | None) -> _Held:
    """Copy `tensor` to host memory, to that of `old` if it fits."""
    parts = _parts(tensor)
    if old is not None and _fits(old.parts, parts):
        hosts = old.parts
    else:
        hosts = [torch.empty_like(part, device="cpu", pin_memory=part.is_cuda) for part in parts]
    for host, part in zip(hosts, parts, strict=True):
        host.copy_(part, non_blocking=True)
    return _Held(parts=hosts, form=_form(tensor))


def _copy_back(held: _Held, tensor: Tensor) -> bool:
    """Copy a snapshot's tensor to `tensor`; return False, and copy nothing, if shape or dtype
    differ."""
    parts = _parts(tensor)
    if not _fits(held.parts, parts):
        return False
    for part, host in zip(parts, held.parts, strict=True):
        part.copy_(host, non_blocking=True)
    return True
