"""AdamW whose weights and moments are not fp32. torchao compiles the step; most of these tests run it without compiling."""

import copy
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor

import lowprec
from lowprec import UserError
from lowprec.training.amp import Amp
from lowprec.training.optim.adamw import OptimizerConfig, build, prepare_weights
from lowprec.training.optim.loss_scaling import LossScalingConfig

BETAS = (0.9, 0.95)
FORMATS = [(weights, moments) for weights in ("fp32", "bf16") for moments in ("fp32", "bf16", "8bit", "4bit")]
LOW = FORMATS[1:]


@pytest.fixture
def eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def _model(config: OptimizerConfig) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))  # one weight is large enough for quantised moments
    prepare_weights(model, config)
    return model


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step % 3)).to(dtype)
        loss = (model(x).float() - x[:, :8].float()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_fp32_is_torchs_adamw():
    config = OptimizerConfig()
    model = _model(config)
    optimizer = build(config, [{"params": model[0].parameters(), "weight_decay": 0.0}, {"params": model[2].parameters()}], 0.1, BETAS, 1e-6)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01]
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"], optimizer.defaults["eps"]) == (0.1, BETAS, 1e-6)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("weights", "moments"), LOW)
def test_each_pair_of_formats_trains(weights: str, moments: str):
    config = OptimizerConfig(weights=weights, moments=moments)  # pyright: ignore[reportArgumentType]
    model = _model(config)
    optimizer = build(config, model.parameters(), lr=1e-2, betas=BETAS)
    losses = _train(model, optimizer, 30)
    assert losses[-1] < losses[0] / 3
    weight, bias = model[0].weight, model[0].bias
    assert weight.dtype == bias.dtype == (torch.bfloat16 if weights == "bf16" else torch.float32)
    kept = {"8bit": "OptimState8bit", "4bit": "OptimState4bit"}.get(moments, "Tensor")
    for name in ("exp_avg", "exp_avg_sq"):
        assert type(optimizer.state[weight][name]).__name__ == kept
        plain = torch.bfloat16 if moments == "bf16" else torch.float32
        assert optimizer.state[bias][name].dtype == plain
        if kept == "Tensor":
            assert optimizer.state[weight][name].dtype == plain


@pytest.mark.usefixtures("eager")
def test_in_fp32_weights_and_bf16_moments_only_the_moments_are_rounded():
    """The run is compared with torch.optim.AdamW whose moments are rounded to bf16 after each step."""
    config = OptimizerConfig(moments="bf16")
    model = _model(config)
    reference = copy.deepcopy(model)
    optimizer = build(config, model.parameters(), lr=1e-2, betas=BETAS)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=BETAS)
    # torch's moments are rounded before each step; ours were rounded when they were stored.
    for step in range(5):
        for state in theirs.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].copy_(state[name].bfloat16())
        _train(reference, theirs, 1, step)
        _train(model, optimizer, 1, step)
    for ours, expected in zip(model.parameters(), reference.parameters(), strict=True):
        # Both compute the same numbers in another order of operations: a moment may fall on the other side of a bf16 tie. That moves the
        # update, which has size lr, by a relative 2^-8 in each step after the first.
        assert (ours - expected).abs().max() <= 4 * 1e-2 * 2**-8
        assert (ours - expected).abs().mean() < 1e-6


# Stochastic rounding

_PER_STEP, _STEPS, _ULP = 1e-4, 100, 2.0**-8


