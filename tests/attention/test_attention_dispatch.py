"""The choice of an attention kernel, and `attention` on a CPU compared with softmax written out."""

import subprocess
import sys

import pytest
import torch

from lowprec.attention import attention, causal, choose, document, parse
from lowprec.errors import UserError

IDS = torch.tensor([[0] * 5 + [1] * 7, [0] * 11 + [1]])


def written_out(q, k, v, visible, scale):
    """Return softmax attention over the visible keys in fp64; a query without visible keys gets zeros."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def test_choices_and_reasons():
    assert choose("causal", "cuda").kernel == choose(causal(), "cpu").kernel == "sdpa"
    assert choose("causal & document", "cuda").kernel == "flex"
    assert choose("causal & document", "cpu").kernel == "dense"
    assert "no CPU backward" in choose("causal & document", "cpu").reason
    assert "same kernel as in training" in choose("causal & document", "cpu", requires_grad=False).reason
    assert choose("~causal", "mps").kernel == "dense"
    small = choose("causal & prefix(3)", "cuda", head_dim=8)
    assert small.kernel == "dense"
    assert "at least 16, this one is 8" in small.reason
    assert str(choose("causal", "cuda")).startswith("sdpa: plain causal")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "expression", ["causal", "causal & sliding_window(3)", "causal & document", "(causal | prefix(4)) & document", "~causal"]
)
def test_attention_equals_softmax_forward_and_backward(expression, kv_heads):
    torch.manual_seed(0)
    mask = parse(expression).bind(IDS)
    shapes = ((2, 4, 12, 8), (2, kv_heads, 12, 8), (2, kv_heads, 12, 8))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    weight = torch.randn(2, 4, 12, 8, dtype=torch.float64)
    for scale in (None, 0.5):
        out = attention(q, k, v, mask, scale=scale)
        expected = written_out(q, k, v, mask.dense(2, 12, 12), 8**-0.5 if scale is None else scale)
        torch.testing.assert_close(out, expected)
        got = torch.autograd.grad((out * weight).sum(), (q, k, v))
        # The reference's gradient through a row without visible keys is NaN, so it is compared only if every query has a visible key.
        if expression != "~causal":
            torch.testing.assert_close(got, torch.autograd.grad((expected * weight).sum(), (q, k, v)))
        assert all(torch.isfinite(grad).all() for grad in got)


def test_attention_takes_expressions_and_refuses_misfits():
    q = k = v = torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(attention(q, k, v, "causal"), attention(q, k, v, "causal & sliding_window(5)"))
    with pytest.raises(UserError, match="has no document ids yet"):
        attention(q, k, v, causal() & document())
    with pytest.raises(UserError, match="not a multiple"):
        attention(torch.randn(1, 3, 5, 8), k, v, "causal")
    with pytest.raises(UserError, match="do not fit together"):
        attention(q, k, v[:, :, :4], "causal")
    with pytest.raises(UserError, match=r"expected q, k, v of shape \[batch, heads, length, head_dim\]"):
        attention(q[0], k[0], v[0], "causal")
    with pytest.raises(UserError, match="differ in dtype"):
        attention(q, k.bfloat16(), v, "causal")


def test_import_does_not_load_transformers():
    code = "import sys, lowprec.attention, lowprec.integrations; sys.exit('transformers' in sys.modules or 'liger_kernel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
