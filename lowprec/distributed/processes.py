"""The processes of a run, and the GPU of each."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from lowprec.errors import UserError

T = TypeVar("T")


def world_size() -> int:
    """How many processes this one was started with, itself included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def distributed_state(device_type: str) -> Any:
    """Accelerate's view of the processes, None if this is the only one."""
    if world_size() == 1:
        return None
    from accelerate import PartialState

    return PartialState(cpu=device_type == "cpu")


def on_main_process(state: Any, function: Callable[[], T]) -> T:
    """What `function` returns on the main process, on every process; its UserError on every
    process, too."""
    if state is None:
        return function()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def use_one_gpu(args: TrainingArguments) -> int:
    """How many GPUs this process has; it takes the first of several. (The Trainer's own choice,
    nn.DataParallel, copies the model to all of them in every step, and what layers keep is lost
    with the copies.)"""
    found = args.n_gpu
    if found > 1:
        args._n_gpu = 1
    return found


def name_the_cpu(args: TrainingArguments) -> None:
    """Let the device of several processes on a CPU be `cpu`. Accelerate calls it `cpu:0`, which
    torch can't load a checkpoint to."""
    if (
        args.device.type == "cpu"
        and args.device.index is not None
        and args.distributed_state is not None
    ):
        args.distributed_state.device = vars(args)["_setup_devices"] = torch.device("cpu")
