"""Counts the tokens that a run trains on, as the model gets them.

A declared number is wrong where a batch is smaller than planned: the last one of an epoch, one that
`auto_find_batch_size` has halved, or one of shorter sequences. So phases in tokens end by this
count. It is taken from shapes alone, so it does not wait for the device. Padding counts: it goes
through the layers as any token does.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.distributed.agree import sum_over_ranks
from lowprec.errors import UserError

logger = logging.getLogger("lowprec")

_NAMES = ("input_ids", "inputs_embeds")
"""Names of a language model's input, the first one that is given counts."""


class TokensSeen:
    """The tokens that the passes of training have had; a part of the controller's state."""

    def __init__(self) -> None:
        self.total: int | None = None
        """Number of tokens of all finished steps, over all ranks; None if nothing needs it."""
        self._first: int | None = None
        """Number of tokens of the first pass on this rank since `watch`; None if it has been
        taken."""
        self._awaits_first = False
        self._pending = 0
        """Number of tokens of this rank in the step that is running."""
        self._model: nn.Module | None = None
        self._handle: Any = None

    def watch(self, model: nn.Module) -> None:
        """Count the passes of `model` from the next `begin_step` on. It is the object that the
        training loop calls, so that the hook is not part of compiled code."""
        self.detach()
        self._model = model
        self._first = None
        self._awaits_first = True
        self._pending = 0

    def begin_step(self) -> None:
        """Count the passes of the model that is watched."""
        if self._handle is None and self._model is not None:
            self._handle = self._model.register_forward_pre_hook(self._count, with_kwargs=True)

    def detach(self) -> None:
        """Count no more."""
        self._model = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def begin(self, step: int, expected: int | None) -> None:
        """Begin to add up, after `step` finished steps.

        Args:
            step: number of finished steps.
            expected: number of tokens that a step was expected to have, if known. It stands in for
                the count of a checkpoint that has none.
        Raises:
            UserError: neither the count nor the expected number is known.
        """
        if self.total is not None:
            return
        if step and expected is None:
            raise UserError(
                "precision.schedule: the checkpoint does not say how many tokens its steps had, "
                "which the phases in tokens need; give `tokens`, those of a forward pass"
            )
        self.total = step * (expected or 0)

    def end_step(self) -> None:
        """Add the tokens of the step that has just ended, over all ranks. All of them call it."""
        assert self.total is not None
        (seen,) = sum_over_ranks([self._pending])
        self.total += seen
        self._pending = 0

    def take_first(self) -> int | None:
        """Return the number of tokens of the first pass on this rank since `watch`, once."""
        first = self._first
        self._first = None
        return first

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A reference that is the same model without its adapters runs without gradients.
        if not (model.training and torch.is_grad_enabled()):
            return
        tokens = count_tokens(model, args, kwargs)
        self._pending += tokens
        if self._awaits_first:
            self._awaits_first = False
            self._first = tokens


def count_tokens(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of tokens in the inputs of a pass: the elements of a tensor of whole
    numbers (ids), or the vectors of another one (embeddings)."""
    main = getattr(model, "main_input_name", None)
    named = [kwargs.get(name) for name in (*_NAMES, main) if name is not None]
    tensors = (value for value in (*named, *args, *kwargs.values()) if isinstance(value, Tensor))
    first = next(tensors, None)
    if first is None:
        return 0
    if first.is_floating_point() and first.dim() > 1:
        return math.prod(first.shape[:-1])
    return first.numel()


def compare_first_pass(
    seen: int, declared: int | None, plan_for: Callable[[int | None], str]
) -> None:
    """Warn if the plan supposes another number of tokens than the first pass of training had.

    The plan stays as it is: a run that resumes begins with another batch, and must have the same
    plan.

    Args:
        seen: number of tokens of the first pass on this device.
        declared: number of tokens that the user has declared; None if there is none.
        plan_for: returns the plan for a number of tokens, in words.
    """
    if declared is not None and not declared / 2 < seen < 2 * declared:
        logger.warning(
            "tokens=%d was declared, but the first pass has %d on this device: the plan supposes "
            "the declared number; phases in tokens end by what is seen",
            declared,
            seen,
        )
        return
    plan = plan_for(seen)
    if plan != plan_for(declared):
        logger.warning(
            "the first pass has %d tokens on this device, for which the plan would be another one; "
            "with tokens=%d it is: %s",
            seen,
            seen,
            plan,
        )
