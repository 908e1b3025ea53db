"""The machine that a run is on: its device, its memory, its allocator."""

import ctypes
import sys

import torch

from lowprec.errors import UserError


def resolve_device(device: str) -> str:
    """'cpu' or 'cuda' from 'auto', 'cpu' or 'cuda'; UserError if CUDA was asked for and there is none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no CUDA device here; device=auto or device=cpu would run")
    return device


def peak_memory_bytes(device_type: str) -> int:
    """The most memory the process has held: allocated on the GPU, or resident on a CPU."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks instead of returning them to the kernel. Whether that was possible.

    Training on a CPU frees and allocates the same few megabytes thousands of times a second; by default each of them is unmapped and
    faulted in again, page by page, which costs more than the arithmetic (docs/experiments.md). Only for a process that does nothing else.
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
