"""torchao's 8- and 4-bit moments as plain tensors in optimizer state dicts, sharded or not.

torchao keeps a quantised moment as one tensor of its own class, inside a DTensor if the weight is
sharded. Such tensors can be trained with, but the functions that load sharded checkpoints can't
split or broadcast them. So in a state dict a moment `exp_avg` becomes two plain tensors:
`exp_avg.codes` (uint8) and `exp_avg.scale` (fp32, one for each block of values). Both are sharded
as the weight is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

CODES = ".codes"
SCALE = ".scale"

LEAST = 4096
"""Least number of values of a parameter whose moments are quantised (arXiv 2110.02861, section 2.2:
small tensors gain little)."""


def can_be_quantised(parameter: Tensor, block: int) -> bool:
    """Return True if the moments of `parameter` can be kept in blocks of `block` values.

    Every rank must hold whole blocks. The answer is the same on all ranks.
    """
    if parameter.numel() < LEAST or parameter.numel() % block:
        return False
    shards = _shards(parameter)
    if shards is None:
        return False
    rows = parameter.shape[0]
    if _rows_of_blocks(parameter, block):
        # torch.chunk cuts the rows into shards; none of them may be empty.
        return rows > (shards - 1) * -(-rows // shards)
    return rows % shards == 0 and parameter.numel() // shards % block == 0


def take_apart(state: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter's optimizer state with each quantised moment as its codes and scale."""
    apart: dict[str, Any] = {}
    for name, value in state.items():
        moment = value.to_local() if isinstance(value, DTensor) else value
        if isinstance(moment, Tensor) and is_traceable_wrapper_subclass(moment):
            apart |= {
                name + suffix: part
                for suffix, part in zip((CODES, SCALE), _parts(value), strict=True)
            }
        else:
            apart[name] = value
    return apart


def put_together(name: str, state: dict[str, Any], moment: Tensor) -> Tensor:
    """Return the quantised moment `name` of a state that `take_apart` returned.

    Args:
        moment: A new moment of the parameter. The saved values are copied into its memory.
    Raises:
        ValueError: the parts have other shapes, so they belong to another parameter or to other
            shards.
    """
    for suffix, part in zip((CODES, SCALE), _local_parts(moment), strict=True):
        saved = state[name + suffix]
        if saved.shape != _whole(part, moment) or _local(saved).shape != part.shape:
            raise ValueError(
                f"{name}{suffix} of shape {list(saved.shape)}, expected "
                f"{list(_whole(part, moment))}"
            )
        part.copy_(_local(saved))
    return moment


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which is all of it unless it is a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shards(tensor: Tensor) -> int | None:
    """Return the number of shards of the rows of `tensor`; None if another dimension is sharded."""
    if not isinstance(tensor, DTensor):
        return 1
    cut = [
        size
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        if placement != Replicate()
    ]
    by_rows = all(placement in (Replicate(), Shard(0)) for placement in tensor.placements)
    if not by_rows or len(cut) > 1:
        return None
    return cut[0] if cut else 1


def _rows_of_blocks(tensor: Tensor, block: int) -> bool:
    """Return True if each row consists of whole blocks.

    Codes and scale can be sharded by rows then, as the tensor is, evenly or not.
    """
    return tensor.numel() // tensor.shape[0] % block == 0


def _local_parts(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of this rank's codes and scale: [rows, ...] if each row consists of whole
    blocks, else flat."""
    local: Any = _local(moment)
    rows = _rows_of_blocks(moment, local.block_size)
    codes, scale = (
        part.view(local.shape[0], -1) if rows else part.view(-1)
        for part in (local.codes, local.scale)
    )
    return codes, scale


def _whole(part: Tensor, moment: Tensor) -> torch.Size:
    """Return the shape of all ranks' parts together."""
    if part.dim() == 2:
        return torch.Size((moment.shape[0], part.shape[1]))
    return torch.Size((part.numel() * (_shards(moment) or 1),))


def _parts(moment: Tensor) -> tuple[Tensor, ...]:
    """Return the codes and scale of a moment, as DTensors if the moment is one."""
    parts = _local_parts(moment)
    if not isinstance(moment, DTensor):
        return parts
    return tuple(_sharded(part, moment) for part in parts)


def _sharded(part: Tensor, moment: DTensor) -> Tensor:
    """Return this rank's `part` as a DTensor that is sharded as `moment` is."""
    stride = (part.shape[1], 1) if part.dim() == 2 else (1,)
    whole = DTensor.from_local(
        part,
        moment.device_mesh,
        moment.placements,
        run_check=False,
        shape=_whole(part, moment),
        stride=stride,
    )
    # from_local put it on the mesh's device. An offloaded moment is in host memory.
    return whole.to(moment.device)
