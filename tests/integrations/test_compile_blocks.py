"""compile_blocks compiles the repeated blocks of a model, in place."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor
from transformers import LlamaForCausalLM

from lowprec.errors import UserError
from lowprec.integrations import compile_blocks, compile_deterministically
from lowprec.integrations.compile import find_blocks
from lowprec.training.control.controller import PrecisionController
from tests.builders import tiny_llama

pytestmark = [
    # Both come from inside PyTorch: the import of Dynamo and Inductor, and .grad of a block's input.
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def three_blocks() -> LlamaForCausalLM:
    return tiny_llama(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_key_value_heads=1)


def compiled_modules(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module._compiled_call_impl is not None}


class Mixture(nn.Module):
    """A model whose blocks hold a list (of experts) that is longer than the list of blocks."""

    def __init__(self, no_split=None):
        super().__init__()
        if no_split:
            self._no_split_modules = no_split
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.adapters = nn.ModuleList([nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)])  # a list of several classes


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))


def test_llama_layers_are_compiled_in_place():
    model = three_blocks()
    names = list(model.state_dict())
    choice = compile_blocks(model, "blocks", "cpu")
    assert choice.compiled == 3
    assert choice.reason == "each LlamaDecoderLayer in 'model.layers', one compilation for all"
    assert compiled_modules(model) == {"model.layers.0", "model.layers.1", "model.layers.2"}
    assert list(model.state_dict()) == names


def test_off_does_nothing():
    model = three_blocks()
    choice = compile_blocks(model, "off", "cpu")
    assert (choice.compiled, choice.reason) == (0, "compile: off")
    assert compiled_modules(model) == set()
    assert compile_blocks(nn.Linear(2, 2), "off", "cpu").compiled == 0


def test_experts_are_not_taken_for_blocks():
    assert find_blocks(Mixture())[0] == "blocks"
    assert find_blocks(Mixture(no_split=["Block"]))[0] == "blocks"
    assert find_blocks(Mixture(no_split={"Block"}))[0] == "blocks"


def test_errors(monkeypatch):
    with pytest.raises(UserError, match="Linear has no ModuleList of equal blocks"):
        compile_blocks(nn.Linear(2, 2), "blocks", "cpu")
    with pytest.raises(UserError, match="expected 'blocks' or 'off', got 'model'"):
        compile_blocks(three_blocks(), "model", "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler and 'no-such-compiler' is not installed"):
        compile_blocks(three_blocks(), "blocks", "cpu")
    assert compile_blocks(three_blocks(), "blocks", "cuda").compiled == 3


# A backend that only traces keeps this fast; the GPU tests use the real one.
def test_one_trace_serves_all_layers():
    torch._dynamo.reset()
    model = three_blocks()
    ids = torch.arange(20).view(2, 10)
    expected = model(ids, labels=ids).loss
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    _, blocks = find_blocks(model)
    for block in blocks:
        block.compile(backend=backend)
    loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert len(graphs) == 1
    torch._dynamo.reset()


# Deterministic kernels


@pytest.fixture
def kernels() -> Iterator[Callable[[], list[bool]]]:
    """Yield a function that returns how kernels are chosen: by shape alone, and pointwise ones by timing."""
    with inductor.patch({"deterministic": False, "triton.autotune_pointwise": True}):
        yield lambda: [inductor.deterministic, inductor.triton.autotune_pointwise]
    torch.use_deterministic_algorithms(False)


def start_a_run():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    controller = PrecisionController("bf16")
    controller.convert(model)
    controller.start(model, torch.optim.SGD(model.parameters()), total_steps=1)


@pytest.mark.parametrize("act", [compile_deterministically, start_a_run, lambda: compile_blocks(three_blocks(), "blocks", "cuda")])
def test_no_kernel_is_chosen_by_timing_under_deterministic_algorithms(kernels: Callable[[], list[bool]], act: Callable[[], object]):
    act()
    assert kernels() == [False, True]
    torch.use_deterministic_algorithms(True)
    act()
    assert kernels() == [True, False]
