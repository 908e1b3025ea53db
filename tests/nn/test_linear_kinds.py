"""Converted layers of other classes than nn.Linear: transformers' Conv1D and plain subclasses; and what they refuse to multiply."""

import copy
import pickle
from abc import ABC
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lowprec
from lowprec.errors import UserError
from lowprec.nn import LowPrecisionLinear, codes, swiglu
from lowprec.observe.probe import Probe
from lowprec.recipe import library
from lowprec.testing import gaussian
from lowprec.training.checkpoint.peft import is_peft
from tests.nn.native import on_cpu

T = TypeVar("T")


class Inherits(nn.Linear):
    def doubled(self) -> int:
        return 2 * self.out_features


class Mixed(nn.Linear, Generic[T], ABC):
    """A class whose metaclass is another one."""


class HasHistories:
    def histories(self) -> str:
        return "mine"


class Inherited(nn.Linear, HasHistories):
    """A class that inherits a name of a converted layer's from a mix-in behind nn.Linear."""


class CallsSuper(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Casts(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class Multiplies(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight.T)
        return y + self.bias


class Slotted(nn.Linear):
    __slots__ = ("mark",)


class Registers(nn.Linear):
    def __init_subclass__(cls) -> None:
        raise AssertionError("a subclass has been made")


class NamedAlike(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.backend = "mine"


class Halves(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class Branches(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x


class Counts(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        seen.append(1)
        return super().forward(x)


class InFp32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)


class LeavesItsBiasOut(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Detaches(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.data, self.bias)


class Intercepts(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


seen: list[int] = []


def twins(recipe: str, K: int = 96, N: int = 160) -> tuple[Any, Any]:
    """Return an nn.Linear and a Conv1D of the same weights, both converted as layer 3 of a model."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(K, N), Conv1D(N, K)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias)
    made = [LowPrecisionLinear.from_linear(layer, library.get(recipe), seed=7, layer=3) for layer in (linear, conv)]
    return made[0], made[1]


def results(layer: Any, passes: int = 2, autocast: bool = False) -> list[Tensor]:
    """Return outputs and gradients of two passes, those of parameters accumulated and as nn.Linear holds them."""
    found = []
    for number in range(passes):
        x = gaussian(24, layer.w_NK.shape[1], number).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.backward(gaussian(*y.shape, 9 + number).to(y.dtype))
        found += [y.detach(), x.grad]
    dw = layer.weight.grad
    return [*found, dw.t() if layer.transposed else dw, layer.bias.grad]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recipe", ["fp8_blockwise", "fp8_delayed", "mxfp4_aws", "nvfp4", "qat_int8dyn_int4", "bf16"])
def test_a_conv1d_computes_the_bits_of_a_linear_layer(recipe: str, autocast: bool):
    linear, conv = twins(recipe)
    for ours, theirs in zip(results(conv, autocast=autocast), results(linear, autocast=autocast), strict=True):
        assert torch.equal(ours, theirs)
    assert [(n, b.tolist()) for n, b in conv.named_buffers()] == [(n, b.tolist()) for n, b in linear.named_buffers()]


def test_a_conv1d_keeps_its_codes_until_its_weight_changes(monkeypatch: pytest.MonkeyPatch):
    on_cpu(monkeypatch)
    linear, conv = twins("fp8_blockwise", 128, 256)
    for ours, theirs in zip(results(conv), results(linear), strict=True):
        assert torch.equal(ours, theirs)
    assert conv in codes._weights
    before = conv(gaussian(4, 128, 1))
    with torch.no_grad():
        conv.weight.mul_(2)
    assert not torch.equal(conv(gaussian(4, 128, 1)), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside PyTorch
@pytest.mark.parametrize("kind", [Conv1D, Casts])
def test_layers_of_other_classes_compile_to_one_graph(kind: Any):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(kind(64, 96), nn.GELU())
    lowprec.convert(model, "mxfp8")
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), gaussian(8, model[0].w_NK.shape[1], 1)
    gradients = []
    for run in (model, compiled):
        y = run(x)
        y.square().sum().backward()
        gradients.append((y, model[0].weight.grad))
        model.zero_grad()
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [Conv1D, Inherits, Mixed, CallsSuper, Casts, Multiplies])
def test_layers_of_other_classes_are_converted_and_reverted(kind: Any):
    torch.manual_seed(0)
    model = nn.Sequential(kind(64, 96), nn.GELU())
    layer, x = model[0], gaussian(8, layer_inputs(model[0]), 1)
    weight, keys, exact = layer.weight, list(model.state_dict()), model(x)
    plan = lowprec.convert(model, "mxfp8")
    assert [(p.converted, p.kind, p.blocked) for p in plan.layers] == [(True, kind.__name__, False)]
    assert plan.layers[0].shape == (exact.shape[1], x.shape[1])
    assert isinstance(layer, LowPrecisionLinear)
    assert isinstance(layer, kind)
    assert model[0] is layer
    assert layer.weight is weight
    assert list(model.state_dict()) == keys
    assert "recipe=mxfp8" in repr(model)
    assert 0 < (model(x) - exact).norm() / exact.norm() < 0.1
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied[0]) is type(layer)
        assert torch.equal(copied(x), model(x))
    probe = Probe(model.train())
    with probe.sampling():
        model(x).sum().backward()
    assert 10 < probe.layers["0"].sqnr_w < 60
    assert lowprec.revert(model) == 1
    assert type(layer) is kind
    assert torch.equal(model(x), exact)


def layer_inputs(layer: Any) -> int:
    return layer.nx if isinstance(layer, Conv1D) else layer.in_features


def test_methods_and_attributes_of_a_subclass_stay():
    layer: Any = Inherits(8, 12)
    layer.mark = "kept"
    lowprec.convert(nn.Sequential(layer), "mxfp8")
    assert (layer.doubled(), layer.mark) == (24, "kept")


@pytest.mark.parametrize(
    "kind", [Halves, Branches, Counts, InFp32, LeavesItsBiasOut, Detaches, Intercepts, Slotted, Registers, NamedAlike, Inherited]
)
def test_subclasses_that_are_not_known_to_be_plain_are_not_changed(kind: Any):
    model = nn.Sequential(kind(8, 12))
    (layer,) = lowprec.convert(model, "mxfp8").layers
    assert layer.blocked
    assert type(model[0]) is kind
    assert seen == []
    if "forward" in vars(kind):
        assert layer.reason == f"{kind.__name__} is a subclass of nn.Linear with a forward of its own"


def named(name: str, *bases: type, **members: Any) -> Any:
    """Return a user's class that has the name of another library's."""
    return type(name, bases, members)


class Gated(nn.Module):
    """An MLP whose forward is the formula of SwiGLU, with an activation of the user's own."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(128, 256), nn.Linear(128, 256), nn.Linear(256, 128)
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_a_class_with_the_name_of_another_is_what_it_is():
    """Each class has the name of one that conversion knows, and nothing else of it."""
    holder = named("BaseTuner", nn.Sequential)
    model = nn.ModuleDict(
        {
            "conv": named("Conv1D", nn.Conv1d)(8, 8, 3),
            "empty": named("Conv1D", nn.Module)(),
            "sharded": named("FSDPLinear", Inherits)(8, 8),
            "tuned": named("BaseTunerLayer", holder)(nn.Linear(8, 8)),
            "peft": named("PeftModel", nn.ModuleDict)({"other": nn.Linear(8, 8)}),
            "tensor": nn.Linear(8, 8),
        }
    )
    plan = lowprec.convert(model, {"recipe": "mxfp8", "rules": [{"modules": r"peft\.other", "recipe": "mxfp4"}]})
    assert [layer.name for layer in plan.converted] == ["sharded", "tuned.0", "peft.other", "tensor"]
    assert is_peft(named("PeftModel", nn.Module)()) is False
    relu, silu = Gated(named("SiLU", nn.ReLU)()), Gated(nn.SiLU())
    assert (swiglu.is_swiglu(relu), swiglu.is_swiglu(silu)) == (False, True)


def test_the_layers_of_an_attention_that_does_not_call_them_stay():
    plan = {layer.name: layer for layer in lowprec.convert(nn.MultiheadAttention(16, 2), "mxfp8").layers}
    assert plan["out_proj"].blocked
    assert plan["out_proj"].reason == "nn.MultiheadAttention multiplies by its weight without calling it"


# Dtypes and kinds of tensors


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.bfloat16, torch.float16])
def test_an_input_that_linear_layers_refuse_is_refused_alike(dtype: torch.dtype, autocast: bool):
    outcomes = []
    for recipe in ("none", "mxfp8", "fp32"):
        model = nn.Sequential(nn.Linear(32, 16))
        lowprec.convert(model, recipe)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            try:
                outcomes.append(model(torch.ones(2, 32).to(dtype)).dtype)
            except RuntimeError as error:
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_subclass_that_casts_decides_the_dtype_of_the_result():
    model = nn.Sequential(Casts(32, 16))
    lowprec.convert(model, "mxfp8")
    assert model(torch.ones(2, 32).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(UserError, match="recipe mxfp8 has no result in float64"):
        model(torch.ones(2, 32).double())


@pytest.mark.parametrize("recipe", ["fp32", "mxfp8"])
def test_float64_is_not_converted(recipe: str):
    model = nn.Sequential(nn.Linear(32, 16).double())
    (layer,) = lowprec.convert(model, recipe).layers
    assert layer.blocked
    assert layer.reason == "its weight is float64, and a recipe's products have fp32's precision at most"
    later = nn.Sequential(nn.Linear(32, 16))
    lowprec.convert(later, recipe)
    later.double()
    with pytest.raises(UserError, match=f"recipe {recipe} can't run: its weight is float64"):
        later(torch.ones(2, 32).double())


class Wrapped(Tensor):
    """A weight of a class of its own, as libraries of quantisation make them."""


def test_weights_that_are_no_plain_parameters_stay_and_strict_says_so():
    wrapped = nn.Linear(8, 8)
    wrapped._parameters["weight"] = Wrapped(8, 8)  # pyright: ignore[reportArgumentType]
    int8 = nn.Linear(8, 8)
    int8.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    float8 = nn.Linear(8, 8)
    float8.weight = nn.Parameter(torch.zeros(8, 8).to(torch.float8_e4m3fn), requires_grad=False)
    packed = nn.Linear(8, 8)
    packed.weight = nn.Parameter(torch.zeros(16, 4))
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    cases = {
        "its weight is of class Wrapped, not a plain tensor": wrapped,
        "its weight is int8: already quantised": int8,
        "its weight is float8_e4m3fn: already quantised": float8,
        "its weight is [16, 4], not [8, 8]: packed, sharded or replaced": packed,
        "its weight is no parameter: a parametrization or a hook computes it": parametrized,
    }
    for reason, layer in cases.items():
        kind = type(layer)
        (plan,) = lowprec.convert(nn.Sequential(layer), "mxfp8").layers
        assert plan.blocked
        assert reason in plan.reason
        assert type(layer) is kind
        with pytest.raises(UserError, match=r"precision\.strict: 0 can't be converted"):
            lowprec.convert(nn.Sequential(layer), {"recipe": "mxfp8", "strict": True})
