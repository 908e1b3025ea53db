"""Layers that a conversion can't change and keeps in high precision, and the checks before it changes anything."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import lowprec
from lowprec.conversion.convert import convert, make_plan
from lowprec.errors import UserError
from lowprec.nn import LowPrecisionLinear
from lowprec.nn.gemms import backend_or_auto
from lowprec.recipe import library
from tests.nn.native import on_cpu


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False))


def test_a_layer_whose_forward_was_replaced_stays_in_high_precision_and_the_plan_says_so():
    plain = model()
    first = plain[0].forward
    plain[0].forward = lambda x: first(x)  # as accelerate's offloading hooks do
    plan = convert(plain, "mxfp8")
    assert [layer.blocked for layer in plan.layers] == [True, False]
    assert "something has replaced the forward of this Linear" in plan.layers[0].reason
    assert type(plain[0]) is nn.Linear
    with pytest.raises(UserError, match=r"precision\.strict: 0 can't be converted: something has replaced"):
        convert(plain, {"recipe": "mxfp8", "strict": True})


def test_a_forward_replaced_afterwards_continues_through_the_phases():
    plain = model()
    convert(plain, "mxfp8")
    first = plain[0].forward
    plain[0].forward = lambda x: first(x)
    assert not any(layer.blocked for layer in convert(plain, "mxfp4").layers)
    x = torch.randn(4, 128)
    other = model()
    convert(other, "mxfp4")
    assert torch.equal(plain(x), other(x))


def test_layers_that_torch_reads_past_their_forward_stay_in_high_precision():
    module = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    plan = {layer.name: layer for layer in convert(module, "mxfp4").layers}
    for name in ("linear1", "linear2"):
        assert plan[name].blocked
        assert "without calling it, in eval()" in plan[name].reason
    decoder = convert(nn.TransformerDecoderLayer(128, 4, 256, batch_first=True), "mxfp4")
    assert {layer.name: layer.converted for layer in decoder.layers}["linear1"]


class OwnOrder(nn.TransformerEncoderLayer):
    """A layer with a forward of its own, which calls linear1 and linear2."""

    def forward(self, src: Any, *_: Any, **__: Any) -> Any:
        return src + self.linear2(self.linear1(src))


class HandsOver(nn.TransformerEncoderLayer):
    """A layer whose forward calls torch's."""

    def forward(self, src: Any, *given: Any, **more: Any) -> Any:
        return src + super().forward(src, *given, **more)


FAST = (128, 4, 256)


@pytest.mark.parametrize(
    "module, fast",
    [
        (nn.TransformerEncoderLayer(*FAST), False),
        (nn.TransformerEncoderLayer(128, 1, 256, batch_first=True), False),
        (nn.TransformerEncoderLayer(*FAST, batch_first=True, bias=False), False),
        (nn.TransformerEncoderLayer(*FAST, batch_first=True, activation=nn.functional.silu), False),
        (OwnOrder(*FAST, batch_first=True), False),
        (HandsOver(*FAST, batch_first=True), True),
        (HandsOver(*FAST), False),
        (type("Renamed", (nn.TransformerEncoderLayer,), {})(*FAST, batch_first=True), True),
        (nn.TransformerEncoderLayer(*FAST, batch_first=True, norm_first=True, activation="gelu"), True),
    ],
)
def test_encoder_layers_are_converted_if_torch_calls_their_forward(module: nn.TransformerEncoderLayer, fast: bool):
    plan = {layer.name: layer for layer in convert(module, "mxfp4").layers}
    assert plan["linear1"].blocked == plan["linear2"].blocked == fast
    assert plan["linear1"].converted == plan["linear2"].converted == (not fast)
    module.eval()
    calls = []
    module.linear1.forward = lambda x: calls.append(1) or nn.functional.linear(x, module.linear1.weight, module.linear1.bias)
    with torch.no_grad():
        module(torch.randn(2, 32, 128))
    assert bool(calls) == (not fast)


def test_a_model_without_shapes_is_one_line():
    with pytest.raises(UserError, match=r"0\.weight has no shape yet: let the model see one batch before"):
        make_plan(nn.Sequential(nn.LazyLinear(8)), "mxfp8")
    parts = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.Linear(144, 32))  # a shape that conversion does not ask for
    assert [layer.converted for layer in convert(parts, "mxfp8").layers] == [True]
    assert parts(torch.randn(2, 3, 8, 8)).shape == (2, 32)


def test_a_model_is_untouched_if_recipes_do_not_fit_together():
    delayed = library.get("fp8_delayed")
    spec: Any = delayed.fprop.a
    longer = delayed.changed({}, {"fprop": {"a": replace(spec, scaling=replace(spec.scaling, history=spec.scaling.history + 1))}})
    rules = [{"modules": "1", "recipe": longer}]
    plain = model()
    with pytest.raises(UserError, match="histories of two lengths"):
        convert(plain, {"recipe": "fp8_delayed"}, later=[{"recipe": "fp8_delayed", "rules": rules}])
    assert [type(layer) for layer in plain] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("raised", [False, True])
def test_a_backend_that_is_asked_for_is_that_of_the_configured_recipe(raised: bool, monkeypatch: pytest.MonkeyPatch):
    """The recipe of evaluation, or one that a layer is raised to, may have operands that the backend does not take."""
    on_cpu(monkeypatch)
    bf16, x = library.get("bf16"), torch.randn(64, 128)
    assert backend_or_auto(bf16, "hopper", "cpu") == "auto"
    assert backend_or_auto(library.get("fp8_blockwise"), "hopper", "cpu") == "hopper"
    plain = model()
    precision = {"recipe": "fp8_blockwise", "backend": "hopper", "evaluation": "training" if raised else "bf16"}
    plan = convert(plain, precision, raised={"0": bf16} if raised else {})
    backends = [{gemm.backend for gemm in layer.gemms} for layer in plan.layers]
    assert backends[1] == {"hopper"}
    assert (backends[0] == {"hopper"}) is not raised
    plain(x).sum().backward()
    expected = model()
    convert(expected, "bf16")
    if raised:
        assert torch.equal(plain[0](x), expected[0](x))
    else:
        assert torch.equal(plain.eval()(x), expected.eval()(x))


def test_a_backend_that_can_not_run_the_configured_recipe_is_still_refused():
    with pytest.raises(UserError, match="'torch' can't multiply"):
        convert(model(), {"recipe": "mxfp8", "backend": "torch"})


def test_gemms_are_changed_together():
    """Each change alone would be refused."""
    with pytest.raises(ValueError, match="both take its operands, or neither"):
        library.get("mxfp4_quartet").changed({}, {"dgrad": {"b": library.get("mxfp8").dgrad.b}})
    operand = {"b": str(library.get("mxfp8").dgrad.b)}
    changed = library.resolve({"base": "mxfp4_quartet", "dgrad": operand, "wgrad": operand})
    assert changed.dgrad.b == changed.wgrad.b == library.get("mxfp8").dgrad.b
    assert changed.fprop == library.get("mxfp4_quartet").fprop
    with pytest.raises(UserError, match="both take its operands, or neither"):
        library.resolve({"base": "mxfp4_quartet", "dgrad": "mxfp8"})


def test_converting_in_inference_mode_and_training_later():
    plain = model()
    with torch.inference_mode():
        convert(plain, "mxfp4_aws")
    plain(torch.randn(4, 128)).sum().backward()
    assert isinstance(plain[0], LowPrecisionLinear)
    assert plain[0].get_buffer("rounding_state")[2] == 1
    assert lowprec.revert(plain) == 2
