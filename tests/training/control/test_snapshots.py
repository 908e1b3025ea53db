"""Snapshots: the restored state is the old one, bit for bit."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lowprec
from lowprec.nn import LowPrecisionLinear
from lowprec.training.control.snapshots import Snapshots
from tests.builders import tiny_llama

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def _model(recipe: str | None = None) -> LlamaForCausalLM:
    model = tiny_llama(num_hidden_layers=1, use_cache=True).train()
    if recipe is not None:
        lowprec.convert(model, recipe)
    return model


def _train(model: Any, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        batch = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _all_tensors(model: nn.Module, optimizer: Any) -> list[Tensor]:
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return [*model.parameters(), *model.buffers(), *state]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recipe", [None, "mxfp4_aws", "fp8_delayed"])
def test_training_again_gives_the_same_losses(optimizer: str, recipe: str | None):
    model = _model(recipe)
    optim = OPTIMIZERS[optimizer](model.parameters())
    snapshots = Snapshots()
    _train(model, optim, range(3))
    snapshots.take(3, model, optim)
    tensors = _all_tensors(model, optim)
    first = _train(model, optim, range(3, 7))
    end = [tensor.clone() for tensor in tensors]
    assert snapshots.restore(model, optim) == 3
    assert all(one is two for one, two in zip(_all_tensors(model, optim), tensors, strict=True))  # in place
    assert not all(torch.equal(one, two) for one, two in zip(tensors, end, strict=True))
    assert _train(model, optim, range(3, 7)) == first
    assert all(torch.equal(one, two) for one, two in zip(tensors, end, strict=True))


def test_buffers_of_a_recipe_come_back():
    model = _model("mxfp4_aws")
    optim = OPTIMIZERS["adamw"](model.parameters())
    layer = next(module for module in model.modules() if isinstance(module, LowPrecisionLinear))
    _train(model, optim, range(2))
    snapshots = Snapshots()
    snapshots.take(2, model, optim)
    passes = layer.rounding_state[2].item()  # pyright: ignore[reportIndexIssue]
    _train(model, optim, range(2))
    assert layer.rounding_state[2].item() == passes + 2  # pyright: ignore[reportIndexIssue]
    snapshots.restore(model, optim)
    assert layer.rounding_state[2].item() == passes  # pyright: ignore[reportIndexIssue]


def test_buffers_added_or_removed_with_a_recipe_are_not_changed():
    model = _model("mxfp4_aws")
    optim = OPTIMIZERS["adamw"](model.parameters())
    snapshots = Snapshots()
    snapshots.take(0, model, optim)
    lowprec.revert(model)
    model.register_buffer("extra", torch.ones(3))
    snapshots.restore(model, optim)
    assert not any("rounding_state" in name for name, _ in model.named_buffers())
    assert torch.equal(model.get_buffer("extra"), torch.ones(3))


def test_weights_and_moments_that_are_not_numbers_are_healed():
    model = _model("fp8_blockwise")
    optim = OPTIMIZERS["adamw"](model.parameters())
    snapshots = Snapshots()
    _train(model, optim, range(2))
    snapshots.take(2, model, optim)
    expected = _train(model, optim, range(2, 4))
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, math.nan)
    optim.step()
    optim.zero_grad()
    assert math.isnan(_train(model, optim, range(1))[0])
    assert all(parameter.isnan().any() for parameter in model.parameters())
    snapshots.restore(model, optim)
    assert _train(model, optim, range(2, 4)) == expected


def test_before_any_step_the_optimizer_has_no_state():
    model = _model()
    optim = OPTIMIZERS["adamw"](model.parameters())
    snapshots = Snapshots()
    snapshots.take(0, model, optim)
    first = _train(model, optim, range(3))
    assert optim.state
    snapshots.restore(model, optim)
    assert not optim.state
    assert _train(model, optim, range(3)) == first


def test_state_of_a_parameter_that_had_none_is_dropped_and_lost_state_is_made_again():
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    model = nn.ParameterList([one, two])
    optim = OPTIMIZERS["adamw"]([one, two])
    one.grad = torch.ones(2)
    optim.step()
    snapshots = Snapshots()
    snapshots.take(1, model, optim)
    moment = optim.state[one]["exp_avg"].clone()
    two.grad = torch.ones(2)
    optim.step()
    del optim.state[one]
    snapshots.restore(model, optim)
    assert two not in optim.state
    assert torch.equal(optim.state[one]["exp_avg"], moment)
    assert optim.state[one]["step"] == 1
    optim.step()  # the new tensor does not share memory with the snapshot
    snapshots.restore(model, optim)
    assert torch.equal(optim.state[one]["exp_avg"], moment)


def test_the_learning_rate_is_kept_and_other_settings_are_restored():
    model = _model()
    optim = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95))
    snapshots = Snapshots()
    snapshots.take(1, model, optim)
    optim.param_groups[0].update(lr=0.01, betas=(0.5, 0.5))
    snapshots.restore(model, optim)
    assert optim.param_groups[0]["lr"] == 0.01
    assert optim.param_groups[0]["betas"] == (0.9, 0.95)


def _weight_snapshots(steps: tuple[int, ...], keep: int) -> tuple[Snapshots, nn.Linear, torch.optim.Optimizer]:
    """Return snapshots of a layer whose weights are the number of the step."""
    layer = nn.Linear(2, 2, bias=False)
    optim = torch.optim.SGD(layer.parameters(), lr=0.1)
    snapshots = Snapshots(keep)
    for step in steps:
        nn.init.constant_(layer.weight, step)
        snapshots.take(step, layer, optim)
    return snapshots, layer, optim


def test_the_newest_are_kept_and_later_ones_dropped():
    snapshots, layer, optim = _weight_snapshots((10, 20, 30, 40), keep=3)
    assert snapshots.steps == (20, 30, 40)
    assert snapshots.restore(layer, optim, before=35) == 30
    assert layer.weight[0, 0] == 30
    assert snapshots.steps == (20, 30)
    assert snapshots.restore(layer, optim) == 30  # a snapshot may be restored twice
    assert snapshots.restore(layer, optim, before=20) == 20
    assert layer.weight[0, 0] == 20
    with pytest.raises(LookupError, match="no snapshot of step 19 or earlier"):
        snapshots.restore(layer, optim, before=19)
    with pytest.raises(LookupError, match="no snapshot to go back to"):
        Snapshots().restore(layer, optim)


def test_a_run_that_went_back_replaces_its_snapshots():
    snapshots, layer, optim = _weight_snapshots((10, 20), keep=2)
    nn.init.constant_(layer.weight, 0.5)
    snapshots.take(10, layer, optim)
    assert snapshots.steps == (10,)
    snapshots.restore(layer, optim)
    assert layer.weight[0, 0] == 0.5


def test_the_oldest_memory_serves_again():
    model = _model()
    optim = OPTIMIZERS["adamw"](model.parameters())
    snapshots = Snapshots(keep=2)

    def addresses() -> set[int]:
        held = snapshots._snapshots[-1].held()
        return {part.data_ptr() for tensor in held.values() for part in tensor.parts}

    _train(model, optim, range(1))
    taken = []
    for step in (1, 2, 3):
        snapshots.take(step, model, optim)
        taken.append(addresses())
    assert taken[2] == taken[0]
    assert not taken[1] & taken[0]
    assert len(taken[0]) == len(_all_tensors(model, optim))


def test_restoring_counts_as_a_change_of_the_weight():
    """The cache of codes (lowprec/nn/codes.py) tells weights apart by their version."""
    snapshots, layer, optim = _weight_snapshots((1,), keep=1)
    version = layer.weight._version
    snapshots.restore(layer, optim)
    assert layer.weight._version > version


def test_frozen_weights_are_not_copied():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    snapshots, optim = Snapshots(), torch.optim.SGD([layer.bias], lr=0.1)
    snapshots.take(1, layer, optim)
    assert list(snapshots._snapshots[0].held()) == ["bias"]


def test_accelerates_optimizer_and_the_scaler():
    class Accelerated:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = _model()
    optim = OPTIMIZERS["adamw"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    snapshots, wrapped = Snapshots(), Accelerated(optim)
    _train(model, optim, range(2))
    snapshots.take(2, model, wrapped, scaler)
    first = _train(model, optim, range(2, 4))
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0})
    snapshots.restore(model, wrapped, scaler)
    assert scaler.get_scale() == 1024.0
    assert _train(model, optim, range(2, 4)) == first
    off = torch.amp.GradScaler("cpu", enabled=False)
    snapshots.take(5, model, optim, off)
    assert snapshots.restore(model, optim, off) == 5


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit"])
@pytest.mark.parametrize("lost", [False, True])
def test_quantised_optimizer_state_comes_back(kind: str, lost: bool):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao warns when it is imported
        optimizers = pytest.importorskip("torchao.optim")
    model = _model()
    optim = getattr(optimizers, kind)(model.parameters(), lr=1e-2)
    snapshots = Snapshots()
    # torchao compiles its step, which takes minutes on a CPU and is not tested here.
    with torch.compiler.set_stance("force_eager"):
        _train(model, optim, range(2))
        snapshots.take(2, model, optim)
        weight = model.model.layers[0].mlp.up_proj.weight
        moment = optim.state[weight]["exp_avg"]
        assert type(moment).__name__.startswith("OptimState")  # large enough to be quantised
        first = _train(model, optim, range(2, 5))
        if lost:
            optim.state.clear()
        snapshots.restore(model, optim)
        assert type(optim.state[weight]["exp_avg"]) is type(moment)
        assert (optim.state[weight]["exp_avg"] is moment) is not lost
        assert _train(model, optim, range(2, 5)) == first


def test_at_least_one_is_kept():
    with pytest.raises(ValueError, match="at least one"):
        Snapshots(keep=0)
