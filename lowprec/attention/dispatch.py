"""The choice of the fastest kernel for an attention mask, and attention on plain tensors.

The method. Three kernels compute the same function:

    sdpa   scaled_dot_product_attention(is_causal=True): PyTorch's fused flash kernels. They know
           one mask, the causal one.
    flex   FlexAttention: the mask is compiled into the kernel, which skips the tiles in which
           nothing is visible.
    dense  scaled_dot_product_attention with the boolean matrix [B, 1, Q, K]: any mask, any device,
           but work and memory proportional to Q*K.

Plain causal goes to SDPA, which has a fused kernel for it. On CUDA, every other mask goes to
FlexAttention, whose cost is proportional to the number of visible tiles. FlexAttention has no
backward on a CPU, so a CPU takes the dense matrix. It does so for training and for inference, so
that both see the same numbers. `choose` returns the reason with the choice.

Shapes: B batch, H query heads, G key and value heads, Q and K lengths, D head dimension. G may be
smaller than H (grouped-query attention).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lowprec.attention.expression import parse
from lowprec.attention.mask import Causal, Mask
from lowprec.errors import UserError

Kernel = Literal["sdpa", "flex", "dense"]

# The smallest contraction axis of the tensor cores. FlexAttention's kernel is undefined below it.
FLEX_MIN_HEAD_DIM = 16


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A kernel and the reason for choosing it."""

    kernel: Kernel
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.reason}"


def choose(
    mask: Mask | str, device_type: str, *, requires_grad: bool = True, head_dim: int = 64
) -> Choice:
    """Return the kernel for `mask` on a device of type `device_type` ("cuda", "cpu", ...), with the
    reason. Nothing is run."""
    mask = parse(mask)
    if isinstance(mask, Causal):
        return Choice(kernel="sdpa", reason="plain causal: SDPA has a fused kernel for it")
    if device_type == "cpu":
        why = (
            "FlexAttention has no CPU backward"
            if requires_grad
            else "the same kernel as in training"
        )
        return Choice(kernel="dense", reason=f"'{mask}' on a CPU: boolean mask through SDPA, {why}")
    if device_type != "cuda":
        return Choice(
            kernel="dense", reason=f"'{mask}' on {device_type}: FlexAttention is used on CUDA only"
        )
    if head_dim < FLEX_MIN_HEAD_DIM:
        reason = (
            f"'{mask}': FlexAttention needs a head dimension of at least {FLEX_MIN_HEAD_DIM}, this "
            f"one is {head_dim}"
        )
        return Choice(kernel="dense", reason=reason)
    return Choice(
        kernel="flex", reason=f"'{mask}' on CUDA: FlexAttention skips the tiles that the mask hides"
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | str, *, scale: float | None = None
) -> Tensor:
    """Return softmax(q k^T * scale) v, the softmax over the keys that `mask` shows.

    The kernel is the one that `choose` returns. Query i and key i are the same position.

    Args:
        q: [B, H, Q, D].
        k: [B, G, K, D], with H a multiple of G; k and v have the dtype and device of q.
        v: [B, G, K, D].
        mask: a mask, or an expression that `parse` reads.
        scale: 1/sqrt(D) by default.
    Returns:
        [B, H, Q, D] in the dtype of q; a query that sees no key gets zeros.
    Raises:
        UserError: the shapes do not fit, or the mask has a `document` without ids.
    """
    mask = parse(mask)
    _check(q, k, v)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    kernel = choose(
        mask, q.device.type, requires_grad=grad, head_dim=min(q.shape[-1], v.shape[-1])
    ).kernel
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    gqa = heads != k.shape[1]
    if kernel == "flex":
        return run_flex(q, k, v, mask.block_mask(batch, q_len, kv_len, q.device), scale=scale)
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    visible = mask.dense(batch, q_len, kv_len, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=gqa)


def run_flex(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, *, scale: float | None = None
) -> Tensor:
    """Run FlexAttention with `block_mask`. Shapes are as in `attention`.

    Inside an outer torch.compile (a compiled decoder block) the plain function is called, because
    compiled functions cannot be nested.
    """
    groups = q.shape[1] // k.shape[1]
    if groups & (groups - 1):
        # The kernel for short queries packs the group into a tile, whose sides are powers of two.
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
        groups = 1
    flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    # For fewer than 128 queries PyTorch would take its decoding kernel, which has no backward and,
    # for some shapes, no configuration.
    options: Any = {"FORCE_USE_FLEX_ATTENTION": True} if q.is_cuda else None
    return flex(
        q, k, v, block_mask=block_mask, scale=scale, enable_gqa=groups > 1, kernel_options=options
    )


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    # Without fullgraph, reaching the recompilation limit would silently fall back to an unfused
    # kernel.
    return torch.compile(flex_attention, fullgraph=True)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise UserError(
            f"attention: expected q, k, v of shape [batch, heads, length, head_dim], got {shapes}"
        )
    if not (
        q.shape[0] == k.shape[0] == v.shape[0]
        and k.shape[1:3] == v.shape[1:3]
        and q.shape[3] == k.shape[3]
    ):
        raise UserError(f"attention: q, k and v do not fit together: {shapes}")
    if q.shape[1] % k.shape[1]:
        raise UserError(f"attention: the query heads are not a multiple of the key heads: {shapes}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise UserError(
            f"attention: q, k and v differ in dtype or device: {q.dtype}, {k.dtype}, {v.dtype} on "
            f"{q.device}"
        )
