"""A watch finds the converted layers that a model does not call, compiled or not, and a watched step computes the same bits."""

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM

from lowprec.conversion.convert import convert
from lowprec.nn import calls
from lowprec.nn.te_linear import TELinear
from lowprec.observe.called import BYPASSED, FROZEN, UNUSED, Calls
from tests.nn.fake_te import install


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """Multiply by the weight of a layer without calling it."""
    return nn.functional.linear(x, layer.weight, layer.bias)  # pyright: ignore[reportArgumentType]


class Mlp(nn.Module):
    """`up` is multiplied by without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(product(self.up, x) * self.gate(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Stack(nn.Module):
    """The blocks of `skipped` do not run."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.skipped: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if number not in self.skipped:
                x = block(x)
        return x


pytestmark = [
    pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:.*torch\.autograd\.function\.Function.* should not be instantiated:DeprecationWarning"),
]

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))


def converted(recipe: str = "mxfp4", **settings: Any) -> Stack:
    model = Stack()
    convert(model, {"recipe": recipe, **settings})
    return model


def watched(model: Any, *inputs: Any) -> dict[str, str]:
    found = Calls(model)
    with found.watching():
        model(*inputs or (X,)).sum().backward()
    return found.uncalled


def watching(model: Stack) -> bool:
    """Return whether a watch notes the calls of `model`."""
    model(X)
    layers = set(model.modules())
    return any(notes is not None and notes.seen & layers for notes in (reference() for reference in calls._running))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    traces = logging.getLogger("torch.__trace")
    level = traces.level
    traces.setLevel(logging.WARNING)  # pytest would format megabytes of them
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    traces.setLevel(level)


def test_a_weight_that_is_read_without_its_layer_is_found():
    model = converted()
    assert watched(model) == {f"blocks.{n}.mlp.up": BYPASSED for n in range(4)}
    assert not watching(model)


def test_a_layer_that_is_not_used_yet_has_another_reason():
    model = converted()
    model.skipped = {2}
    found = watched(model)
    assert {name for name, why in found.items() if why == UNUSED} == {f"blocks.2.mlp.{part}" for part in ("up", "gate", "down")}
    assert found["blocks.1.mlp.up"] == BYPASSED
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = None
    found = Calls(model)
    with found.watching():
        model(X)
    assert found.uncalled["blocks.1.mlp.up"] == found.uncalled["blocks.2.mlp.down"] == FROZEN


def test_an_error_leaves_the_last_result_and_no_watch():
    model = converted()
    found = Calls(model)
    with found.watching():
        model(X).sum().backward()
    before = dict(found.uncalled)
    with pytest.raises(RuntimeError), found.watching():
        model(X[:, :3])
    assert found.uncalled == before
    assert not watching(model)


def test_a_watch_that_nobody_ends_goes_with_its_owner():
    model = converted()
    found = Calls(model)
    found.begin()
    assert watching(model)
    layer = weakref.ref(model.blocks[0].get_submodule("mlp.down"))
    del found, model
    gc.collect()
    assert layer() is None


@pytest.mark.parametrize("recipe", ["fp8_blockwise_ue8m0", "fp8_delayed"])
def test_layers_of_transformer_engine_are_called(recipe: str, monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch)
    model = Stack()
    convert(model, {"recipe": recipe, "backend": "te"}, device="cuda")
    assert isinstance(model.blocks[0].get_submodule("mlp.up"), TELinear)
    found = Calls(model)
    with found.watching():
        model(X)
    assert found.uncalled.keys() == {f"blocks.{n}.mlp.up" for n in range(4)}


def test_stacks_of_experts_are_called():
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_local_experts=4, num_key_value_heads=2, **sizes)
    model = MixtralForCausalLM(config)
    plan = convert(model, "mxfp8")
    assert any(layer.experts == 4 for layer in plan.converted)
    found = Calls(model)
    with found.watching():
        tokens = torch.arange(16)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert found.uncalled == {}
    assert len(found.called()) == len(plan.converted)


# Compiled: a layer that waits for its recipe is called as all are, and is traced in no time.


def waiting(model: nn.Module) -> Any:
    convert(model, "none", later=["mxfp4"])
    return model


def test_compiled_code_is_traced_once_for_several_blocks_and_a_watch_changes_nothing(fresh_compiler: None):
    results = []
    for watches in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = waiting(Stack())
        model.skipped = {3}
        for block in model.blocks:
            block.compile(backend="eager")
        found = Calls(model)
        for _ in range(2):  # the second step traces nothing
            if watches:
                found.begin()
            model(X).square().mean().backward()
            if watches:
                unused = {f"blocks.3.mlp.{part}": UNUSED for part in ("up", "gate", "down")}
                assert found.end() == {f"blocks.{n}.mlp.up": BYPASSED for n in range(3)} | unused
        gradients = [parameter.grad for block in model.blocks[:3] for parameter in block.parameters()]
        results.append((torch._dynamo.utils.counters["stats"]["unique_graphs"], gradients))
    (graphs, plain), (graphs_seen, seen) = results
    assert graphs == graphs_seen > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert not any(layer in calls.traced for layer in model.blocks[2].modules())


def test_a_whole_model_is_compiled_with_checkpointing_inside(fresh_compiler: None):
    model = waiting(Stack())
    for block in model.blocks:
        plain = block.mlp.forward
        block.mlp.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
    assert watched(torch.compile(model, backend="eager", fullgraph=True)) == {f"_orig_mod.blocks.{n}.mlp.up": BYPASSED for n in range(4)}


def test_layers_that_are_compiled_by_themselves_share_code_with_all_others(fresh_compiler: None):
    model = waiting(nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))))
    for layer in model:
        layer.compile(backend="eager")
    assert watched(model) == {}


def test_a_watched_step_computes_the_same_bits():
    results = []
    for watches in (False, True):
        model = converted("nvfp4")
        found = Calls(model)
        for _ in range(2):
            if watches:
                found.begin()
            model(X).square().mean().backward()
        found.cancel()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
