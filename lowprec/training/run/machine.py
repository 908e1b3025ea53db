"""The machine that a run is on: its device, its memory, its allocator."""

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowprec.conversion.discover import find_weights
from lowprec.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve_device(device: str) -> str:
    """Return "cpu" or "cuda" for "auto", "cpu" or "cuda".

    Raises:
        UserError: CUDA was asked for, and there is no CUDA device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device: cuda was asked for, but torch sees no CUDA device here; device=auto or "
            "device=cpu would run"
        )
    return device


def device_name(device_type: str) -> str:
    """Return the name of the GPU, or the number of threads of a CPU."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def peak_memory_bytes(device_type: str) -> int:
    """Return the most memory that the process has held [bytes]: allocated on the GPU, or resident
    on a CPU."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes() -> int:
    """Return the memory of this machine, or of the container around the process [bytes]."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        return min(total, int(limit.read_text()))
    except (OSError, ValueError):  # No control group, or one without a limit.
        return total


_PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "A100": 312e12,
}
"""Dense bf16 operations per second by a part of the device's name (NVIDIA's data sheets, SXM)."""


def peak_flops() -> float | None:
    """Return the GPU's dense bf16 operations per second by its data sheet. None for a CPU or an
    unknown GPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


def flops_per_token(model: "PreTrainedModel", seq_len: int) -> float:
    """Return the operations of forward and backward for one token.

    They are 6 for each weight that multiplies, and 12 x layers x width x length for attention
    (arXiv 2204.02311, appendix B). Embeddings that are only looked up do not count, and masks save
    nothing. In a mixture of experts, the experts that a token goes to count.
    """
    embedding: Any = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    weights = sum(parameter.numel() for parameter in model.parameters())
    if head is None or head.weight is not embedding:
        weights -= embedding.numel()
    config = model.config
    chosen = getattr(config, "num_experts_per_tok", None)
    if chosen is not None:
        stacks = [weight for _, weight in find_weights(model) if weight.experts > 1]
        weights -= sum(stack.data.numel() * (1 - chosen / stack.experts) for stack in stacks)
    return 6.0 * weights + 12.0 * config.num_hidden_layers * config.hidden_size * seq_len


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks instead of returning them to the kernel. Return True if it does.

    Training on a CPU frees and allocates the same few megabytes thousands of times per second. By
    default each block is unmapped and then faulted in again, page by page, which costs more than
    the arithmetic (docs/experiments.md). Use this only in a process that does nothing but train.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # Another libc than glibc.
        return False
    # The options' numbers in <malloc.h>.
    trim_threshold = -1
    top_pad = -2
    mmap_threshold = -3
    settings = ((mmap_threshold, 1 << 30), (trim_threshold, (1 << 31) - 1), (top_pad, 1 << 26))
    return all(mallopt(option, value) == 1 for option, value in settings)
