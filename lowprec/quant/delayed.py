"""Delayed scaling: a tensor is scaled by the amaxes of earlier passes, so no pass waits for its own
amax (arXiv 2209.05433, section 3)."""

import torch
from torch import Tensor


# An operator of its own, because it must run exactly once: compiled code may otherwise compute the
# scale a second time in the backward, from a history that has changed since.
@torch.library.custom_op("lowprec::delayed_amax", mutates_args={"history"})
def delayed_amax(history: Tensor, amax: Tensor) -> Tensor:
    """Return the amax to scale by, then append `amax` to `history`, in place.

    An amax that is not finite is not recorded: the largest amax of the history is appended instead.

    Args:
        history: fp32 [n], oldest first; zeros are empty places.
        amax: the amax of the current tensor, fp32, one element, any shape.
    Returns:
        The largest amax of the history, in the shape of `amax`. It is the current amax while the
        history is empty, and also if the current amax is not finite, so that an overflow is seen.
    """
    current = amax.reshape(())
    largest = history.amax()
    chosen = torch.where((largest > 0) & current.isfinite(), largest, current)
    newest = torch.where(current.isfinite(), current, largest).reshape(1)
    history.copy_(torch.cat((history[1:], newest)))
    return chosen.reshape(amax.shape).clone()


@delayed_amax.register_fake
def _(history: Tensor, amax: Tensor) -> Tensor:
    return torch.empty_like(amax)
