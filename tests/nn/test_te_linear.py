"""Recipes run as Transformer Engine modules."""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowprec
from lowprec.conversion.convert import convert, make_plan, revert
from lowprec.errors import UserError
from lowprec.nn import LowPrecisionLinear
from lowprec.nn.te_linear import DelayedTELinear, TELinear
from lowprec.nn.te_recipes import te_recipe, why_not_te
from lowprec.quant import OperandSpec, quantize
from lowprec.recipe import library
from lowprec.testing import heavy_tailed
from lowprec.testing.te import te_quantized
from tests.nn.fake_te import FakeLinear, MMParams, QParams, answer, install

TWINS = {
    "fp8_blockwise": "Float8BlockScaling",
    "fp8_blockwise_ue8m0": "Float8BlockScaling",
    "fp8_tensorwise": "Float8CurrentScaling",
    "fp8_delayed": "DelayedScaling",
    "mxfp8": "MXFP8BlockScaling",
    "nvfp4": "NVFP4BlockScaling",
}
NO_TWIN = f"Transformer Engine has no such recipe; it has {', '.join(TWINS)}"


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return install(monkeypatch)


def model(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32, bias=bias), nn.ReLU(), nn.Linear(32, 48, bias=bias))


def precision(recipe: str = "fp8_blockwise_ue8m0", **more: Any) -> dict[str, Any]:
    return {"recipe": recipe, "backend": "te", **more}


def te_linear(recipe: str, linear: nn.Linear | None = None) -> TELinear:
    torch.manual_seed(0)
    return TELinear.from_linear(linear or nn.Linear(64, 32), library.get(recipe))


# The twin of a recipe


@pytest.mark.parametrize("name", TWINS)
def test_every_option_is_given(te: ModuleType, name: str):
    made = te_recipe(library.get(name))
    assert type(made).__name__ == TWINS[name]
    options = dict(made.__dict__)
    assert options.pop("backward_override") is None
    power_of_two = {f"fp8_quant_{operand}": QParams(name.endswith("ue8m0")) for operand in ("fwd_inp", "fwd_weight", "bwd_grad")}
    split = {"fp8_gemm_fprop": MMParams(True)}
    assert (
        options
        == {
            "fp8_blockwise": {"fp8_format": "e4m3 everywhere", "use_f32_scales": True, **power_of_two},
            "fp8_blockwise_ue8m0": {"fp8_format": "e4m3 everywhere", "use_f32_scales": False, **power_of_two},
            "fp8_tensorwise": {"fp8_format": "e5m2 gradients", "use_power_2_scales": False, **power_of_two, **split},
            "fp8_delayed": {
                "fp8_format": "e5m2 gradients",
                "margin": 0,
                "amax_history_len": 1024,
                "amax_compute_algo": "max",
                "reduce_amax": False,
                **split,
            },
            "mxfp8": {"fp8_format": "e4m3 everywhere", "enable_2d_quantization": False},
            "nvfp4": {
                "disable_rht": False,
                "disable_stochastic_rounding": False,
                "disable_2d_quantization": False,
                "row_scaled_activation": False,
                "nvfp4_4over6": "none",
            },
        }[name]
    )


def test_a_twin_is_recognised_by_its_operands(te: ModuleType):
    block = library.get("fp8_blockwise")
    assert why_not_te(replace(block, name="mine"), "cuda") is None
    assert why_not_te(block.changed({}, {"fprop": {"accumulator_bits": 14}}), "cuda") == NO_TWIN
    assert why_not_te(block.changed({"wgrad": library.get("bf16")}, {}), "cuda") == NO_TWIN
    with pytest.raises(UserError, match="recipe int8: Transformer Engine has no such recipe"):
        te_recipe(library.get("int8"))


