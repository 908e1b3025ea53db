"""Automatic mixed precision for a training loop of one's own: autocast, and the loss scaling of
fp16.

Small gradients are zero in fp16: its smallest positive number is 2^-24. So the loss is multiplied
by a large scale before the backward, and the gradients are divided by it afterwards (arXiv
1710.03740, section 3.2). The scale is dynamic: when a gradient overflows, the scale falls and the
step is skipped; after a number of steps without overflow it rises.
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
    """The result of an optimizer step."""

    skipped: bool
    """Flag: a gradient was Inf or NaN under fp16, on some rank. So neither weights nor optimizer
    state have changed."""
    grad_norm: Tensor | None
    """2-norm of all unscaled gradients before clipping, over the shards of all ranks, as an fp32
    scalar; None without `max_norm`."""
    loss_scale: float | None
    """Loss scale of the next backward; None without loss scaling."""


class Amp:
    """Mixed precision in a training loop of one's own, on one device, in DDP or in FSDP2.

        amp = Amp("fp16", model)
        for batch in batches:
            with amp.autocast():
                loss = model(batch)
            amp.backward(loss)
            amp.step(optimizer, max_norm=1.0)
            optimizer.zero_grad()

    Args:
        precision: "bf16" (autocast), "fp16" (autocast with loss scaling) or "off".
        model: the model to train, after it was moved, converted and wrapped.
        loss_scaling: settings for fp16.
        device_type: "cpu" or "cuda"; None: the type of the model's first parameter.
    Attributes:
        scaler: the LossScaler; None without fp16.
    Raises:
        UserError: the precision or the device type is another word, or "fp16" has to train fp16
            weights.
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
        """Return the context for the forward pass; "off" also switches an outer autocast off."""
        return torch.autocast(
            self.device_type, dtype=_DTYPES[self.precision], enabled=self.precision != "off"
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss, scaled under fp16. To accumulate over n batches, pass
        loss / n for each."""
        loss = loss.float()  # a loss in fp16 would overflow when it is scaled
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        self._backward_since_step = True
        loss.backward()

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> StepInfo:
        """Unscale the gradients, clip their norm to `max_norm`, step unless a gradient is not
        finite (under fp16), and adapt the scale.

        The gradients stay; the caller clears them.

        Raises:
            LossScaleError: the scale fell below its floor.
            UserError: there was no backward since the last step. After a step, the scale of the
                gradients of a second optimizer is unknown: give one optimizer all parameters, in
                groups.
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
        """Return the state of the loss scaler, numbers only; an empty dict without loss scaling."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the result of `state_dict`, or of a GradScaler's. An empty dict (from a run without
        fp16) keeps the configured scale."""
        if self.scaler is not None and state_dict:
            self.scaler.load_state_dict(state_dict)


def _clip(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
