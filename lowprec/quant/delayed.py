"""Delayed scaling: a tensor is scaled by the amaxes that it had before (arXiv 2209.05433, section
3), so that no pass waits for its own."""

import torch
from torch import Tensor


# An operator of its own, because it must run once: compiled code may otherwise compute the scale
# again in the backward, from a history that has moved on since.
@torch.library.custom_op("lowprec::delayed_amax", mutates_args={"history"})
def delayed_amax(history: Tensor, amax: Tensor) -> Tensor:
    """The amax to scale by; then `amax`, unless it is not finite, becomes the newest of `history`.

    Args:
        history: fp32 [n], oldest first, zeros for none.
        amax: fp32, one element, any shape: the current one.
    Returns:
        The largest of the history, of amax's shape; the current one while the history is empty, or
        if it is not finite, so that an overflow is seen.
    """
    current, largest = amax.reshape(()), history.amax()
    chosen = torch.where((largest > 0) & current.isfinite(), largest, current)
    history.copy_(
        torch.cat((history[1:], torch.where(current.isfinite(), current, largest).reshape(1)))
    )
    return chosen.reshape(amax.shape).clone()


@delayed_amax.register_fake
def _(history: Tensor, amax: Tensor) -> Tensor:
    return torch.empty_like(amax)
