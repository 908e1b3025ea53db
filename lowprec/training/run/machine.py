"""The machine that a run is on: its device, its memory, its allocator."""

import ctypes
import sys
from typing import Any

import torch

from lowprec.conversion.discover import find_weights
from lowprec.errors import UserError


def resolve_device(device: str) -> str:
    """'cpu' or 'cuda' from 'auto', 'cpu' or 'cuda'; UserError if CUDA was asked for and there is
    none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device: cuda was asked for, but torch sees no CUDA device here; device=auto or "
            "device=cpu would run"
        )
    return device


def device_name(device_type: str) -> str:
    return (
        torch.cuda.get_device_name()
        if device_type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )


def peak_memory_bytes(device_type: str) -> int:
    """The most memory the process has held: allocated on the GPU, or resident on a CPU."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "A100": 312e12,
}
"""Dense bf16 operations a second by NVIDIA's data sheets (SXM), by a part of the device's name."""


def peak_flops() -> float | None:
    """Dense bf16 operations a second of the GPU, as its data sheet has it; None for a CPU or
    another GPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def flops_per_token(model: Any, seq_len: int) -> float:
    """Operations of forward and backward for one token: 6 a weight that multiplies, 12 layers x
    width x length for attention.

    (arXiv 2204.02311, appendix B; embeddings that are only looked up do not count, masks do not
    save anything.) Of the experts of a mixture those count that a token goes to.
    """
    looked_up = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is looked_up
    weights = sum(parameter.numel() for parameter in model.parameters()) - (
        0 if tied else looked_up.numel()
    )
    config = model.config
    chosen = getattr(config, "num_experts_per_tok", None)
    if chosen is not None:
        stacks = [weight.data for _, weight in find_weights(model) if weight.stack]
        weights -= sum(stack.numel() * (1 - chosen / len(stack)) for stack in stacks)
    return 6.0 * weights + 12.0 * config.num_hidden_layers * config.hidden_size * seq_len


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks instead of returning them to the kernel. Whether that was
    possible.

    Training on a CPU frees and allocates the same few megabytes thousands of times a second; by
    default each of them is unmapped and faulted in again, page by page, which costs more than the
    arithmetic (docs/experiments.md). Only for a process that does nothing else.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another libc
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # <malloc.h>
    settings = ((mmap_threshold, 1 << 30), (trim_threshold, (1 << 31) - 1), (top_pad, 1 << 26))
    return all(mallopt(option, value) == 1 for option, value in settings)
