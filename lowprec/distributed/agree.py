"""Whole numbers that the ranks of a run add up on the host, without a wait for the device."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

_groups: list[tuple[Any, Any]] = []
"""The process group of the run, and the group on the host that belongs to it; the last one only."""


def sum_over_ranks(values: Sequence[int]) -> list[int]:
    """Return the sums of `values` over all ranks, which must all call this function together.

    The sum runs on the host. Work that is queued on a GPU does not delay it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(sums, group=_host_group())
    return sums.tolist()


def _host_group() -> Any:
    """Return a process group of all ranks that reduces tensors in host memory."""
    world = dist.group.WORLD
    if not _groups or _groups[0][0] is not world:
        # Accelerate and torchrun programs on GPUs have NCCL alone.
        host = world if "cpu:" in dist.get_backend_config() else dist.new_group(backend="gloo")
        _groups[:] = [(world, host)]
    return _groups[0][1]
