"""The backward of SwiGLU in Triton: 6 bytes an element read, 4 written, in bf16."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _backward(dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    dh = tl.load(dh_ptr + at, mask=inside).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(
        dgate_ptr + at,
        (dh * up * (sigmoid + silu * (1 - sigmoid))).to(dgate_ptr.dtype.element_ty),
        mask=inside,
    )
    tl.store(dup_ptr + at, (dh * silu).to(dup_ptr.dtype.element_ty), mask=inside)


def backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup); all contiguous."""
    dgate, dup, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    _backward[(triton.cdiv(n, 2048),)](dh, gate, up, dgate, dup, n, 2048)
    return dgate, dup
