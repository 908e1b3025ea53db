"""The optimizer of a run: the class that the Trainer makes it of, and checks of its settings.

The Trainer makes its optimizer and scheduler late, when the run's directory exists already. The
checks here find wrong settings before that.
"""

from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from lowprec.errors import UserError
from lowprec.training.optim.adamw import OptimizerConfig, build, prepare_weights


def optimizer_for_trainer(
    config: OptimizerConfig, args: TrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Return the class and the settings that the Trainer makes its optimizer of.

    The result is None if weights and moments are fp32. The Trainer then makes the optimizer that
    `trainer.optim` names.

    Raises:
        UserError: `trainer.optim` is not AdamW, or AdamW can't be made in these formats.
    """
    if config == OptimizerConfig():
        return None
    name = OptimizerNames(args.optim).value
    if not name.startswith("adamw_torch"):
        raise UserError(
            f"optimizer: these weights and moments are AdamW's, but trainer.optim is {name}"
        )

    # A class, because the Trainer calls a function in another way, as a factory of optimizers.
    class AdamW(torch.optim.Optimizer):
        def __new__(cls, parameters: Any, **settings: Any) -> Any:
            return build(config, parameters, **settings)

    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    # An optimizer of a small weight is made now, so that an error in the settings shows now.
    layer = torch.nn.Linear(1, 1)
    prepare_weights(layer, config)
    AdamW(layer.parameters(), **settings)
    return AdamW, settings


def check_optimizer(config: OptimizerConfig, args: TrainingArguments) -> None:
    """Raise UserError if the Trainer can't make the optimizer of this run."""
    if optimizer_for_trainer(config, args) is not None:
        return
    name = OptimizerNames(args.optim).value
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        if kind.__module__.startswith(("torch.optim", "transformers.")):
            kind(torch.nn.Linear(1, 1).parameters(), **settings)
    except Exception as error:
        # Some optimizers need the model, which is not built yet: "pass a model" is no error here.
        if "pass a" not in str(error):
            raise UserError(f"trainer.optim: {name}: {error}") from None


def check_scheduler(args: TrainingArguments) -> None:
    """Raise UserError if the learning-rate schedule lacks a setting or gets an unknown one."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    settings: Any = args.lr_scheduler_kwargs
    steps = 1000
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            args.get_warmup_steps(steps),
            steps,
            settings,
        )
        if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            optimizer.step()
            scheduler.step()
    except Exception as error:
        # The settings go to functions of transformers and torch, which do with them as they like.
        raise UserError(
            f"trainer.lr_scheduler_kwargs: {SchedulerType(args.lr_scheduler_type).value}: {error}"
        ) from None
