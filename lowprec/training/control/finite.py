"""Losses that are not finite: they are shown as they are, and a run that can't recover ends.

The Trainer hides them (`logging_nan_inf_filter`): a step with a loss of NaN counts as the mean of
the steps before it, which is 0 if there are none. Without this filter the Trainer's sum would be
NaN until the end, also after a guard has gone back. So the filter stays, and the losses are summed
here, too. The sum is read when the Trainer logs or saves, so no step waits for it.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowprec.errors import TrainingStopped

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState


class LossSum:
    """The sum of the losses that a model has returned in training since the last log.

    A loss that is computed outside of the model is not seen here. Nor is that of a model that is
    compiled as a whole, because a hook would be a part of its graph. The norm of the gradients
    takes its place then.
    """

    def __init__(self) -> None:
        self.was_finite = True
        """Flag: all losses of the run were finite."""
        self.last = 0.0
        """Sum of the losses of the last log, or of a later check."""
        self.hopeless: str | None = None
        """The reason why the run can't continue; None if it can."""
        self._sum: Tensor | None = None
        self._handle: Any = None
        self._raises_later = False

    def begin(self, model: nn.Module, *, compiled: bool) -> None:
        """Begin a run of `model`."""
        self.end()
        self.was_finite = True
        self.last = 0.0
        self.hopeless = None
        self._sum = None
        if not compiled:
            self._handle = model.register_forward_hook(self._add)

    def end(self) -> None:
        """Remove the hook from the model."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def stop_if_hopeless(
        self,
        model: nn.Module,
        state: "TrainerState",
        control: "TrainerControl",
        norm: float | None = None,
        *,
        guarded: bool,
    ) -> None:
        """Let the Trainer end, without another checkpoint, if weights are not finite.

        They are looked at if a loss or a gradient was not finite, and before they are saved. Every
        rank calls this, and all decide alike.

        Args:
            norm: Norm of the gradients of the last step, if it is known.
            guarded: Flag: a guard watches the run. It goes back, or ends the run itself.
        """
        self.hopeless = self._reason(
            model, state.global_step, norm, saves=control.should_save, guarded=guarded
        )
        if self.hopeless is not None:
            control.should_training_stop = True
            control.should_save = False
            control.should_evaluate = False

    def raise_if_hopeless(self) -> None:
        """Raise TrainingStopped if the run can't continue, unless `raised_at_the_end` does."""
        if self.hopeless is not None and not self._raises_later:
            raise TrainingStopped(self.hopeless)

    @contextlib.contextmanager
    def raised_at_the_end(self) -> Iterator[None]:
        """Raise TrainingStopped at the end of the enclosed block if the run can't continue. Other
        callbacks of the Trainer see the end of training before that."""
        self._raises_later = True
        try:
            yield
        finally:
            self._raises_later = False
        self.raise_if_hopeless()

    def _reason(
        self, model: nn.Module, step: int, norm: float | None, *, saves: bool, guarded: bool
    ) -> str | None:
        """Return the reason why the run can't continue; None if it can."""
        seen = self._sum is not None
        self.last = self._read()
        finite = math.isfinite(self.last) and math.isfinite(0.0 if norm is None else norm)
        self.was_finite = self.was_finite and math.isfinite(self.last)
        if guarded or (finite and not saves):
            return None
        count = _weights_that_are_not_finite(model)
        if not count:  # A gradient may be infinite in a step that loss scaling skips.
            return None
        self.was_finite = False
        if not seen:
            self.last = math.nan
        return (
            f"{count} parameters of the model hold NaN or infinity after step {step}, so no later "
            f"step can be better (loss {self.last if seen else 'unknown'}, gradient norm "
            f"{'unknown' if norm is None else norm}); lower the learning rate, take another "
            "recipe, or let precision.guard: true go back and raise the precision"
        )

    def show(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of a log with the losses that the Trainer has hidden, and begin the
        sum of the next log."""
        if "loss" in logs:
            self._sum = None
            return {} if math.isfinite(self.last) else {"loss": self.last}
        if "train_loss" in logs and not self.was_finite:
            return {"train_loss": math.nan}
        return {}

    def _add(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            loss = loss.detach().float().sum()
            self._sum = loss if self._sum is None else self._sum + loss

    def _read(self) -> float:
        if self._sum is None:
            return 0.0
        total = self._sum.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        return total.item()


@torch.no_grad()
def _weights_that_are_not_finite(model: nn.Module) -> int:
    """Return the number of trainable parameters with NaN or infinity, over all ranks."""
    flags = []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            shard: Any = parameter
            local = shard.to_local() if hasattr(shard, "to_local") else shard
            flag = ~torch.isfinite(local).all()
            # A model may be spread over several devices.
            flags.append(flag.to(flags[0].device) if flags else flag)
    if not flags:
        return 0
    found = torch.stack(flags).int()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found.sum().item())
