"""Layers of other classes than nn.Linear on a GPU: a Conv1D has the bits of an nn.Linear, eager and compiled, and its codes are kept."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lowprec
from lowprec.nn import LowPrecisionLinear, codes
from lowprec.recipe import library

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


class Casts(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def twins(recipe: str) -> tuple[Any, Any]:
    """Return an nn.Linear and a Conv1D of the same weights, both converted."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(512, 768).cuda(), Conv1D(768, 512).cuda()
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias)
    made = [LowPrecisionLinear.from_linear(layer, library.get(recipe), seed=7, layer=3) for layer in (linear, conv)]
    return made[0], made[1]


def results(layer: Any, call: Any, autocast: bool) -> list[Tensor]:
    """Return outputs and gradients of two passes, whose gradients accumulate; dw as nn.Linear holds it."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2):
        x = torch.randn(4, 256, 512, generator=generator).cuda().requires_grad_()
        g = torch.randn(4, 256, 768, generator=generator).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y = call(x)
        y.backward(g.to(y.dtype))
        found += [y.detach(), x.grad]
    dw = layer.weight.grad
    return [*found, dw.t() if layer.transposed else dw, layer.bias.grad]


EAGER = ["fp8_blockwise", "fp8_rowwise", "fp8_delayed", "mxfp8", "mxfp4_aws", "nvfp4", "bf16"]
CASES = [(recipe, autocast, False) for recipe in EAGER for autocast in (False, True)]
CASES += [("fp8_blockwise", True, True), ("mxfp4_aws", False, True)]


@pytest.mark.parametrize(("recipe", "autocast", "compiled"), CASES)
def test_a_conv1d_computes_what_a_linear_layer_does(recipe: str, autocast: bool, compiled: bool):
    torch._dynamo.reset()
    pair = twins(recipe)
    calls = [torch.compile(layer, fullgraph=True) if compiled else layer for layer in pair]
    theirs, ours = (results(layer, call, autocast) for layer, call in zip(pair, calls, strict=True))
    # cuBLAS may sum in another order for a matrix that lies otherwise, and a compiler fuse otherwise.
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).float().norm() <= 2.0**-7 * b.float().norm()
    if recipe == "fp8_blockwise" and not compiled:
        assert pair[1] in codes._weights
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            assert torch.equal(a, b)


def test_a_subclass_that_casts_takes_inputs_of_other_dtypes():
    torch.manual_seed(0)
    model = nn.Sequential(Casts(512, 768), nn.Linear(768, 256)).cuda()
    x = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    exact = model[0](x)
    plan = lowprec.convert(model, {"recipe": "fp8_blockwise", "skip_slow": False})
    assert [layer.kind for layer in plan.converted] == ["Casts", "Linear"]
    y = model[0](x)
    assert y.dtype == torch.bfloat16
    assert 0 < (y - exact).float().norm() / exact.float().norm() < 0.06
    with pytest.raises(RuntimeError, match="dtype"):
        model[1](y)  # as nn.Linear refuses it