def _drift(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> float:
    """Return the mean weight after `_STEPS` steps with gradient 1. Each step subtracts `_PER_STEP` on average; weights start at 1."""
    for _ in range(_STEPS):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach().float().mean().item()


@pytest.mark.usefixtures("eager")
def test_small_updates_add_up_in_bf16_weights():
    def weight() -> nn.Parameter:
        return nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))

    nearest = weight()
    assert _drift(torch.optim.AdamW([nearest], lr=_PER_STEP, weight_decay=0.0), nearest) == 1.0
    ours = weight()
    mean = _drift(build(OptimizerConfig(weights="bf16"), [ours], lr=_PER_STEP, weight_decay=0.0), ours)
    # Each step subtracts one ulp with probability p, on average the update. Tolerance: five standard deviations of the mean weight.
    p = _PER_STEP / _ULP
    deviation = _ULP * (_STEPS * p * (1 - p) / ours.numel()) ** 0.5
    assert mean == pytest.approx(1 - _STEPS * _PER_STEP, abs=5 * deviation)


@pytest.mark.filterwarnings("ignore::UserWarning")  # inductor warns about its own caches
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_small_updates_add_up_when_compiled():
    ours = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    mean = _drift(build(OptimizerConfig(weights="bf16"), [ours], lr=_PER_STEP, weight_decay=0.0), ours)
    p = _PER_STEP / _ULP
    assert mean == pytest.approx(1 - _STEPS * _PER_STEP, abs=5 * _ULP * (_STEPS * p * (1 - p) / ours.numel()) ** 0.5)


@pytest.mark.usefixtures("eager")
def test_ranks_round_alike_and_keep_their_own_random_numbers():
    config, trained, numbers = OptimizerConfig(weights="bf16"), [], []
    for seed in (1, 2):
        model = _model(config)
        optimizer = build(config, model.parameters(), lr=1e-3)
        torch.manual_seed(seed)
        expected = torch.rand(4)
        torch.manual_seed(seed)
        _train(model, optimizer, 3)
        numbers.append(torch.equal(torch.rand(4), expected))
        trained.append(model)
    assert _same(*trained)
    assert numbers == [True, True]


def test_all_processes_take_the_same_kernels_for_a_step(monkeypatch: pytest.MonkeyPatch):
    """TorchInductor would choose by timing among kernels that round differently, anew on each DDP rank and in a resumed run."""
    found = []

    def step(function: Callable[..., None], **options: Any) -> Callable[..., None]:
        found.append((inductor.deterministic, inductor.triton.autotune_pointwise))
        return function

    monkeypatch.setattr(torch, "compile", step)
    model = _model(OptimizerConfig())
    _train(model, build(OptimizerConfig(moments="8bit"), model.parameters()), 1)
    assert found == [(True, False)] * 4
    assert (inductor.deterministic, inductor.triton.autotune_pointwise) == (False, True)


@pytest.mark.usefixtures("eager")
def test_the_noise_differs_from_step_to_step():
    config, steps = OptimizerConfig(weights="bf16"), []
    weight = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    optimizer = build(config, [weight], lr=_ULP / 2, weight_decay=0.0)
    for _ in range(2):
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        steps.append(weight.detach() != before)
        with torch.no_grad():
            weight.fill_(1.0)
    # Two independent halves of 8192 weights share a quarter of them; the tolerance is five deviations of 0.005.
    assert (steps[0] & steps[1]).float().mean().item() == pytest.approx(0.25, abs=0.025)


