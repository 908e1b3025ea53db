"""Converted layers under torch.compile: gradients, the number of compilations, and layers restored in another process."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

import lowprec
from lowprec.nn import LowPrecisionLinear
from lowprec.nn.gemms import _TABLE
from lowprec.recipe import library
from lowprec.testing import sqnr_db

pytestmark = [
    # All three warnings come from inside PyTorch.
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:.*torch\.autograd\.function\.Function.* should not be instantiated:DeprecationWarning"),
]
RECIPES = ["fp32", "bf16", "fp8_delayed", "fp8_blockwise", "mxfp4_quartet", "nvfp4", "qat_int8dyn_int4"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def layer(recipe: str, bias: bool = False) -> LowPrecisionLinear:
    return LowPrecisionLinear.from_linear(nn.Linear(128, 64, bias=bias), library.get(recipe))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="graphs of Functions look otherwise there; the gradients below tell")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_traced_forward_ends_in_a_tensor_of_its_own(recipe: str, autocast: bool):
    """PyTorch 2.11 loses all gradients if the last call of a traced Function's forward returns the tensor that it was given."""
    traced: list[torch.fx.GraphModule] = []

    def look(module: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        traced.extend(part for name, part in module.named_modules() if name.startswith("fwd_body"))
        return module.forward

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.compile(layer(recipe), backend=look)(torch.randn(64, 128, requires_grad=True))
    (forward,) = traced
    (output,) = (node for node in forward.graph.nodes if node.op == "output")
    (last,), _ = output.args[0]
    made_of = [node.meta["example_value"] for node in last.all_input_nodes]
    assert made_of
    assert all(last.meta["example_value"] is not value for value in made_of)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recipe", ["fp32", "bf16", "fp8_blockwise", "mxfp4"])
def test_gradients_of_layers_without_bias(recipe: str, autocast: bool):
    eager, x, g = layer(recipe), torch.randn(64, 128), torch.randn(64, 64)
    results = []
    for module in (eager, torch.compile(eager, backend="aot_eager", fullgraph=True)):
        inputs = x.clone().requires_grad_()
        eager.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = module(inputs)
        y.backward(g.to(y.dtype))
        assert inputs.grad is not None
        assert eager.weight.grad is not None
        results.append((y.detach(), inputs.grad, eager.weight.grad.clone()))
    for one, other in zip(*results, strict=True):
        assert one.norm() > 0
        assert sqnr_db(one.float(), other.float()) > 40.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(64, 64, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x)


def test_each_recipe_is_compiled_once_whatever_was_before_it():
    """The recipes have formats, blocks and scales of every kind. They run one after another, then mixed in one model and in one block."""
    model = nn.Sequential(Block(), Block())
    for block in model:
        block.compile(backend="eager")  # Dynamo alone counts graphs
    graphs: list[int] = []

    def step(precision: object) -> None:
        lowprec.convert(model, precision, later=[library.get(name) for name in phases], compiled=True)
        model(torch.randn(32, 64, requires_grad=True)).backward(torch.randn(32, 64))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    phases = ["fp8_blockwise", "mxfp4", "fp16", "nvfp4", "qat_int8dyn_int4", "fp8_delayed"]
    for recipe in phases:
        step(recipe)
    assert graphs == [1, 2, 3, 4, 5, 6]
    step("fp8_blockwise")
    step({"recipe": "mxfp4", "rules": [{"modules": r"0\..*", "recipe": "fp8_blockwise"}]})
    assert graphs[6:] == [6, 6]
    step({"recipe": "mxfp4", "rules": [{"modules": r".*\.q", "recipe": "fp8_blockwise"}]})
    assert graphs[8] == 7  # a block of two recipes has other code


def test_a_layer_that_comes_from_another_process():
    original, x = layer("fp8_blockwise", bias=True), torch.randn(8, 128)
    expected, saved, known = original(x), pickle.dumps(original), dict(_TABLE)
    _TABLE.clear()
    try:
        restored = pickle.loads(saved)
        assert [gemms.recipe for gemms in _TABLE.values()] == [original.recipe]
        assert torch.equal(restored(x), expected)
    finally:
        _TABLE.clear()
        _TABLE.update(known)
    assert pickle.loads(saved).gemms["cpu"] is original.gemms["cpu"]  # layers with the same recipe share one object


class Two(nn.Module):
    def __init__(self, *recipes: str) -> None:
        super().__init__()
        linears = [nn.Linear(64, 64, bias=False) for _ in recipes]
        pairs = enumerate(zip(linears, recipes, strict=True))
        self.layers = nn.ModuleList(LowPrecisionLinear.from_linear(linear, library.get(name), layer=n) for n, (linear, name) in pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.layers:
            x = nn.functional.gelu(module(x))
        return x


def step(module: Any, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    grads = (leaf, *module.parameters())
    return [y.detach(), *(t.grad.clone() for t in grads if t.grad is not None)]


def unique_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_dynamic_shapes_are_one_graph_for_every_kind_of_recipe():
    """Two layers read the same numbers of formats and scalings (Dynamo fails if they become variables); lengths that are multiples of no
    block, and of one block and more, run in the same graph."""
    model = Two(
        "fp8_blockwise",
        "fp8_blockwise",
        "nvfp4",
        "nvfp4",
        "mxfp4_aws",
        "fp8_delayed",
        "fp8_delayed",
        "qat_int8dyn_int4",
        "qat_int8dyn_int4",
    )
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    for length in (32, 48, 131):
        assert len(step(compiled, torch.randn(2, length, 64))) == 2 + len(model.layers)
    assert unique_graphs() == 1


@pytest.mark.parametrize("marked", [False, True])
def test_a_second_length_is_the_last_compilation(marked: bool):
    """Plain layers take one graph for the first length and one for all others, or one if the axis is marked. So do converted ones, and
    on a CPU they have the bits of eager code."""
    compiled_model, eager = Two("fp8_blockwise", "mxfp8"), Two("fp8_blockwise", "mxfp8")
    eager.load_state_dict(compiled_model.state_dict())
    compiled = torch.compile(compiled_model, backend="aot_eager", fullgraph=True)
    graphs = []
    for length in (32, 48, 80, 37, 131):
        x = torch.randn(2, length, 64)
        if marked:
            torch._dynamo.mark_dynamic(x, 1)
            x_leaf = x.requires_grad_()
            compiled(x_leaf)
        else:
            for ours, expected in zip(step(compiled, x), step(eager, x), strict=True):
                assert torch.equal(ours, expected)
        graphs.append(unique_graphs())
    assert graphs == ([1] * 5 if marked else [1, 2, 2, 2, 2])


def test_gemms_of_different_backends_in_one_layer():
    """fprop is emulated, wgrad multiplies by torch: its operand must stay one that torch takes."""
    recipe = library.resolve({"base": "fp8_rowwise", "wgrad": "fp32"})
    module = LowPrecisionLinear.from_linear(nn.Linear(64, 64), recipe)
    assert module.gemms["cpu"].wgrad_backend.name == "torch"
    x = torch.randn(40, 64)
    expected = step(module, x)
    for ours, other in zip(step(torch.compile(module, backend="aot_eager", fullgraph=True), x), expected, strict=True):
        assert torch.equal(ours, other)
