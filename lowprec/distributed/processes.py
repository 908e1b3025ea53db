"""The processes of a run, and the device of each process."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import TrainingArguments

from lowprec.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return True on the first process of this run."""
    return os.environ.get("RANK", "0") == "0"


def distributed_state(device_type: str) -> "PartialState | None":
    """Return Accelerate's state of the processes; None if there is one process only."""
    if world_size() == 1:
        return None
    from accelerate import PartialState

    return PartialState(cpu=device_type == "cpu")


def on_main_process(state: "PartialState | None", function: Callable[[], T]) -> T:
    """Call `function` on the main process and return its result on every process.

    A UserError that it raises is raised on every process too. Without a `state` there is one
    process only.
    """
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
    """Let this process train on its first GPU. Return the number of GPUs that it has.

    With several GPUs the Trainer would choose nn.DataParallel. That copies the model to all of them
    in every step, and the recipe state of the layers is lost with the copies.
    """
    found = args.n_gpu
    if found > 1:
        args._n_gpu = 1
    return found


def name_the_cpu(args: TrainingArguments) -> None:
    """Name the device of several processes on a CPU `cpu`.

    Accelerate names it `cpu:0`, and torch can't load a checkpoint to that device.
    """
    if (
        args.device.type == "cpu"
        and args.device.index is not None
        and args.distributed_state is not None
    ):
        cpu = torch.device("cpu")
        args.distributed_state.device = cpu
        vars(args)["_setup_devices"] = cpu
