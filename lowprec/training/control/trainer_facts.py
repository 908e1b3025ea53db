"""Facts about a Trainer that its events do not hand to a callback."""

import logging
import sys

from accelerate.state import AcceleratorState
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from lowprec.distributed.fsdp2 import check_offloaded, check_strategy, is_offloaded
from lowprec.errors import UserError
from lowprec.nn.known import is_dtensor
from lowprec.training.optim.loss_scaling import NO_FP16_ON_A_CPU, check_weights

logger = logging.getLogger("lowprec")

_IN_TIME = "give the callback to the Trainer when it is made: callbacks=[LowPrecisionCallback(...)]"


def calling_trainer() -> Trainer | None:
    """Return the Trainer whose event is being handled; None if no Trainer called.

    The events hand over the model and the state, but not the Trainer, which alone has its other
    models and the list of its callbacks. It is found among the callers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None


def check_alone(trainer: Trainer | None, kind: type) -> None:
    """Raise UserError if the Trainer has two callbacks of this kind, or one of them twice."""
    callbacks = [] if trainer is None else trainer.callback_handler.callbacks
    own = [callback for callback in callbacks if isinstance(callback, kind)]
    if len(own) < 2:
        return
    if own[0] is own[1]:
        raise UserError(
            f"this Trainer has the same {kind.__name__} twice: give it once, by callbacks=[...] or "
            "by add_callback"
        )
    raise UserError(
        f"this Trainer has two {kind.__name__}s: one decides the precision of its model; "
        f"trainer.remove_callback({kind.__name__}) removes the first"
    )


def check_spread(args: TrainingArguments, *, keeps: bool) -> None:
    """Raise UserError if the Trainer spreads the model over devices in a way that low precision
    does not support.

    Args:
        args: the Trainer's arguments.
        keeps: whether a recipe keeps state in the layers.
    """
    if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
        raise UserError(
            f"one process with {args.n_gpu} GPUs: the Trainer would copy the model to all of them "
            "in every step (nn.DataParallel), and recipe state would be lost with the copies; "
            "start the program by torchrun or accelerate launch, or on one GPU by "
            "CUDA_VISIBLE_DEVICES=0"
        )
    accelerator = AcceleratorState()
    check_strategy(accelerator)
    if is_offloaded(accelerator):
        check_offloaded(scaled=args.fp16, keeps=keeps)


def check_fp16(args: TrainingArguments, model: nn.Module) -> None:
    """Raise UserError if the Trainer's fp16 can't train the model."""
    if not args.fp16:
        return
    check_weights(model)
    if args.device.type == "cpu":
        raise UserError(NO_FP16_ON_A_CPU)


def called_module(trainer: Trainer | None, model: nn.Module) -> nn.Module:
    """Return the module that the training loop calls: `model`, or what wraps it."""
    wrapped = None if trainer is None else trainer.model_wrapped
    return model if wrapped is None else wrapped


def sees_compiled(
    declared: bool, args: TrainingArguments, model: nn.Module, *, warns: bool = False
) -> bool:
    """Return True if the model's code is compiled: by the Trainer, as modules show, or as declared.

    Args:
        declared: whether the user says so.
        args: the Trainer's arguments.
        model: the model as it is now.
        warns: whether to log a warning if it is only declared.
    """
    is_seen = bool(args.torch_compile) or any(
        isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )
    if warns and declared and not is_seen and args.process_index == 0:
        logger.warning(
            "compiled=True was declared, but no module of the model is compiled: the plan supposes "
            "that the host's time does not count"
        )
    return is_seen or declared


def check_can_convert_late(model: nn.Module) -> None:
    """Raise UserError if a model that the Trainer has prepared can't be converted any more."""
    if is_sharded(model):
        raise UserError(f"the model is sharded already, and can't be converted then; {_IN_TIME}")


def state_is_lost(trainer: Trainer | None) -> UserError:
    """Return the error for a model that has loaded its checkpoint before it is converted."""
    if trainer is not None and trainer.model_init is not None:
        return UserError(
            "a model of model_init loads its checkpoint before it is converted, without recipe "
            "state: give the Trainer a model instead"
        )
    return UserError(
        "the model has loaded its checkpoint before it is converted, without recipe state; "
        + _IN_TIME
    )


def is_sharded(model: nn.Module) -> bool:
    """Return True if FSDP2 has sharded the model's parameters."""
    return any(map(is_dtensor, model.parameters()))