def test_reasons(te: ModuleType, monkeypatch: pytest.MonkeyPatch):
    reasons = {name: why_not_te(library.get(name), "cuda") for name in library.names()}
    works = {"fp8_blockwise", "fp8_blockwise_ue8m0", "fp8_tensorwise", "fp8_delayed"}
    assert {name for name, reason in reasons.items() if reason is None} == works
    assert reasons["mxfp8"] == "Device compute capability 10.0 or higher required for MXFP8 execution"
    assert reasons["nvfp4"] == "Device compute capability 10.0 or higher required for NVFP4 execution"
    assert {reasons[name] for name in reasons.keys() - TWINS.keys()} == {NO_TWIN}
    monkeypatch.setattr(te, "is_mxfp8_available", answer(True, ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert why_not_te(library.get("mxfp8"), "cuda") is None
    assert why_not_te(library.get("fp8_blockwise_ue8m0"), "cuda") is None
    powers = "Transformer Engine's block scales are powers of two on this GPU, as fp8_blockwise_ue8m0 has them"
    assert why_not_te(library.get("fp8_blockwise"), "cuda") == powers
    assert why_not_te(library.get("fp8_blockwise"), "cpu") == "Transformer Engine needs a CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not_te(library.get("mxfp8"), "cuda") == "Transformer Engine needs a CUDA device, and this machine has none"


def test_a_transformer_engine_that_is_not_there_or_does_not_load(te: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    reason = why_not_te(library.get("mxfp8"), "cuda")
    assert reason is not None
    assert reason.startswith("Transformer Engine does not load: ")
    monkeypatch.delitem(sys.modules, "transformer_engine")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not_te(library.get("mxfp8"), "cuda") == "needs Transformer Engine: pip install 'lowprec[te]'"
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    layer = nn.Linear(32, 32)
    with pytest.raises(UserError, match=r"^recipe mxfp8: backend 'te' needs Transformer Engine: pip install 'lowprec\[te\]'$"):
        TELinear.from_linear(layer, library.get("mxfp8"))
    assert type(layer) is nn.Linear


# The plan


def test_plan(te: ModuleType):
    net = model()
    plan = make_plan(net, precision(strict=True), device="cuda")
    assert [type(module) for module in net] == [nn.Linear, nn.ReLU, nn.Linear]
    assert convert(net, precision(strict=True), device="cuda") == plan
    assert make_plan(net, precision(strict=True), device="cuda") == plan  # the plan of a converted model
    recipe = library.get("fp8_blockwise_ue8m0")
    for layer in plan.layers:
        assert (layer.kind, layer.recipe, layer.status, layer.reason) == ("Linear", recipe.name, "native", "")
        assert [(gemm.gemm, gemm.equation) for gemm in layer.gemms] == [(gemm, recipe.equation(gemm)) for gemm in lowprec.recipe.GEMMS]
        assert {(gemm.backend, gemm.reason) for gemm in layer.gemms} == {("te", "Transformer Engine, Float8BlockScaling")}
    assert "te" in str(plan)


@pytest.mark.parametrize(
    "wanted, device, message",
    [
        (precision("mxfp4"), "cuda", f"precision.backend: 'te' can't run recipe mxfp4 on cuda: {NO_TWIN}"),
        (precision(), "cpu", "precision.backend: 'te' can't run recipe fp8_blockwise_ue8m0 on cpu: Transformer Engine needs a CUDA device"),
        (
            precision(rules=[{"modules": "0", "recipe": "mxfp8"}]),
            "cuda",
            "precision.backend: 'te' can't run recipe mxfp8 on cuda: Device compute capability 10.0 or higher required for MXFP8 execution",
        ),
        ({"recipe": "mxfp8", "backend": "tee"}, "cuda", "precision.backend: unknown backend 'tee'; did you mean 'te'?"),
    ],
)
def test_an_unsupported_precision_is_one_line_and_changes_no_model(te: ModuleType, wanted: dict, device: str, message: str):
    net = model()
    for function in (make_plan, convert):
        with pytest.raises(UserError) as error:
            function(net, wanted, device=device)
        assert str(error.value) == message
    assert [type(module) for module in net] == [nn.Linear, nn.ReLU, nn.Linear]


def test_layers_of_other_shapes_are_kept_in_high_precision(te: ModuleType):
    net = nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 32), nn.Linear(32, 32))
    plan = convert(net, precision(), device="cuda")
    assert [type(module) for module in net] == [nn.Linear, nn.Linear, TELinear]
    reason = "Transformer Engine's Float8BlockScaling takes features in multiples of 16, not 24 x 64"
    assert (plan.layers[0].reason, plan.layers[0].blocked) == (reason, True)
    with pytest.raises(UserError, match=r"precision.strict: 0 can't be converted: Transformer Engine's Float8BlockScaling takes features"):
        make_plan(net, precision(strict=True), device="cuda")
    with pytest.raises(UserError, match="takes features in multiples of 16, not 24 x 64"):
        TELinear.from_linear(nn.Linear(64, 24), library.get("fp8_tensorwise"))


# Conversion in place


@pytest.mark.parametrize("bias", [True, False])
def test_conversion_is_in_place_and_back(te: ModuleType, bias: bool):
    net = model(bias)
    modules, parameters, keys = list(net.modules()), dict(net.named_parameters()), list(net.state_dict())
    x = torch.randn(16, 64)
    plain = net(x)
    for wanted in (precision(), precision("fp8_tensorwise"), "fp8_blockwise", precision("fp8_blockwise"), precision("fp8_delayed"), "none"):
        convert(net, wanted, device="cuda" if isinstance(wanted, dict) else "cpu")
        kind = {"none": nn.Linear, "fp8_blockwise": LowPrecisionLinear}.get(str(wanted), TELinear)
        assert isinstance(net[0], kind)
        if kind is not LowPrecisionLinear:
            assert torch.equal(net(x), plain)
        assert list(map(id, net.modules())) == list(map(id, modules))
        assert {name: id(parameter) for name, parameter in net.named_parameters()} == {name: id(p) for name, p in parameters.items()}
        assert [key for key in net.state_dict() if "_extra_state" not in key] == keys
        assert any("_extra_state" in key for key in net.state_dict()) == isinstance(net[0], DelayedTELinear)
    fresh = set(nn.Linear(1, 1).__dict__)
    for recipe in ("fp8_delayed", "fp8_blockwise"):
        convert(net, precision(recipe), device="cuda")
        net(x)
        assert revert(net) == 2
        assert [type(module) for module in net] == [nn.Linear, nn.ReLU, nn.Linear]
        assert set(net[0].__dict__) == fresh
    assert list(net.state_dict()) == keys


def test_gradients_go_to_the_parameters(te: ModuleType):
    net, twin = model(), model()
    convert(net, precision(), device="cuda")
    x, g = torch.randn(2, 8, 64, requires_grad=True), torch.randn(2, 8, 48)
    y = net(x)
    assert torch.equal(y, twin(x))
    y.backward(g)
    found = [x.grad, *(parameter.grad for parameter in net.parameters())]
    x.grad = None
    twin(x).backward(g)
    for ours, theirs in zip(found, [x.grad, *(parameter.grad for parameter in twin.parameters())], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert isinstance(net[0], TELinear)
    assert {call[0] for call in FakeLinear.calls} == {net[0].twin, net[2].twin}
    assert {call[1] for call in FakeLinear.calls} == {(16, 64), (16, 32)}


@pytest.mark.parametrize("recipe, rows", [("fp8_tensorwise", 16), ("mxfp8", 32)])
@pytest.mark.parametrize("tokens", [0, 1, 15, 16])
def test_tokens_are_filled_up(te: ModuleType, recipe: str, rows: int, tokens: int):
    layer = te_linear(recipe)
    x = torch.randn(tokens, 3, 64)[:, 0].requires_grad_()
    y = layer(x)
    assert FakeLinear.calls[-1][1] == (rows, 64)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert x.grad is not None
    assert layer.bias.grad is not None
    assert (layer.bias.grad == tokens).all()  # the rows that fill up the block have no part in it
    assert x.grad.shape == x.shape


def test_autocast_and_no_grad(te: ModuleType):
    layer = te_linear("fp8_blockwise")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = layer(torch.randn(4, 4, 64))
    assert (y.dtype, y.shape, y.requires_grad) == (torch.bfloat16, (4, 4, 32), False)
    assert FakeLinear.calls[-1][2:] == (torch.bfloat16, False)
    layer.to(torch.bfloat16)
    assert layer(torch.randn(4, 4, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert FakeLinear.calls[-1][2:] == (torch.bfloat16, True)
    assert "recipe=fp8_blockwise, backend=te" in repr(layer)


def test_the_parameters_are_those_of_the_moment(te: ModuleType):
    layer = te_linear("fp8_blockwise")
    x = torch.randn(16, 64)
    layer(x)
    assert [id(parameter) for parameter in FakeLinear.made[-1].parameters()] == [id(layer.weight), id(layer.bias)]
    assert list(layer.modules()) == [layer]
    layer.weight = nn.Parameter(torch.zeros(32, 64))
    assert torch.equal(layer(x), layer.bias.expand(16, 32))
    with torch.no_grad():
        layer.weight[0] = 1
    torch.testing.assert_close(layer(x)[:, 0], x.sum(1) + layer.bias[0])
    y = torch.func.functional_call(layer, {"weight": torch.zeros(32, 64), "bias": torch.ones(32)}, (x,))
    assert torch.equal(y, torch.ones(16, 32))
    assert len(FakeLinear.made) == 1


def test_copies_stand_alone(te: ModuleType):
    for recipe in ("fp8_blockwise", "fp8_delayed"):
        layer = te_linear(recipe)
        x = torch.randn(16, 64)
        y = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is type(layer)
            assert other.weight is not layer.weight
            assert torch.equal(other(x), y)
            assert FakeLinear.made[-1].weight is other.weight
        assert layer._inner is not None


class DTensor(nn.Parameter):
    """A parameter with the class name by which a sharded parameter is recognised."""


def test_a_sharded_weight_is_not_kept_for_the_backward(te: ModuleType):
    layer = te_linear("fp8_blockwise")
    layer(torch.randn(16, 64))
    assert not FakeLinear.made[-1]._is_fsdp2
    layer.weight = DTensor(torch.zeros(32, 64))
    layer.weight = nn.Parameter(torch.zeros(32, 64))  # as FSDP2 does in each forward
    layer(torch.randn(16, 64))
    assert FakeLinear.made[-1]._is_fsdp2


# Delayed scaling


def states(layer: TELinear) -> tuple[Any, Any]:
    return layer._inner.fp8_meta["scaling_fwd"], layer._inner.fp8_meta["scaling_bwd"]


def step(layer: TELinear, x: Tensor, g: Tensor) -> None:
    layer(x).backward(g)


def test_scales_follow_the_largest_amax_seen(te: ModuleType):
    layer = te_linear("fp8_delayed")
    x, g = torch.randn(16, 64), torch.randn(16, 32)
    step(layer, 2 * x, 4 * g)
    forward, backward = states(layer)
    assert layer._inner.fp8_meta["place in the updates"] == []
    w = layer.weight.abs().max()
    assert torch.equal(forward.scale, torch.ones(3))  # until the next pass: the backward of a sharded weight quantises the weight once more
    assert torch.equal(backward.scale, torch.ones(2))
    for _ in range(2):
        step(layer, x, g)
        torch.testing.assert_close(forward.scale, torch.stack([448 / (2 * x.abs().max()), 448 / w, torch.ones(())]))
        torch.testing.assert_close(backward.scale, torch.stack([57344 / (4 * g.abs().max()), torch.ones(())]))
    torch.testing.assert_close(forward.amax_history[-2:, 0], torch.stack([2 * x.abs().max(), x.abs().max()]))
    torch.testing.assert_close(forward.amax_history[0, 0], x.abs().max())  # waits for the next update
    assert (forward.amax_history[1:-2] == 0).all()


def test_passes_without_gradients_and_overflows_leave_no_trace(te: ModuleType):
    layer = te_linear("fp8_delayed")
    x, g = torch.randn(16, 64), torch.randn(16, 32)
    step(layer, x, g)
    forward, backward = states(layer)
    before = [copy.deepcopy(state) for state in (forward, backward)]
    with torch.no_grad():
        layer(100 * x)
    for state, old in zip((forward, backward), before, strict=True):
        assert torch.equal(state.scale, old.scale)
        assert torch.equal(state.amax_history, old.amax_history)
    step(layer, x * torch.inf, g)
    scale = forward.scale.clone()
    step(layer, x / 2, g)
    assert torch.equal(forward.scale, scale)
    assert forward.amax_history.isfinite().all()


def test_the_first_pass_may_be_one_of_inference(te: ModuleType):
    layer = te_linear("fp8_delayed")
    with torch.inference_mode():
        layer(torch.randn(16, 64))
    step(layer, torch.randn(16, 64), torch.randn(16, 32))


def test_delayed_scaling_resumes(te: ModuleType):
    layer, other = te_linear("fp8_delayed"), te_linear("fp8_delayed")
    key, empty = "_extra_state", layer.state_dict()
    assert (list(empty), empty[key].shape) == (["weight", "bias", key], (1025, 5))
    assert torch.equal(empty[key], torch.cat((torch.ones(1, 5), torch.zeros(1024, 5))))
    x, g = torch.randn(16, 64), torch.randn(16, 32)
    for scale in (8, 4):
        step(layer, scale * x, scale * g)
    saved = layer.state_dict()
    for fresh in (True, False):  # before and after its first forward
        other.load_state_dict(saved)
        assert torch.equal(other.state_dict()[key], saved[key])
        before = copy.deepcopy(layer)
        for one in (before, other):
            step(one, x, g)
        assert torch.equal(other.state_dict()[key], before.state_dict()[key]), fresh
        other.to(torch.float64).float()  # this makes a new te.Linear, with the old state
        assert torch.equal(other.state_dict()[key], before.state_dict()[key]), fresh
    with pytest.raises(ValueError, match=r"the extra state of a layer with delayed scaling is a matrix \[1025, 5\]"):
        layer.set_extra_state(torch.zeros(3))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        te_linear("fp8_tensorwise").load_state_dict(saved)


# Around the layer


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_code_calls_it_between_its_graphs(te: ModuleType, monkeypatch: pytest.MonkeyPatch):
    net, x = model(), torch.randn(5, 64)
    for recipe in ("fp8_blockwise", "fp8_delayed"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        convert(net, precision(recipe), device="cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # otherwise the compiler would ask the GPU
        torch._dynamo.reset()
        compiled = torch.compile(net, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), net(x))
        assert [call[1] for call in FakeLinear.calls[-4:]] == [(16, 64), (16, 32)] * 2
    torch._dynamo.reset()


def test_nothing_imports_transformer_engine_until_it_is_used():
    code = "import sys, lowprec.conversion, lowprec.testing.te; print('transformer_engine' in sys.modules, 'torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]


@pytest.mark.parametrize("spec", ["e4m3[1x128 fp32]", "e4m3[1x128 e8m0]", "e5m2[128x128 fp32]", "e4m3[128x128 e8m0]", "e4m3[tensor fp32]"])
def test_its_quantisers_layouts_become_ours(te: ModuleType, spec: str):
    x = heavy_tailed(208, 400, seed=0)
    for transposed in (False, True):
        codes, scale = te_quantized(x, OperandSpec.parse(spec), transposed=transposed)
        ours = quantize(x.t() if transposed else x, OperandSpec.parse(spec))
        assert ours.scale is not None
        assert codes.dtype == ours.data.dtype
        assert torch.equal(codes.view(torch.uint8), ours.data.contiguous().view(torch.uint8))
        assert torch.equal(scale, ours.scale)


@pytest.mark.parametrize(
    "spec", ["bf16", "e4m3[row fp32]", "e4m3[1x128 e8m0:floor]", "e4m3[tensor fp32 delayed:4]", "e4m3[1x128 fp32 stochastic]"]
)
def test_specs_without_a_quantiser_are_refused(te: ModuleType, spec: str):
    with pytest.raises(ValueError, match="Transformer Engine has no quantiser for"):
        te_quantized(torch.zeros(16, 16), OperandSpec.parse(spec))
