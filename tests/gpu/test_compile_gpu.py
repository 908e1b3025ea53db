"""Layers under torch.compile with dynamic shapes on a GPU: the number of graphs, and results near those of eager code."""

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from lowprec.nn import LowPrecisionLinear
from lowprec.recipe import library
from lowprec.testing import sqnr_db

pytestmark = [
    pytest.mark.gpu,
    # All are the compiler's warnings about itself.
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]
LENGTHS = (192, 384, 640, 296)  # none is the number of features: equal sizes would share a variable


class Two(nn.Module):
    def __init__(self, recipe: str) -> None:
        super().__init__()
        linears = (nn.Linear(256, 256, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.up, self.down = (LowPrecisionLinear.from_linear(linear, library.get(recipe), layer=n) for n, linear in enumerate(linears))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def step(module: Any, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(g)
    assert leaf.grad is not None
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize(
    "recipe", ["fp8_blockwise", "fp8_tensorwise", "fp8_delayed", "mxfp8", "mxfp4_quartet", "nvfp4", "qat_int8dyn_int4"]
)
def test_a_second_length_is_the_last_compilation(recipe: str, dynamic: bool | None):
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Two(recipe)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, dynamic=dynamic, fullgraph=True)
    graphs = []
    for length in LENGTHS:
        x, g = (torch.randn(2, length, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for ours, expected in zip(step(compiled, x, g), step(eager, x, g), strict=True):
            # A code of the second layer's input may differ, because gelu is rounded elsewhere when it is fused.
            assert sqnr_db(ours.float(), expected.float()) > (10.0 if "4" in recipe else 25.0)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == ([1] * 4 if dynamic else [1, 2, 2, 2])
    torch._dynamo.reset()
