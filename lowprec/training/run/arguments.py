"""The Trainer's arguments of a run, with every check of them that needs neither data nor model.

The Trainer makes its optimizer, its scheduler and its loader of batches late, when files of the run
exist already. The checks here make small ones before.
"""

import logging
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from lowprec.conversion.plan import PartPlan
from lowprec.distributed.fsdp2 import check_can_shard, check_offloaded, offloads
from lowprec.distributed.processes import name_the_cpu, use_one_gpu, world_size
from lowprec.errors import UserError, nearest
from lowprec.training.callback import check_replay
from lowprec.training.log import show_log
from lowprec.training.optim.adamw import OptimizerConfig
from lowprec.training.run.environment import rule_environment
from lowprec.training.run.optimizer import check_optimizer, check_scheduler
from lowprec.training.run.setup import RunSetup
from lowprec.training.run.training_args import training_arguments

logger = logging.getLogger("lowprec")

_SPREADING = ("ddp_backend", "fsdp", "fsdp_config")


def make_arguments(setup: RunSetup) -> tuple[TrainingArguments, PartPlan]:
    """Return the Trainer's arguments, checked, and the row of autocast in the plan."""
    config = setup.config
    autocast, part = setup.autocast()
    args = training_arguments(setup.trainer, setup.device_type, autocast)
    gpus = use_one_gpu(args)
    if gpus > 1:
        show_log()
        logger.warning(
            "one process trains on one GPU of %d; torchrun or accelerate launch take all "
            "(docs/training.md)",
            gpus,
        )
    name_the_cpu(args)
    rule_environment(args, setup.device_type, compiled=setup.compiled)
    check_can_shard(args)
    if offloads(args):
        check_offloaded(
            scaled=args.fp16,
            low_bit=config.optimizer != OptimizerConfig(),
            keeps=config.precision.keeps_state,
        )
    _check(setup, args)
    _check_hub(args)
    return args, part


def check_arguments(setup: RunSetup) -> None:
    """Raise UserError if the settings below `trainer:` make no run, for `lowprec plan`.

    How processes share the work is not checked: a plan may be made on another machine than the run.
    In a run of several processes nothing is checked, because `make_arguments` follows.
    """
    if world_size() > 1:
        return
    autocast, _ = setup.autocast()
    settings = {name: value for name, value in setup.trainer.items() if name not in _SPREADING}
    _check(setup, training_arguments(settings, setup.device_type, autocast))


def _check(setup: RunSetup, args: TrainingArguments) -> None:
    check_replay(setup.config.precision.guard, args)
    check_optimizer(setup.config.optimizer, args)
    check_scheduler(args)
    _check_loader(args)
    _check_best_model(args)
    _check_accelerator(args)


def _check_accelerator(args: TrainingArguments) -> None:
    """Raise UserError for what Accelerate would refuse when the Trainer is made."""
    from accelerate.utils import DynamoBackend

    backends = [each.value.lower() for each in DynamoBackend]
    backend = args.torch_compile_backend
    if backend is not None and backend.lower() not in backends:
        hint = nearest(backend, backends)
        raise UserError(f"trainer.torch_compile_backend: unknown backend {backend!r}{hint}")
    parallel = args.parallelism_config
    if parallel is not None and parallel.total_size > 1:
        raise UserError(
            "trainer.parallelism_config: a run is spread by DDP or FSDP2 (trainer.fsdp); leave it "
            "out"
        )


def _check_hub(args: TrainingArguments) -> None:
    """Raise UserError if a run is to be pushed to the hub and the hub does not know the user."""
    if not args.push_to_hub or not args.should_save:
        return
    from huggingface_hub import whoami

    try:
        whoami(token=args.hub_token)
    except Exception as error:
        # No network, no token, a refused token, offline mode: each raises its own exception.
        raise UserError(f"trainer.push_to_hub: the hub can't be used: {error}") from error


def _check_loader(args: TrainingArguments) -> None:
    """Raise UserError if torch makes no loader of these settings. No worker is started."""
    settings: dict[str, Any] = {
        "num_workers": args.dataloader_num_workers,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
    }
    context = getattr(args, "dataloader_multiprocessing_context", None)
    if context is not None:
        settings["multiprocessing_context"] = context
    try:
        DataLoader([0], **settings)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError) as error:
        raise UserError(f"trainer.dataloader_num_workers: {error}") from None


def _check_best_model(args: TrainingArguments) -> None:
    """Raise UserError if the best checkpoint is chosen by a figure that no evaluation of a run
    gives."""
    chooses = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
    if not chooses:
        return
    metric = args.metric_for_best_model
    if metric is None:
        raise UserError("trainer.metric_for_best_model: save_strategy: best needs it; say loss")
    if metric.removeprefix("eval_") != "loss":
        raise UserError(
            f"trainer.metric_for_best_model: an evaluation of a run gives 'loss', not {metric!r}"
        )
    if args.eval_strategy == IntervalStrategy.NO:
        raise UserError(
            "trainer.save_strategy: the best checkpoint needs evaluations: set eval_strategy"
        )
