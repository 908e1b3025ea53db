"""Delayed scaling on several ranks: all ranks scale by the same amax histories."""

import torch
import torch.distributed as dist
from torch import nn

from lowprec.nn.linear import LowPrecisionLinear
from lowprec.nn.te_linear import DelayedTELinear


@torch.no_grad()
def share_histories(model: nn.Module) -> None:
    """Give every rank the largest amaxes that any rank has seen, in place.

    Call it on all ranks after each optimizer step. All ranks then use the same scales, as under
    Transformer Engine's `reduce_amax`. A checkpoint holds the buffers of one rank; because all
    ranks have the same histories, every rank of a resumed run uses the scales that it used before.

    It does nothing in a single process, or if no layer's present recipe scales by a history.
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
    # Transformer Engine's amaxes since its last update may be NaN or infinity. Its update counts
    # them as zero, and so does this.
    together = torch.cat([history.flatten() for history in histories]).nan_to_num_(
        nan=0.0, posinf=0.0
    )
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    parts = together.split([history.numel() for history in histories])
    torch._foreach_copy_(
        histories, [part.view_as(history) for part, history in zip(parts, histories, strict=True)]
    )
