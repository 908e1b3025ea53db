"""How a model may be spread over processes; FSDP2 as Accelerate sets it up, with sums in fp32."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import DistributedType
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from lowprec.errors import UserError

SUMS_IN_FP32 = "FSDP2: gradients are summed in fp32, and the loss stays in fp32 (by default Accelerate rounds both to 16 bits)"


def check_strategy(accelerator: Any) -> None:
    """UserError unless each process holds the whole model, or FSDP2's shards of its parameters,
    which stay parameters of their layers.

    FSDP version 1, DeepSpeed and Megatron-LM put others in their places: layers would lose what
    they keep, the guard would see nothing.

    Args:
        accelerator: an accelerate.Accelerator, or its state.
    """
    kind = DistributedType(accelerator.distributed_type)
    if kind == DistributedType.NO or kind.value.startswith("MULTI_") or accelerator.is_fsdp2:
        return
    name = "FSDP version 1" if kind == DistributedType.FSDP else kind.value
    raise UserError(f"low precision needs one process, DDP or FSDP2 (fsdp_version: 2), not {name}")


def shards(settings: Mapping[str, Any]) -> bool:
    """Whether a run with these TrainingArguments is sharded: by their `fsdp`, or by the
    launcher."""
    return (
        bool(settings.get("fsdp"))
        or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    )


def check_can_shard(args: TrainingArguments) -> None:
    """UserError if this run is to be sharded where Accelerate can't: not by FSDP2, by one process
    alone, or on a CPU (where it would train whole, in silence)."""
    if not shards({"fsdp": args.fsdp}):
        return
    asked = "trainer.fsdp" if args.fsdp else "the launcher's FSDP"
    version = (
        args.fsdp_plugin_args["fsdp_version"]
        if args.fsdp_plugin_args
        else int(os.environ.get("FSDP_VERSION", "1"))
    )
    if version != 2:
        key, where = (
            ("version", "trainer.fsdp_config")
            if args.fsdp
            else ("fsdp_version", "fsdp_config of the launcher's file")
        )
        raise UserError(f"{asked}: low precision needs FSDP2; say {key}: 2 in {where}")
    if args.device.type == "cpu":
        remedy = "leave it out" if args.fsdp else "take configs/accelerate/cpu.yaml"
        raise UserError(
            f"{asked}: Accelerate shards on GPUs only; on a CPU {remedy}, and each process has the "
            "whole model"
        )
    if args.parallel_mode is not ParallelMode.DISTRIBUTED:
        raise UserError(
            f"{asked}: shards lie in processes that a launcher starts: torchrun --nproc-per-node N "
            "-m lowprec train ..."
        )


def offloads(args: TrainingArguments) -> bool:
    """Whether FSDP2 would keep this run's shards in host memory."""
    if args.fsdp:
        return bool((args.fsdp_plugin_args or {}).get("cpu_offload"))
    return shards({}) and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"


def is_offloaded(accelerator_state: Any) -> bool:
    """Whether Accelerate has FSDP2 keep shards in host memory."""
    return isinstance(
        getattr(getattr(accelerator_state, "fsdp_plugin", None), "cpu_offload", None),
        CPUOffloadPolicy,
    )


def check_offloaded(*, scaled: bool = False, low_bit: bool = False, keeps: bool = False) -> None:
    """UserError for what does not go with shards in host memory.

    Args:
        scaled: a loss scale: it fell and losses became NaN, on two GPUs (docs/experiments.md,
            2026-11-26).
        low_bit: an optimizer of `lowprec.training.optim.adamw` other than torch's, whose step
            torch.compile can't compile there.
        keeps: buffers of a recipe's, which stay on the GPU: torch loads no state dict into a model
            on two devices.
    """
    for found, what in (
        (scaled, "fp16's loss scale collapses; take bf16"),
        (low_bit, "optimizer.weights and optimizer.moments have to be fp32"),
        (
            keeps,
            "a recipe that keeps something (amax histories, rounding keys) could not go on from a "
            "checkpoint; take fp8_blockwise",
        ),
    ):
        if found:
            raise UserError(
                f"FSDP's offloading of parameters to host memory (cpu_offload): {what}, or turn it "
                "off"
            )


def sum_in_fp32(accelerator_state: Any, model: nn.Module) -> bool:
    """Let FSDP2 reduce gradients in fp32, and hand out the loss as it was computed; call it before
    `model` is prepared.

    Accelerate's policy for mixed precision gathers weights in bf16 or fp16, which stays, and also
    rounds to it: gradients before they are summed over ranks and batches, and whatever a block or
    the model returns. A loss of 2.5 is known to 1/64 then, and gradients of a loss that fp16
    training scales by 65536, where it starts, overflow as it is handed back. Without mixed
    precision, gradients of weights that are 16 bits wide themselves are summed in those.

    Args:
        accelerator_state: an accelerate.state.AcceleratorState (`accelerator.state`).
    Returns:
        Whether anything was changed: not without FSDP2, nor where all is fp32, and no policy other
            than Accelerate's own, which is
        somebody's choice.
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
