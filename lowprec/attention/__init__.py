"""Attention masks as an algebra. Each mask is computed by the fastest kernel that supports it.

    from lowprec.attention import attention, attach, causal, document, parse, sliding_window

    mask = causal() & sliding_window(1024) & document(ids)
    mask = parse("causal & sliding_window(1024) & document").bind(ids)    # the same mask
    out = attention(q, k, v, mask)                                        # plain tensors
    attach(model, "causal & sliding_window(1024) & document")             # a Hugging Face model

`lowprec.attention.mask` holds the algebra and `.expression` its text form, `.dispatch` the choice
of the kernel, and `.hf` the integration with transformers (which is imported only when `register`
or `attach` is called).
"""

from lowprec.attention.dispatch import Choice, attention, choose
from lowprec.attention.expression import parse
from lowprec.attention.hf import attach, describe, register
from lowprec.attention.mask import Mask, causal, document, prefix, sliding_window

__all__ = [
    "Choice",
    "Mask",
    "attach",
    "attention",
    "causal",
    "choose",
    "describe",
    "document",
    "parse",
    "prefix",
    "register",
    "sliding_window",
]
