"""Automatic mixed precision for a training loop of one's own, and the loss scaling of fp16, also
for a GradScaler that somebody else owns.

Small gradients are zero in fp16: its smallest positive number is 2^-24. So the loss is multiplied
by a large scale before the backward and the gradients are divided by it after (arXiv 1710.03740,
section 3.2). The scale is dynamic: it falls when a gradient overflows, and that step is skipped; it
rises after a while without.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowprec.errors import UserError, nearest
from lowprec.training.optim.loss_scaling import LossScaler, LossScalingConfig, check_weights

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What an optimizer step did."""

    skipped: bool
    """A gradient was Inf or NaN under fp16, on some rank: neither weights nor optimizer state have
    changed."""
    grad_norm: Tensor | None
    """fp32 scalar: the 2-norm of all unscaled gradients before clipping, over all ranks' shards;
    None without `max_norm`."""
    loss_scale: float | None
    """That of the next backward; None without loss scaling."""


class Amp:
    """Mixed precision in a loop of one's own, on one device, in DDP or in FSDP2.

        amp = Amp("fp16", model)
        for batch in batches:
            with amp.autocast():
                loss = model(batch)
            amp.backward(loss)
            amp.step(optimizer, max_norm=1.0)
            optimizer.zero_grad()

    Args:
        precision: "bf16" or "fp16" autocast, the latter with loss scaling; or "off".
        model: what is trained, after it was moved, converted and wrapped.
        loss_scaling: settings for fp16.
        device_type: "cpu" or "cuda"; None: that of the model's first parameter.
    Attributes:
        scaler: the LossScaler; None without fp16.
    Raises:
        UserError: another word for the precision, fp16 weights in fp16, another device type.
    """

    def __init__(
        self,
        precision: str,
        model: nn.Module,
        *,
        loss_scaling: LossScalingConfig | None = None,
        device_type: str | None = None,
    ) -> None:
        if precision not in _DTYPES:
            raise UserError(
                f"unknown precision '{precision}' for autocast{nearest(precision, _DTYPES)}"
            )
        self.precision = precision
        self.device_type = device_type or next(
            (parameter.device.type for parameter in model.parameters()), "cpu"
        )
        if self.device_type not in ("cpu", "cuda"):
            raise UserError(
                "no mixed precision for device type "
                f"'{self.device_type}'{nearest(self.device_type, ['cpu', 'cuda'])}"
            )
        self.scaler: LossScaler | None = None
        self._backward_since_step = False
        if precision == "fp16":
            check_weights(model)
            self.scaler = LossScaler(loss_scaling, self.device_type)

    def autocast(self) -> AbstractContextManager[Any]:
        """What the forward runs in; "off" also switches an outer autocast off."""
        return torch.autocast(
            self.device_type, dtype=_DTYPES[self.precision], enabled=self.precision != "off"
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss, scaled under fp16. To accumulate over n batches, give
        each loss / n."""
        # A loss in fp16 would overflow when it is scaled.
        loss = loss.float()
        self._backward_since_step = True
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> StepInfo:
        """Unscale the gradients, clip their norm to `max_norm`, step unless one is not finite
        (under fp16), and adapt the scale.

        The gradients stay for the caller to clear.

        Raises:
            LossScaleError: the scale fell below its floor.
            UserError: no backward since the last step. After it the gradients of a second optimizer
                have a scale that is no longer known: give one optimizer all parameters, in groups.
        """
        if not self._backward_since_step:
            raise UserError(
                "amp.step: no amp.backward since the last step; for several optimizers, make one "
                "with parameter groups"
            )
        self._backward_since_step = False
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = None if max_norm is None else _clip(optimizer, max_norm)
        if self.scaler is None:
            optimizer.step()
            return StepInfo(skipped=False, grad_norm=norm, loss_scale=None)
        self.scaler.step(optimizer)
        self.scaler.update()
        return StepInfo(
            skipped=self.scaler.skipped_in_a_row > 0,
            grad_norm=norm,
            loss_scale=self.scaler.get_scale(),
        )

    def state_dict(self) -> dict[str, Any]:
        """The loss scaler's state, numbers only; empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From `state_dict`, or a GradScaler's. An empty one, of a run without fp16, leaves the
        scale as configured."""
        if self.scaler is not None and state_dict:
            self.scaler.load_state_dict(state_dict)


def _clip(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
