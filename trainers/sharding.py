"""FSDP2 as Accelerate sets it up, with sums in fp32."""

from typing import Any

SUMS_IN_FP32 = "FSDP2: gradients are summed in fp32 and the loss stays in fp32; Accelerate's own policy rounds both to 16 bits"


def sum_in_fp32(accelerator_state: Any) -> bool:
    """Let FSDP2 reduce gradients in fp32, and hand out the loss as it was computed; call it before the model is prepared.

    Accelerate's policy for mixed precision gathers weights in bf16 or fp16, which stays, and also rounds to it: gradients before they are
    summed over ranks and batches, and whatever a block or the model returns. A loss of 2.5 is known to 1/64 then, and gradients of a loss
    that fp16 training scales by 65536, where it starts, overflow as it is handed back.

    Args:
        accelerator_state: an accelerate.state.AcceleratorState (`accelerator.state`).
    Returns:
        Whether anything was changed: not without FSDP2 and mixed precision, and no policy other than Accelerate's own, which is somebody's
        choice.
    """
    plugin = getattr(accelerator_state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or plugin.mixed_precision_policy is None:
        return False
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    dtype = plugin.mixed_precision_policy.param_dtype
    if plugin.mixed_precision_policy != MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, output_dtype=dtype):
        return False
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    return True
