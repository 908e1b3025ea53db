"""Delayed scaling on several ranks: one history of amaxes for all of them."""

import torch
import torch.distributed as dist
from torch import nn

from lowprec.nn.linear import LowPrecisionLinear
from lowprec.nn.te_linear import DelayedTELinear


@torch.no_grad()
def share_histories(model: nn.Module) -> None:
    """Give every rank the largest amaxes that any rank has seen, in place; call it after each
    optimizer step, on all ranks.

    All ranks then scale alike, as under Transformer Engine's `reduce_amax`, and one rank's buffers,
    which are what a checkpoint holds, speak for all: without, a run that resumes would scale
    differently on every rank but the first. Nothing is done for a single process, nor where no
    layer's present recipe scales by a history.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    layers = (
        module
        for module in model.modules()
        if isinstance(module, LowPrecisionLinear | DelayedTELinear)
    )
    histories = [history for layer in layers for history in layer.histories()]
    if not histories:
        return
    # What Transformer Engine has seen since its last update may be no number, which counts for
    # nothing there.
    together = torch.cat([history.flatten() for history in histories]).nan_to_num_(
        nan=0.0, posinf=0.0
    )
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    parts = together.split([history.numel() for history in histories])
    torch._foreach_copy_(
        histories, [part.view_as(history) for part, history in zip(parts, histories, strict=True)]
    )
