"""Dynamic loss scaling of fp16 training, also with a GradScaler that another library owns.

Small gradients become zero in fp16: its smallest positive number is 2^-24. So the loss is
multiplied by a large scale before the backward, and the gradients are divided by it afterwards
(arXiv 1710.03740, section 3.2). The scale is dynamic. If a gradient overflows, the step is skipped
and the scale falls. After a number of steps without overflow it rises.
"""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowprec.config.schema import StrictConfig
from lowprec.errors import TrainingStopped, UserError

NO_FP16_ON_A_CPU = (
    "trainer.fp16: fp16 autocast with loss scaling needs CUDA; on a CPU use precision.recipe=fp16 "
    "to emulate its rounding"
)


class LossScalingConfig(StrictConfig):
    """Settings of dynamic loss scaling for fp16 training (torch.amp.GradScaler; arXiv 1710.03740,
    section 3.2)."""

    init_scale: float = Field(default=2.0**16, gt=0, le=2.0**126)
    """Scale of the first step."""
    growth_factor: float = Field(default=2.0, gt=1, le=2.0**32)
    """Factor by which the scale rises."""
    backoff_factor: float = Field(default=0.5, gt=0, lt=1)
    """Factor by which the scale falls after an overflow."""
    growth_interval: int = Field(default=2000, ge=1)
    """Number of steps without overflow after which the scale rises."""
    min_scale: float = Field(default=1.0, gt=0)
    """Floor of the scale: training stops with an error if the scale falls below it. Gradients that
    overflow without scaling have another cause than the scale."""

    @model_validator(mode="after")
    def _starts_above_the_floor(self) -> "LossScalingConfig":
        if self.init_scale < self.min_scale:
            raise ValueError(
                f"init_scale {self.init_scale:g} is below min_scale {self.min_scale:g}"
            )
        return self


class LossScaleError(TrainingStopped):
    """The loss scale fell below its floor: gradients overflow, or are NaN, at any scale."""


def configure(
    scaler: torch.amp.GradScaler, config: LossScalingConfig, *, resumed: bool = False
) -> None:
    """Give a GradScaler the settings of `config`. A disabled scaler is not changed.

    Args:
        scaler: A scaler of any owner, such as the Trainer's (`optimizer.scaler` of the optimizer
            that Accelerate wrapped).
        resumed: Flag: the scaler's state came from a checkpoint, so its scale and its count of
            steps since the scale last changed are kept.
    """
    if not scaler.is_enabled():
        return
    settings = {
        "growth_factor": config.growth_factor,
        "backoff_factor": config.backoff_factor,
        "growth_interval": config.growth_interval,
    }
    fresh = {} if resumed else {"scale": config.init_scale, "_growth_tracker": 0}
    scaler.load_state_dict({**scaler.state_dict(), **settings, **fresh})


def prepare_to_load(scaler: torch.amp.GradScaler, device: torch.device | str) -> None:
    """Create the scale of a new scaler on `device`, before a checkpoint is loaded.

    Before torch loads a sharded optimizer's state, it takes an empty step of the optimizer
    (torch.distributed.checkpoint.state_dict). The scaler of Accelerate's wrapped optimizer takes
    part in that step and fails without a scale, which it creates only on first use. Load the
    scaler's own state after the optimizer's.
    """
    if scaler.is_enabled():
        scaler.scale(torch.ones((), device=device))


def check_floor(
    scaler: torch.amp.GradScaler, config: LossScalingConfig, step: int, skipped: int
) -> None:
    """Raise LossScaleError if the loss scale is below `config.min_scale`.

    Reading the scale waits for the device.

    Args:
        step: Number of optimizer steps so far, for the message.
        skipped: Number of those steps that were skipped.
    """
    scale = scaler.get_scale()
    if scaler.is_enabled() and scale < config.min_scale:
        raise LossScaleError(
            f"the loss scale fell to {scale:g}, below its floor {config.min_scale:g}, at optimizer "
            f"step {step} ({skipped} steps skipped): train in bf16, lower the learning rate, or "
            "look for what is Inf or NaN in the model"
        )


def check_weights(model: nn.Module) -> None:
    """Raise UserError if a trainable parameter is fp16.

    Its gradient would be fp16 too, and unscaling an fp16 gradient would lose the small values that
    scaling saved.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise UserError(
                f"fp16 training: parameter '{name}' is float16 already; load the model in float32, "
                "autocast does the rest"
            )


class LossScaler(torch.amp.GradScaler):
    """A torch.amp.GradScaler that also takes sharded gradients.

    If a gradient of one rank overflows, all ranks skip the step. A scaler serves all optimizers
    that step between two calls of `update`. Every rank of the default process group must take part.

    Attributes:
        steps: Number of calls of `update` so far.
        skipped_steps: Number of those calls before which at least one optimizer's step was skipped.
        skipped_in_a_row: Number of skipped steps since the last step that was not skipped.
    Raises:
        UserError: `device_type` is cuda and there is no CUDA device. (torch would warn, and train
            without scaling.)
    """

    def __init__(self, config: LossScalingConfig | None = None, device_type: str = "cuda") -> None:
        if device_type == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "loss scaling on cuda: there is no CUDA device; on a CPU say device_type='cpu'"
            )
        self.config = config or LossScalingConfig()
        self.steps = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        super().__init__(
            device_type,
            init_scale=self.config.init_scale,
            growth_factor=self.config.growth_factor,
            backoff_factor=self.config.backoff_factor,
            growth_interval=self.config.growth_interval,
        )

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: Tensor,
        found_inf: Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, Tensor]:
        """Unscale the gradients, sharded ones in their local part. Return the Inf flag by device.

        torch's method refuses a list of sharded and plain gradients, and an optimizer without
        gradients.
        """
        grads: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        parameters = (
            parameter for group in optimizer.param_groups for parameter in group["params"]
        )
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
            grad = _values(parameter.grad)
            if grad.dtype == torch.float16 and not allow_fp16:
                raise UserError(
                    "loss scaling: a gradient is float16 and can't be unscaled; load the model in "
                    "float32"
                )
            grads[grad.device, grad.dtype].append(grad)
        for (device, _), tensors in grads.items():
            found = torch.zeros((), device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, inv_scale.to(device))
            found_inf = torch.maximum(found_inf, found.to(found_inf.device))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Update the scale as torch does, and the counts.

        Raises:
            LossScaleError: the new scale is below the floor.
        """
        skipped = any(
            found.item()
            for state in self._per_optimizer_states.values()
            for found in state["found_inf_per_device"].values()
        )
        super().update(new_scale)
        self.steps += 1
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        check_floor(self, self.config, self.steps, self.skipped_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's entries and the counts, after `update`. All are numbers that JSON can
        hold."""
        counts = {
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        return super().state_dict() | counts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a LossScaler or of a torch.amp.GradScaler.

        As in torch, the saved factors and interval replace the configured ones.
        """
        super().load_state_dict(state_dict)
        self.steps = state_dict.get("steps", 0)
        self.skipped_steps = state_dict.get("skipped_steps", 0)
        self.skipped_in_a_row = state_dict.get("skipped_in_a_row", 0)


def _values(grad: Tensor) -> Tensor:
    """Return the tensor that holds this rank's values of a gradient."""
    if isinstance(grad, DTensor):
        return grad.to_local()
    return grad._values() if grad.is_sparse else grad