# State


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("weights", "moments"), FORMATS)
def test_a_resumed_run_continues_bit_for_bit(weights: str, moments: str):
    config = OptimizerConfig(weights=weights, moments=moments)  # pyright: ignore[reportArgumentType]
    model = _model(config)
    optimizer = build(config, model.parameters(), lr=1e-2, betas=BETAS)
    _train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    _train(model, optimizer, 3, first=3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = _model(config)
    resumed.load_state_dict(saved["model"])
    continued = build(config, resumed.parameters(), lr=1e-2, betas=BETAS)
    continued.load_state_dict(saved["optimizer"])
    torch.manual_seed(99)
    _train(resumed, continued, 3, first=3)
    assert _same(resumed, model)


@pytest.mark.usefixtures("eager")
def test_the_state_of_another_optimizer_is_refused():
    parameters = [nn.Parameter(torch.ones(8, dtype=torch.bfloat16))]
    other = torch.optim.AdamW(parameters).state_dict()
    optimizer = build(OptimizerConfig(weights="bf16"), parameters, lr=1e-3, betas=BETAS)
    with pytest.raises(UserError, match="this state is another optimizer's"):
        optimizer.load_state_dict(other)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("shape", [(16, 256), (64, 63)])
def test_moments_of_other_blocks_are_refused(shape: tuple[int, int]):
    """The moments have other blocks, or the parameter has no whole blocks."""
    states = []
    for size in ((64, 64), shape):
        weight = nn.Parameter(torch.ones(size))
        weight.grad = torch.ones_like(weight)
        optimizer = build(OptimizerConfig(moments="8bit"), [weight])
        optimizer.step()
        states.append(optimizer.state_dict())
    with pytest.raises(UserError, match="quantised moments of this checkpoint were cut into other shards; resume with as many processes"):
        optimizer.load_state_dict(states[0])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scheduler_changes_the_learning_rate():
    """The step was compiled with another learning rate."""
    config = OptimizerConfig(weights="bf16")
    model = _model(config)
    optimizer = build(config, model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    _train(model, optimizer, 1)
    scheduler.step()
    before = copy.deepcopy(model)
    _train(model, optimizer, 1)
    assert _same(model, before)


@pytest.mark.usefixtures("eager")
def test_with_loss_scaling_and_a_recipe():
    config = OptimizerConfig(moments="8bit")
    model = _model(config)
    lowprec.convert(model, "fp8_blockwise")
    optimizer = build(config, model.parameters(), lr=1e-2, betas=BETAS)
    amp, losses = Amp("fp16", model, loss_scaling=LossScalingConfig(init_scale=1024.0)), []
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(30):
        with amp.autocast():
            loss = nn.functional.mse_loss(model(x), x[:, :8])
        amp.backward(loss)
        assert not amp.step(optimizer, max_norm=10.0).skipped
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


# Casts and refusals


def test_prepare_weights_casts_parameters_in_place_and_no_buffers():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.register_parameter("index", nn.Parameter(torch.arange(3), requires_grad=False))
    parameters = list(model.parameters())
    prepare_weights(model, OptimizerConfig(moments="8bit"))
    assert {parameter.dtype for parameter in parameters} == {torch.float32, torch.int64}
    prepare_weights(model, OptimizerConfig(weights="bf16"))
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16, torch.int64}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32, torch.int64}


def test_weights_of_another_dtype_are_refused():
    model = nn.Linear(4, 2)
    with pytest.raises(UserError, match=r"weights: bf16, but a parameter of shape \[2, 4\] is float32; call prepare_weights first"):
        build(OptimizerConfig(weights="bf16"), model.parameters())
    model.bfloat16()
    with pytest.raises(UserError, match=r"weights: fp32, but a parameter of shape \[2, 4\] is bfloat16; load the model in float32"):
        build(OptimizerConfig(), model.parameters())


def test_bf16_moments_that_could_not_decay_are_refused():
    with pytest.raises(UserError, match=r"can't decay with beta2 = 0\.999; lower it to 0\.99 or less"):
        build(OptimizerConfig(moments="bf16"), nn.Linear(4, 2).parameters())
    # At this bound, rounding to nearest begins to stop the decay.
    assert all((torch.tensor(v).bfloat16() * 0.99).bfloat16() < v for v in (1.0, 1.0078125, 1.9921875))
    assert (torch.tensor(1.9921875).bfloat16().float() * (1 - 2**-9)).bfloat16() == 1.9921875


def test_without_torchao_the_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch):
    from lowprec.training.optim import adamw

    adamw._optimizer_class.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"need torchao: pip install 'torchao>=0\.18'"):
        build(OptimizerConfig(moments="8bit"), nn.Linear(4, 2).parameters())
