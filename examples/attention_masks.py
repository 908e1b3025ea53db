"""Attention masks compose, and the fastest kernel that supports the mask computes it."""

import torch

from lowprec.attention import attention, causal, choose, document, sliding_window

ids = torch.tensor([[0] * 100 + [1] * 156])  # two documents in one sequence of 256 tokens
mask = causal() & sliding_window(64) & document(ids)
q, k, v = torch.randn(3, 1, 4, 256, 32).unbind()  # batch x heads x tokens x width
print(choose(mask, q.device.type))
print(attention(q, k, v, mask).shape)
