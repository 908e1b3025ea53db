"""Codes that outlive a call (`lowprec.nn.codes`). Only CUDA uses them, so a quantiser that runs anywhere and counts stands in here."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lowprec.nn import codes
from lowprec.nn.codes import forget_weights, shared_codes, weight_codes
from lowprec.quant import OperandSpec, TwoWay, quantize
from lowprec.quant.triton_quantize import Directions, directions
from lowprec.testing import gaussian


def both(a: str, b: str) -> Directions:
    wanted = directions(OperandSpec.parse(a), OperandSpec.parse(b))
    assert isinstance(wanted, Directions)
    return wanted


PAIR = both("e4m3[1x128 fp32]", "e4m3[128x128 fp32]")
ROWS = PAIR.only(True, False)
OTHER_ROWS, OTHER_COLS = both("e5m2[1x128 fp32]", "e5m2[128x128 fp32]"), both("e4m3[1x128 fp32]", "e4m3[1x128 fp32]")


@pytest.fixture(autouse=True)
def made(monkeypatch) -> Iterator[list[Directions]]:
    """Replace the quantiser; yield the list of directions that each quantisation was asked for."""
    calls = []

    def quantize_both(x: Tensor, wanted: Directions) -> TwoWay:
        calls.append(wanted)
        a, b = wanted.along_rows, wanted.along_cols
        return TwoWay(None if a is None else quantize(x, a), None if b is None else quantize(x.t(), b))

    monkeypatch.setattr(codes, "quantize_both", quantize_both)
    monkeypatch.setattr(codes, "_input", None)
    forget_weights()
    yield calls
    forget_weights()


def layer(n: int = 6, k: int = 10) -> nn.Linear:
    module = nn.Linear(k, n, bias=False)
    with torch.no_grad():
        module.weight.copy_(gaussian(n, k, 0))
    return module


def weight(module: nn.Linear, wanted: Directions = PAIR) -> TwoWay:
    """Return the result of `weight_codes`; assert that it holds the codes of the weight as it is now."""
    got = weight_codes(module, module.weight.detach(), wanted)
    assert_codes(got, module.weight.detach(), wanted)
    return got


def shared(x: Tensor, wanted: Directions = PAIR) -> TwoWay:
    x_MK = x.detach().flatten(0, -2)
    got = shared_codes(x, x_MK, wanted)
    assert_codes(got, x_MK, wanted)
    return got


def assert_codes(got: TwoWay, x: Tensor, wanted: Directions) -> None:
    """Assert that the codes of each wanted direction exist and are right."""
    for q, matrix, spec in zip(got, (x, x.t()), (wanted.along_rows, wanted.along_cols), strict=True):
        if spec is not None:
            assert q is not None
            assert q.spec == spec
            torch.testing.assert_close(q.dequantize(), quantize(matrix, spec).dequantize(), rtol=0, atol=0)


# Weights


def test_an_unchanged_weight_is_quantised_once(made):
    module = layer()
    first = weight(module)
    module(gaussian(3, 10, 1)).sum().backward()
    assert weight(module) is first
    assert made == [PAIR]


def test_every_module_has_its_own_codes(made):
    modules = [layer(), layer(), layer(7, 3)]
    first = [weight(module) for module in modules]
    assert all(weight(module) is codes for module, codes in zip(modules, first, strict=True))
    assert len(made) == 3


def test_the_transpose_is_added_on_demand(made):
    module = layer()
    assert weight(module, ROWS)[1] is None
    with_transpose = weight(module)
    assert weight(module, ROWS) is with_transpose
    assert weight(module) is with_transpose
    assert made == [ROWS, PAIR]


def test_other_specs_are_quantised_anew(made):
    module = layer()
    others = [PAIR, OTHER_ROWS, PAIR, OTHER_COLS, OTHER_ROWS.only(True, False)]
    for wanted in others:
        weight(module, wanted)
    assert made == others


class ThroughData(torch.optim.Optimizer):
    """An optimizer that writes through `.data`, which no version counts."""

    def __init__(self, params) -> None:
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-0.1)


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1), torch.optim.AdamW, ThroughData], ids=["SGD", "AdamW", "through_data"]
)
def test_an_optimizer_step_makes_codes_stale(make, made):
    module = layer()
    optimizer = make(module.parameters())
    for step in range(3):
        weight(module)
        module(gaussian(3, 10, step)).square().sum().backward()
        weight(module)  # accumulates: another micro-batch
        before = module.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(module.weight, before)
    weight(module)
    assert len(made) == 4


def in_place(module: nn.Linear) -> None:
    with torch.no_grad():
        module.weight.mul_(2.0)


def through_a_view(module: nn.Linear) -> None:
    with torch.no_grad():
        module.weight[2:4].zero_()


def detached(module: nn.Linear) -> None:
    module.weight.detach().mul_(2.0)


def load(module: nn.Linear) -> None:
    module.load_state_dict({"weight": gaussian(6, 10, 1)})


def load_by_assignment(module: nn.Linear) -> None:
    module.load_state_dict({"weight": gaussian(6, 10, 1)}, assign=True)


def another_parameter(module: nn.Linear) -> None:
    module.weight = nn.Parameter(gaussian(6, 10, 1))


def other_memory(module: nn.Linear) -> None:
    module.weight.data = gaussian(6, 10, 1)


def another_dtype(module: nn.Linear) -> None:
    module.bfloat16()


def there_and_back(module: nn.Linear) -> None:
    module.to("meta").to_empty(device="cpu")
    module.reset_parameters()


CHANGES = (
    in_place,
    through_a_view,
    detached,
    load,
    load_by_assignment,
    another_parameter,
    other_memory,
    another_dtype,
    there_and_back,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_makes_codes_stale(change: Callable[[nn.Linear], None], made):
    module = layer()
    weight(module)
    change(module)
    last = weight(module)
    assert weight(module) is last
    assert len(made) == 2


def test_memory_that_is_given_out_again_is_other_memory():
    """The allocator may return freed memory at the same address, so a weight of the same version can hold other values."""
    module, memory = layer(), gaussian(6, 10, 1).numpy()
    module.weight.data = torch.from_numpy(memory)
    weight(module)
    module.weight.data = gaussian(6, 10, 2)
    memory[:] = gaussian(6, 10, 3).numpy()
    module.weight.data = torch.from_numpy(memory)
    weight(module)


def test_forgotten_weights_are_quantised_anew(made):
    modules = [layer(), layer()]
    for module in modules:
        weight(module)
        module.weight.data.mul_(2.0)  # no version counts this
    forget_weights()
    for module in modules:
        weight(module)
    assert len(made) == 4


def test_sharded_weights_are_not_kept(made):
    module = layer()
    weight(module)
    module.sharded = True
    assert weight_codes(module, module.weight.detach(), PAIR) == (None, None)
    module.sharded = False
    weight(module)
    assert len(made) == 1


def test_inference_weights_are_not_kept(made):
    """Inference tensors have no version."""
    with torch.inference_mode():
        module = layer()
        assert weight_codes(module, module.weight, PAIR) == (None, None)
    assert made == []


def test_codes_die_with_their_module():
    module, other = layer(), layer()
    weight(module)
    weight(other)
    assert len(codes._weights) == 2
    del module
    gc.collect()
    assert list(codes._weights) == [other]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_copies_carry_no_codes(clone, made):
    module = layer()
    plain = pickle.dumps(module)
    first = weight(module)
    assert len(pickle.dumps(module)) == len(plain)
    twin = clone(module)
    assert list(codes._weights) == [module]
    in_place(twin)
    weight(twin)
    assert weight(module) is first
    assert len(made) == 2


# Inputs


def test_layers_of_one_input_share_its_codes(made):
    x = gaussian(6, 10, 0)
    first = shared(x)
    assert shared(x) is first
    assert shared(x.requires_grad_()) is first
    assert made == [PAIR]


def test_leading_dimensions_are_tokens(made):
    x = gaussian(6, 10, 0).view(2, 3, 10)
    assert shared(x) is shared(x)
    assert len(made) == 1


def test_a_changed_input_is_quantised_anew(made):
    x = gaussian(6, 10, 0)
    shared(x)
    x.mul_(2.0)
    shared(x)
    x[0].zero_()
    last = shared(x)
    assert shared(x) is last
    assert len(made) == 3


def test_another_input_is_quantised_anew(made):
    """A view of the same memory is another input too: only the last tensor object is remembered."""
    x, y = gaussian(6, 10, 0), gaussian(6, 10, 1)
    for tensor in (x, y, x, x.view(6, 10)):
        shared(tensor)
    assert len(made) == 4


def test_an_input_under_other_specs_is_quantised_anew(made):
    x = gaussian(6, 10, 0)
    for wanted in (ROWS, PAIR, OTHER_ROWS, OTHER_COLS):
        shared(x, wanted)
    assert made == [ROWS, PAIR, OTHER_ROWS, OTHER_COLS]


def test_codes_die_with_their_input():
    x = gaussian(6, 10, 0)
    shared(x)
    assert codes._input is not None
    del x
    assert codes._input is None


def test_an_older_inputs_death_drops_nothing():
    x, y = gaussian(6, 10, 0), gaussian(6, 10, 1)
    shared(x)
    last = shared(y)
    del x
    assert shared(y) is last


def test_inference_inputs_are_quantised_every_time(made):
    with torch.inference_mode():
        x = gaussian(6, 10, 0)
        shared(x)
        shared(x)
    assert len(made) == 2
    assert codes._input is None
