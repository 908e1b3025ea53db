"""torchao's 8- and 4-bit moments in optimizer states that are made of plain tensors, sharded or
not.

torchao keeps a quantised moment as one tensor of a class of its own, inside of a DTensor where the
weight is sharded. Those train, but the functions that load sharded checkpoints can't split or
broadcast them. In a state dict a moment `exp_avg` is two plain tensors, therefore, `exp_avg.codes`
(uint8) and `exp_avg.scale` (fp32, one for each block of values), which are sharded as the weight
is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

CODES, SCALE = ".codes", ".scale"

LEAST = 4096
"""Of fewer values a parameter's moments are not quantised (arXiv 2110.02861, section 2.2: small
tensors gain little)."""


def can_be_quantised(parameter: Tensor, block: int) -> bool:
    """Whether its moments can be kept in blocks of so many values: whole blocks on each rank, on
    all ranks or on none."""
    if parameter.numel() < LEAST or parameter.numel() % block:
        return False
    shards = _shards(parameter)
    if shards is None:
        return False
    rows = parameter.shape[0]
    if _rows_of_blocks(parameter, block):
        return rows > (shards - 1) * -(-rows // shards)  # torch.chunk's shards, none of them empty
    return rows % shards == 0 and parameter.numel() // shards % block == 0


def take_apart(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's optimizer state with each quantised moment as its parts."""
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
    """The moment `name` of a state that was taken apart, in the memory of `moment`, a new one of
    the parameter.

    Raises:
        ValueError: the parts have other shapes: they are of another parameter, or of shards that
            were cut otherwise.
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


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shards(tensor: Tensor) -> int | None:
    """How many pieces its rows are cut into; None if it is cut otherwise."""
    if not isinstance(tensor, DTensor):
        return 1
    cut = [
        size
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        if placement != Replicate()
    ]
    whole = all(placement in (Replicate(), Shard(0)) for placement in tensor.placements)
    return (cut[0] if cut else 1) if whole and len(cut) <= 1 else None


def _rows_of_blocks(tensor: Tensor, block: int) -> bool:
    """Whether each row is whole blocks, so that the parts are cut between rows as the tensor is,
    evenly or not."""
    return tensor.numel() // tensor.shape[0] % block == 0


def _local_parts(moment: Any) -> tuple[Tensor, Tensor]:
    """This rank's codes and scales, sharing their memory; [rows, ...] if rows are whole blocks and
    flat if not."""
    local: Any = _local(moment)
    rows = _rows_of_blocks(moment, local.block_size)
    codes, scale = (
        part.view(local.shape[0], -1) if rows else part.view(-1)
        for part in (local.codes, local.scale)
    )
    return codes, scale


def _whole(part: Tensor, moment: Tensor) -> torch.Size:
    """The shape of all ranks' parts together."""
    return torch.Size(
        (moment.shape[0], part.shape[1])
        if part.dim() == 2
        else (part.numel() * (_shards(moment) or 1),)
    )


def _parts(moment: Any) -> tuple[Tensor, ...]:
    parts = _local_parts(moment)
    if not isinstance(moment, DTensor):
        return parts
    return tuple(_sharded(part, moment) for part in parts)


def _sharded(part: Tensor, moment: DTensor) -> Tensor:
    stride = (part.shape[1], 1) if part.dim() == 2 else (1,)
    whole = DTensor.from_local(
        part,
        moment.device_mesh,
        moment.placements,
        run_check=False,
        shape=_whole(part, moment),
        stride=stride,
    )
    return whole.to(moment.device)  # not the mesh's, where weights are offloaded
