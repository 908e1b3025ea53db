"""Hadamard signs that each pass draws anew: they cancel in the product, follow the layer's state, and are the same in compiled code."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowprec
from lowprec.formats.hadamard import NVFP4_SIGNS, Hadamard
from lowprec.nn import LowPrecisionLinear
from lowprec.recipe import Recipe, library
from lowprec.testing import gaussian

FRESH = Hadamard.drawn(16)


def recipe(base: str = "nvfp4", **gemms: object) -> Recipe:
    return library.resolve({"base": base, **(gemms or {"wgrad": {"hadamard": "16 fresh"}})})


def layer(of: Recipe, seed: int = 0) -> LowPrecisionLinear:
    torch.manual_seed(0)
    return LowPrecisionLinear.from_linear(nn.Linear(48, 32), of, seed=seed)


def step(module: Any, x: Tensor, g: Tensor) -> list[Tensor]:
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(g)
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())]  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]


def test_signs_come_from_the_key_and_cancel():
    keys = [torch.tensor([seed, 0]) for seed in range(4)]
    a, b = gaussian(5, 64, 0), gaussian(7, 64, 1)
    seen = {tuple(FRESH.apply(torch.eye(16), key)[:, 0].sign().tolist()) for key in keys}
    assert len(seen) == 4
    for key in keys:
        one, other = FRESH.apply(a, key), FRESH.apply(b.t().contiguous().t(), key)
        assert (one @ other.t() - a @ b.t()).abs().max() < 1e-4
        assert (FRESH.invert(one, 64, key) - a).abs().max() < 1e-5
    with pytest.raises(ValueError, match="fresh signs need a key"):
        FRESH.apply(a)
    with pytest.raises(ValueError, match="has no fixed ones"):
        Hadamard(size=16, signs=NVFP4_SIGNS, fresh=True)


@pytest.mark.parametrize(
    "gemms", [{"dgrad": {"hadamard": "16 fresh"}, "wgrad": {"hadamard": "32 fresh"}}, {"base": "mxfp4_quartet"}], ids=str
)
def test_both_operands_of_a_product_share_their_signs(gemms):
    """Without quantisation the gradients are the plain ones up to rounding. Quartet's fprop is transformed, and its gradients back."""
    of = recipe("fp32", **gemms) if "base" not in gemms else recipe("mxfp4_quartet", fprop={"hadamard": "32 fresh"})
    module, x, g = layer(of), gaussian(40, 48, 2), gaussian(40, 32, 3)
    assert of.draws
    assert "rounding_state" in module.state_dict()
    plain = nn.Linear(48, 32)
    plain.load_state_dict({"weight": module.weight.detach(), "bias": module.bias.detach()})  # pyright: ignore[reportOptionalMemberAccess]
    limit = 1e-5 if "base" not in gemms else 0.5
    for ours, expected in zip(step(module, x, g), step(plain, x, g), strict=True):
        assert (ours - expected).norm() < limit * expected.norm()


def test_each_pass_has_its_own_signs_and_a_resumed_layer_goes_on_with_them():
    of = recipe(wgrad={"hadamard": "16 fresh", "a": "e2m1[1x16 e4m3]"}, dgrad={"a": "e2m1[1x16 e4m3]"})  # nothing else is random
    module, x, g = layer(of), gaussian(40, 48, 2), gaussian(40, 32, 3)
    first = step(module, x, g)
    saved = copy.deepcopy(module.state_dict())
    second = step(module, x, g)
    for n, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b) == (n != 2)  # only the gradient of w comes from transformed operands
    restored = layer(of)
    restored.load_state_dict(saved)
    for a, b in zip(step(restored, x, g), second, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(step(layer(of, seed=1), x, g)[2], first[2])


@pytest.mark.filterwarnings(r"ignore:.*torch\.autograd\.function\.Function.* should not be instantiated:DeprecationWarning")
def test_compiled_layers_draw_the_same_signs():
    eager = layer(recipe())
    ours, x, g = copy.deepcopy(eager), gaussian(40, 48, 2), gaussian(40, 32, 3)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for a, b in zip(step(compiled, x, g), step(eager, x, g), strict=True):
            assert torch.equal(a, b)


def test_the_notation():
    of = recipe()
    assert of.wgrad.hadamard == FRESH
    assert "H16(fresh)·gᵀ" in of.equation("wgrad")
    assert not library.get("fp8_blockwise").draws
    for text in ("fresh", "16 new", "16fresh"):
        with pytest.raises(lowprec.UserError, match="hadamard is a size like 16, or '16 fresh'"):
            recipe(wgrad={"hadamard": text})
    with pytest.raises(lowprec.UserError, match="has size 16, 32, 64, 128; got 17"):
        recipe(wgrad={"hadamard": "17 fresh"})
