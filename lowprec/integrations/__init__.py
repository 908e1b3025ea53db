"""Kernels from other projects, and the compiler: which of them apply to a model, and why the others
do not.

`liger` holds the choice of Liger's kernels, `compile` the compilation of the decoder blocks. Apply
Liger first.
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
