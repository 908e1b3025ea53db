"""Kernels from other projects, and torch.compile.

`liger` chooses and applies Liger's kernels, with a reason for each; `compile` compiles the decoder
blocks. Apply Liger first.
"""

from lowprec.integrations.compile import (
    CompileChoice,
    compile_blocks,
    compile_deterministically,
    kernels_by_shape,
)
from lowprec.integrations.liger import KernelChoice, LigerPlan, apply_liger, plan_liger

__all__ = [
    "CompileChoice",
    "KernelChoice",
    "LigerPlan",
    "apply_liger",
    "compile_blocks",
    "compile_deterministically",
    "kernels_by_shape",
    "plan_liger",
]
