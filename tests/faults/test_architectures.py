"""For each architecture of a zoo: the plan says what is multiplied in which precision, and the loss is that of the unconverted model."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowprec import convert
from lowprec.conversion.plan import Plan
from lowprec.nn import experts
from lowprec.observe.called import Calls
from tests.faults.architectures import NAMES, Batch, build

RECIPE = "fp8_blockwise"
STEPS = 3

FEW = ("gpt2", "jetmoe", "mamba", "qwen3_moe", "bert QuestionAnswering", "roberta SequenceClassification", "torchtitan's Llama")
FEW += ("torch's encoder", "an LSTM", "reads weights", "subclasses")
"""Architectures that every run of the tests checks."""

UNCONVERTED = ("torch's encoder",)
"""Architectures of which no layer can be converted: torch reads their weights itself."""


class Products(TorchDispatchMode):
    """Records which parameters are operands of a matrix product as they are, that is in high precision."""

    PRODUCTS = ("mm", "bmm", "linear", "matmul", "mkldnn_rnn_layer", "lstm", "mv", "einsum")
    WITH_BIAS = ("addmm", "baddbmm", "addmv")
    """Operators whose first operand is added."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            self.names.setdefault(parameter.untyped_storage().data_ptr(), name)
        self.exact: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = func.overloadpacket.__name__
        operands = []
        if operator in self.PRODUCTS:
            operands = [operand for operand in tree_leaves(args) if isinstance(operand, Tensor) and operand.dim() > 1]
        elif operator in self.WITH_BIAS:
            operands = args[1:3]
        self.exact |= {self.names[memory] for operand in operands if (memory := operand.untyped_storage().data_ptr()) in self.names}
        return func(*args, **(kwargs or {}))


def parameter_of(model: nn.Module, layer: str) -> str:
    """Return the name of a planned layer's parameter, of the first that shares its memory."""
    names = dict(model.named_parameters(remove_duplicate=False))
    parameter = names[layer] if layer in names else names[f"{layer}.weight"]
    return next(name for name, other in model.named_parameters() if other is parameter)


def count_calls(model: nn.Module, plan: Plan) -> set[str]:
    """Return a set that is going to hold the converted layers whose module has been called."""
    called: set[str] = set()
    for layer in plan.converted:
        holder, _, last = layer.name.rpartition(".")
        module = dict(model.named_modules()).get(layer.name)
        if module is None:
            module = experts.projections_of(model.get_submodule(holder))[last]
        module.register_forward_pre_hook(lambda *_, name=layer.name: called.add(name))
    return called


def train(model: nn.Module, batch: Batch) -> list[float]:
    """Return the losses of `STEPS` steps on one batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)  # the same dropout in both models
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def check(name: str) -> None:
    model, batch = build(name)
    unconverted = train(model, batch)

    model, batch = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = convert(model, RECIPE)
    called = count_calls(model, plan)
    calls = Calls(model)
    torch.manual_seed(0)
    with calls.watching(), Products(model) as products:
        model(**batch)
    converted = {layer.name for layer in plan.converted}
    assert bool(converted) == (name not in UNCONVERTED)
    # A layer that was not called is found, and no other one.
    assert sorted(converted - called) == sorted(calls.uncalled)
    # The weight of a layer that was called is never multiplied in high precision.
    assert sorted({parameter_of(model, layer) for layer in called} & products.exact) == []
    # Each parameter that is multiplied in high precision is listed as such, or was found.
    listed = {parameter_of(model, layer.name) for layer in plan.layers if not layer.converted}
    found = {parameter_of(model, layer) for layer in calls.uncalled}
    assert sorted(products.exact - listed - found) == []

    model, batch = build(name)
    convert(model, RECIPE)
    losses = train(model, batch)
    assert losses == pytest.approx(unconverted, rel=0.01)


@pytest.mark.parametrize("name", FEW)
def test_the_plan_of_an_architecture_is_what_runs(name: str) -> None:
    check(name)


@pytest.mark.faults
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FEW])
def test_the_plan_of_each_architecture_is_what_runs(name: str) -> None:
    check(name)
