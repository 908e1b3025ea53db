"""A run's configuration after its first checks, and the facts that follow from it."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainingArguments

from lowprec.conversion.convert import make_plan
from lowprec.conversion.plan import PartPlan, Plan
from lowprec.distributed.processes import world_size
from lowprec.training.control.precision import PrecisionConfig
from lowprec.training.control.schedule import make_schedule
from lowprec.training.run.config import RunConfig
from lowprec.training.run.machine import resolve_device
from lowprec.training.run.training_args import autocast_settings, check_trainer


@dataclass(frozen=True, kw_only=True)
class RunSetup:
    """The configuration of a run, with its `trainer:` section checked and its device resolved.

    `RunSetup.of` makes one.
    """

    config: RunConfig
    device_type: str
    """Type of the device that trains: "cpu" or "cuda"."""
    trainer: dict[str, Any]
    """Settings below `trainer:`, each converted to the type of its field."""

    @classmethod
    def of(cls, config: RunConfig) -> "RunSetup":
        """Return the setup of a run on this machine.

        Raises:
            UserError: there is no such device, or a setting below `trainer:` is wrong.
        """
        return cls(
            config=config,
            device_type=resolve_device(config.device),
            trainer=check_trainer(config.trainer),
        )

    @property
    def compiled(self) -> bool:
        """Flag: the decoder blocks are compiled."""
        return self.config.compile == "blocks"

    @property
    def tokens(self) -> int:
        """Number of tokens in a forward pass on one device."""
        batch = self.trainer.get(
            "per_device_train_batch_size", TrainingArguments.per_device_train_batch_size
        )
        return batch * self.config.data.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens in an optimizer step, over all ranks."""
        accumulated = self.trainer.get(
            "gradient_accumulation_steps", TrainingArguments.gradient_accumulation_steps
        )
        return self.tokens * accumulated * world_size()

    @property
    def max_steps(self) -> int | None:
        """Number of optimizer steps. None if it depends on the data (`num_train_epochs`)."""
        steps = self.trainer.get("max_steps", -1)
        return steps if steps > 0 else None

    def autocast(self) -> tuple[dict[str, Any], PartPlan]:
        """Return the Trainer's `bf16` and `fp16`, and their row in the plan."""
        return autocast_settings(
            self.trainer,
            self.config.precision.recipe,
            self.device_type,
            bf16_weights=self.config.optimizer.weights == "bf16",
        )

    def plan_layers(self, model: nn.Module, precision: PrecisionConfig) -> Plan:
        """Return the plan of the linear layers of `model` in `precision`."""
        return make_plan(
            model,
            precision,
            device=self.device_type,
            tokens=self.tokens,
            compiled=self.compiled,
        )

    def check_schedule(self, steps: int) -> None:
        """Raise UserError if the precision's schedule does not fit a run of `steps` steps."""
        make_schedule(self.config.precision.schedule, steps, self.tokens_per_step, warn=False)
