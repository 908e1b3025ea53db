"""Dynamic loss scaling of fp16 training, also for a GradScaler that somebody else owns.

Small gradients are zero in fp16: its smallest positive number is 2^-24. So the loss is multiplied
by a large scale before the backward and the gradients are divided by it after (arXiv 1710.03740,
section 3.2). The scale is dynamic: it falls when a gradient overflows, and that step is skipped; it
rises after a while without.
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

NO_FP16_ON_A_CPU = "trainer.fp16: fp16 autocast with loss scaling needs CUDA; on a CPU use precision.recipe=fp16 to emulate its rounding"


class LossScalingConfig(StrictConfig):
    """Dynamic loss scaling of fp16 training (torch.amp.GradScaler; arXiv 1710.03740, section
    3.2)."""

    init_scale: float = Field(default=2.0**16, gt=0, le=2.0**126)
    growth_factor: float = Field(default=2.0, gt=1)
    backoff_factor: float = Field(default=0.5, gt=0, lt=1)
    growth_interval: int = Field(default=2000, ge=1)
    """Steps without overflow after which the scale grows."""
    min_scale: float = Field(default=1.0, gt=0)
    """Training stops with an error when the scale falls below it: gradients that overflow unscaled
    are not a matter of the scale."""

    @model_validator(mode="after")
    def _starts_above_the_floor(self) -> "LossScalingConfig":
        if self.init_scale < self.min_scale:
            raise ValueError(
                f"init_scale {self.init_scale:g} is below min_scale {self.min_scale:g}"
            )
        return self


class LossScaleError(TrainingStopped):
    """The loss scale fell below its floor: the gradients overflow, or are NaN, at any scale."""


def configure(
    scaler: torch.amp.GradScaler, config: LossScalingConfig, *, resumed: bool = False
) -> None:
    """Give a GradScaler the settings of `config`; a disabled one is left alone.

    Args:
        scaler: anybody's, the Trainer's for one (`optimizer.scaler` of the optimizer that
            Accelerate wrapped).
        resumed: whether its state came from a checkpoint: the scale and the count of steps since it
            last changed are kept then.
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
    """Before a checkpoint is loaded, the scaler's own state last: make the scale that a scaler
    makes when it is first used.

    To load a sharded optimizer's state torch first takes an empty step of the optimizer
    (torch.distributed.checkpoint.state_dict), in which the scaler of Accelerate's wrapping takes
    part, and fails without a scale.
    """
    if scaler.is_enabled():
        scaler.scale(torch.ones((), device=device))


def check_floor(
    scaler: torch.amp.GradScaler, config: LossScalingConfig, step: int, skipped: int
) -> None:
    """Stop where the loss scale is below `config.min_scale`. It reads the scale, which waits for
    the device.

    Args:
        step: optimizer steps so far, for the message.
        skipped: those of them that were skipped.
    Raises:
        LossScaleError: it is.
    """
    scale = scaler.get_scale()
    if scaler.is_enabled() and scale < config.min_scale:
        raise LossScaleError(
            f"the loss scale fell to {scale:g}, below its floor {config.min_scale:g}, at optimizer "
            f"step {step} ({skipped} steps skipped): "
            "train in bf16, lower the learning rate, or look for what is Inf or NaN in the model"
        )


def check_weights(model: nn.Module) -> None:
    """Whether loss scaling can train the model's weights.

    Raises:
        UserError: a trainable parameter is fp16: its gradient would be, too, and can't be unscaled
            without losing what scaling saved.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise UserError(
                f"fp16 training: parameter '{name}' is float16 already; load the model in float32, "
                "autocast does the rest"
            )


class LossScaler(torch.amp.GradScaler):
    """torch's GradScaler, for sharded gradients too: when a gradient of one rank overflows, all
    ranks skip the step.

    A scaler serves all optimizers that step between two calls of `update`. Every rank of the
    default process group has to take part.

    Attributes:
        steps: calls of `update` so far.
        skipped_steps: those before which at least one optimizer's step was skipped.
        skipped_in_a_row: how many of them were the last ones.
    Raises:
        UserError: CUDA is asked for where there is none. (torch would warn, and train without
            scaling.)
    """

    def __init__(self, config: LossScalingConfig | None = None, device_type: str = "cuda") -> None:
        if device_type == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "loss scaling on cuda: there is no CUDA device; on a CPU say device_type='cpu'"
            )
        self.config = config or LossScalingConfig()
        self.steps = self.skipped_steps = self.skipped_in_a_row = 0
        super().__init__(
            device_type,
            init_scale=self.config.init_scale,
            growth_factor=self.config.growth_factor,
            backoff_factor=self.config.backoff_factor,
            growth_interval=self.config.growth_interval,
        )

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """torch's, on the local part of sharded gradients: it takes no list of sharded and plain
        ones, and no optimizer without any."""
        grads: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for parameter in (
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ):
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
        """torch's, and the counts.

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
        """torch's entries and the counts: numbers, which JSON holds too. After `update`."""
        counts = {
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        return super().state_dict() | counts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From `state_dict`, or a GradScaler's. As there, the saved factors and interval take the
        place of the configured ones."""
        super().load_state_dict(state_dict)
        self.steps = state_dict.get("steps", 0)
        self.skipped_steps = state_dict.get("skipped_steps", 0)
        self.skipped_in_a_row = state_dict.get("skipped_in_a_row", 0)


def _values(grad: Tensor) -> Tensor:
    """The memory that holds this rank's part of a gradient."""
    if isinstance(grad, DTensor):
        return grad.to_local()
    return grad._values() if grad.is_sparse else grad
