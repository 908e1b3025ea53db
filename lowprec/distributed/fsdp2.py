"""Checks of how a model is spread over processes, and FSDP2 with gradients summed in fp32."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from lowprec.errors import UserError

SUMS_IN_FP32 = (
    "FSDP2: gradients are summed in fp32, and the loss stays in fp32 (by default Accelerate rounds "
    "both to 16 bits)"
)
"""Message to log if `sum_in_fp32` changed the policy."""


def check_strategy(accelerator: Accelerator | AcceleratorState) -> None:
    """Raise UserError unless each process holds the whole model or FSDP2's shards of it.

    FSDP2's shards stay parameters of their layers. FSDP version 1, DeepSpeed and Megatron-LM
    replace the parameters by others: layers would lose their recipe state, and the guard would see
    no parameters.
    """
    kind = DistributedType(accelerator.distributed_type)
    if kind == DistributedType.NO or kind.value.startswith("MULTI_") or accelerator.is_fsdp2:
        return
    name = "FSDP version 1" if kind == DistributedType.FSDP else kind.value
    raise UserError(f"low precision needs one process, DDP or FSDP2 (fsdp_version: 2), not {name}")


def shards(settings: Mapping[str, Any]) -> bool:
    """Return True if a run with these TrainingArguments is sharded, by their `fsdp` or by the
    launcher."""
    return bool(settings.get("fsdp")) or _is_true("ACCELERATE_USE_FSDP")


def check_can_shard(args: TrainingArguments) -> None:
    """Raise UserError if a run asks for sharding and Accelerate can't shard it.

    Accelerate shards by FSDP2, in several processes, on GPUs. On a CPU it would train the whole
    model without a word.
    """
    if not shards({"fsdp": args.fsdp}):
        return
    if args.fsdp:
        requester = "trainer.fsdp"
        version_setting = "version: 2 in trainer.fsdp_config"
        cpu_remedy = "leave it out"
    else:
        requester = "the launcher's FSDP"
        version_setting = "fsdp_version: 2 in fsdp_config of the launcher's file"
        cpu_remedy = "take configs/accelerate/cpu.yaml"
    if args.fsdp_plugin_args:
        version = args.fsdp_plugin_args["fsdp_version"]
    else:
        version = int(os.environ.get("FSDP_VERSION", "1"))
    if version != 2:
        raise UserError(f"{requester}: low precision needs FSDP2; say {version_setting}")
    if args.device.type == "cpu":
        raise UserError(
            f"{requester}: Accelerate shards on GPUs only; on a CPU {cpu_remedy}, and each process "
            "has the whole model"
        )
    if args.parallel_mode is not ParallelMode.DISTRIBUTED:
        raise UserError(
            f"{requester}: shards lie in processes that a launcher starts: torchrun "
            "--nproc-per-node N -m lowprec train ..."
        )


def offloads(args: TrainingArguments) -> bool:
    """Return True if FSDP2 would keep this run's shards in host memory."""
    if args.fsdp:
        return bool((args.fsdp_plugin_args or {}).get("cpu_offload"))
    return shards({}) and _is_true("FSDP_OFFLOAD_PARAMS")


def _is_true(variable: str) -> bool:
    """Return True if Accelerate's launcher has set this environment variable to true."""
    return os.environ.get(variable, "false").lower() == "true"


def is_offloaded(accelerator_state: AcceleratorState) -> bool:
    """Return True if Accelerate lets FSDP2 keep shards in host memory."""
    plugin = getattr(accelerator_state, "fsdp_plugin", None)
    return isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy)


def check_offloaded(*, scaled: bool = False, low_bit: bool = False, keeps: bool = False) -> None:
    """Raise UserError if a run uses something that does not work with shards in host memory.

    Args:
        scaled: Flag: the loss is scaled. On two GPUs the scale fell and losses became NaN
            (docs/experiments.md, 2026-11-26).
        low_bit: Flag: the optimizer is one of `lowprec.training.optim.adamw` other than torch's.
            torch.compile can't compile its step there.
        keeps: Flag: the recipe keeps state in buffers. They stay on the GPU, and torch loads no
            state dict into a model on two devices.
    """
    for found, reason in (
        (scaled, "fp16's loss scale collapses; take bf16"),
        (low_bit, "optimizer.weights and optimizer.moments have to be fp32"),
        (
            keeps,
            "a recipe that keeps state (amax histories, rounding keys) could not resume from a "
            "checkpoint; take fp8_blockwise",
        ),
    ):
        if found:
            raise UserError(
                "FSDP's offloading of parameters to host memory (cpu_offload): "
                f"{reason}, or turn it off"
            )


def sum_in_fp32(accelerator_state: AcceleratorState, model: nn.Module) -> bool:
    """Let FSDP2 reduce gradients in fp32 and return the loss without rounding it.

    Call this before Accelerate prepares `model`. Accelerate's policy for mixed precision gathers
    weights in bf16 or fp16; that is kept. It also rounds to this dtype: gradients, before they are
    summed over ranks and batches, and the outputs of each block and of the model. With that
    rounding, a loss of 2.5 is exact to 1/64 only. In fp16 training, which starts with a loss scale
    of 65536, the gradients of the scaled loss overflow when the loss is handed back. Without mixed
    precision, FSDP2 sums the gradients of 16-bit weights in 16 bits.

    Returns:
        True if the policy was changed. It is not changed without FSDP2, if everything is fp32, or
        if it is not Accelerate's own policy: another policy is the user's choice.
    """
    plugin = getattr(accelerator_state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return False
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    dtype = policy.param_dtype
    if policy != MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, output_dtype=dtype):
        return False
    computed = {
        dtype or parameter.dtype for parameter in model.parameters() if parameter.requires_grad
    }
    if not computed & {torch.bfloat16, torch.float16}:
        return False
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32
    )
    return True
