"""Loss scaling and Amp in a plain loop on a CPU."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowprec
from lowprec import UserError
from lowprec.errors import TrainingStopped
from lowprec.nn import LowPrecisionLinear
from lowprec.training.amp import Amp, StepInfo
from lowprec.training.optim.loss_scaling import LossScaleError, LossScaler, LossScalingConfig, check_floor, check_weights, configure


def _data(inputs: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, inputs, generator=generator)
    return x, x @ torch.randn(inputs, 1, generator=generator)


def _model(inputs: int = 16) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 1))


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [value.clone() for value in (*model.parameters(), *moments)]


def _step(amp: Amp, model: nn.Module, optimizer: torch.optim.Optimizer, *, overflow: bool = False) -> StepInfo:
    x, y = _data()
    with amp.autocast():
        loss = nn.functional.mse_loss(model(x), y)
    amp.backward(loss)
    if overflow:
        next(model.parameters()).grad.view(-1)[0] = torch.inf
    info = amp.step(optimizer, max_norm=1.0)
    optimizer.zero_grad()
    return info


# Underflow


def test_gradients_that_underflow_in_fp16_train_only_with_scaling():
    """The loss is about 1e-9, so the gradients of fp16 activations are below 2^-25, half of fp16's smallest number."""

    def train(scaled: bool) -> tuple[nn.Module, list[float]]:
        model, losses = _model(), []
        # Adam moves the weights by the gradients' signs and ratios, however small they are.
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-20)
        amp = Amp("fp16", model, loss_scaling=LossScalingConfig(init_scale=2.0**24))
        x, y = _data()
        for _ in range(60):
            with amp.autocast():
                loss = nn.functional.mse_loss(model(x), y) * 1e-9
            losses.append(loss.item())
            if scaled:
                amp.backward(loss)
                amp.step(optimizer)
            else:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
        return model, losses

    model, losses = train(scaled=False)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), _model().parameters(), strict=True))
    assert losses[-1] == losses[0]
    _, losses = train(scaled=True)
    assert losses[-1] < losses[0] / 10


# Overflow


def test_an_overflow_skips_the_step_and_lowers_the_scale_which_regrows():
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    amp = Amp("fp16", model, loss_scaling=LossScalingConfig(init_scale=1024.0, growth_interval=3))
    assert not _step(amp, model, optimizer).skipped
    before = _state(model, optimizer)
    info = _step(amp, model, optimizer, overflow=True)
    assert info.skipped
    assert info.loss_scale == 512.0
    assert all(torch.equal(now, then) for now, then in zip(_state(model, optimizer), before, strict=True))
    scales = [_step(amp, model, optimizer).loss_scale for _ in range(4)]
    assert scales == [512.0, 512.0, 1024.0, 1024.0]
    assert amp.scaler is not None
    assert (amp.scaler.steps, amp.scaler.skipped_steps, amp.scaler.skipped_in_a_row) == (6, 1, 0)
    assert not torch.equal(next(model.parameters()), before[0])


def test_a_fused_optimizer_skips_too():
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    amp = Amp("fp16", model, loss_scaling=LossScalingConfig(init_scale=1024.0))
    _step(amp, model, optimizer)
    before = _state(model, optimizer)
    assert _step(amp, model, optimizer, overflow=True).skipped
    assert all(torch.equal(now, then) for now, then in zip(_state(model, optimizer), before, strict=True))


@pytest.mark.parametrize("bad", range(3))
def test_an_overflow_in_any_group_of_gradients_skips_the_step(bad: int):
    """Gradients are checked by dtype, one group after the other: an overflow in the first one counts as one in the last does."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    weights = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    scaler = LossScaler(LossScalingConfig(init_scale=4.0), "cpu")
    scaler.scale(torch.ones(()))
    for weight in weights:
        weight.grad = torch.full_like(weight, 4.0)
    weights[bad].grad[1] = torch.inf  # pyright: ignore[reportOptionalSubscript]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.skipped_steps == scaler.skipped_in_a_row == 1
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(weight.detach(), torch.ones_like(weight)) for weight in weights)
    for weight in weights:  # the next step is taken, by unscaled gradients
        weight.grad = torch.full_like(weight, 2.0)
    scaler.step(optimizer)
    scaler.update()
    assert (scaler.skipped_steps, scaler.skipped_in_a_row) == (1, 0)
    assert all(torch.equal(weight.detach(), torch.zeros_like(weight)) for weight in weights)


def test_below_its_floor_the_scale_stops_the_training():
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    amp = Amp("fp16", model, loss_scaling=LossScalingConfig(init_scale=4.0, min_scale=1.0))
    assert [_step(amp, model, optimizer, overflow=True).loss_scale for _ in range(2)] == [2.0, 1.0]
    with pytest.raises(LossScaleError, match=r"fell to 0\.5, below its floor 1, at optimizer step 3 \(3 steps skipped\): train in bf16"):
        _step(amp, model, optimizer, overflow=True)
    assert issubclass(LossScaleError, TrainingStopped)


@settings(max_examples=60, deadline=None)
@given(overflows=st.lists(st.booleans(), max_size=24), growth_interval=st.integers(1, 4), grad=st.sampled_from([torch.inf, torch.nan]))
def test_scale_and_growth_are_torchs(overflows: list[bool], growth_interval: int, grad: float):
    config = LossScalingConfig(init_scale=2.0**10, growth_interval=growth_interval, growth_factor=4.0, backoff_factor=0.25, min_scale=1e-30)
    theirs = torch.amp.GradScaler("cpu", 2.0**10, 4.0, 0.25, growth_interval)
    ours, configured = LossScaler(config, "cpu"), torch.amp.GradScaler("cpu")
    configure(configured, config)
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    skipped = 0
    for overflow in overflows:
        for scaler in (ours, theirs, configured):
            scaler.scale(torch.ones(()))
            weight.grad = torch.tensor([1.0, grad if overflow else 1.0, 1.0])
            scaler.step(optimizer)
            scaler.update()
        skipped += overflow
        expected = theirs.state_dict()
        assert configured.state_dict() == expected
        assert ours.state_dict() | expected == ours.state_dict()
        assert ours.skipped_steps == skipped
        assert (ours.skipped_in_a_row > 0) == overflow


# Clipping and accumulation


@pytest.mark.parametrize("precision", ["fp16", "bf16", "off"])
def test_the_norm_is_that_of_unscaled_gradients_and_clips_them(precision: str):
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    amp = Amp(precision, model, loss_scaling=LossScalingConfig(init_scale=1024.0))
    with amp.autocast():
        # Each weight's gradient is 8. All intermediate numbers are powers of two, exact in each format.
        loss = model(torch.ones(8, 4)).float().sum()
    amp.backward(loss)
    info = amp.step(optimizer, max_norm=1.0)
    assert info.grad_norm is not None
    assert info.grad_norm.dtype == torch.float32
    assert info.grad_norm.item() == 16.0
    # The clipped norm is 1 / (1 + 1e-6 / 16) of max_norm, by torch's epsilon, and each weight is rounded once.
    torch.testing.assert_close(before - model.weight, torch.full((1, 4), 0.5), rtol=1e-6, atol=1e-7)


def test_without_max_norm_there_is_no_norm():
    model = _model()
    amp = Amp("bf16", model)
    amp.backward(model(_data()[0]).mean())
    assert amp.step(torch.optim.SGD(model.parameters(), lr=0.1)) == StepInfo(skipped=False, grad_norm=None, loss_scale=None)


def test_gradients_accumulate_over_backwards():
    x = torch.randint(-2, 3, (16, 8), generator=torch.Generator().manual_seed(0)).float()

    def train(parts: int) -> Tensor:
        model = nn.Linear(8, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.arange(8) / 8)
        optimizer, amp = torch.optim.SGD(model.parameters(), lr=0.5), Amp("fp16", model, loss_scaling=LossScalingConfig(init_scale=256.0))
        for _ in range(2):
            for part in x.chunk(parts):
                with amp.autocast():
                    loss = model(part).float().mean()
                amp.backward(loss / parts)
            assert amp.step(optimizer) == StepInfo(skipped=False, grad_norm=None, loss_scale=256.0)
            optimizer.zero_grad()
        return model.weight.detach()

    # Sums of small multiples of a power of two: exact in fp16, in any order.
    assert torch.equal(train(4), train(1))


def test_an_overflow_in_one_of_the_accumulated_backwards_skips_the_step():
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    amp = Amp("fp16", model)
    for factor in (1.0, 1e6, 1.0):
        with amp.autocast():
            loss = model(torch.ones(8, 4)).float().sum() * factor
        amp.backward(loss)  # 65536 * 1e6 is no fp16 number
    assert amp.step(optimizer).skipped
    assert torch.equal(model.weight, before)


def test_a_loss_in_fp16_is_scaled_in_fp32(monkeypatch: pytest.MonkeyPatch):
    model = nn.Linear(4, 1, bias=False)
    amp = Amp("fp16", model, loss_scaling=LossScalingConfig(init_scale=2.0**15))
    with amp.autocast():
        loss = model(torch.full((8, 4), 2.0**-6)).sum(0) + 64  # 2^15 times it is no fp16 number
    assert loss.dtype == torch.float16
    assert amp.scaler is not None
    scale, scaled = amp.scaler.scale, []

    def spy(loss: Tensor) -> Tensor:
        scaled.append(scale(loss))
        return scaled[-1]

    monkeypatch.setattr(amp.scaler, "scale", spy)
    amp.backward(loss)
    assert scaled[0].dtype == torch.float32
    assert scaled[0].isfinite()
    assert not amp.step(torch.optim.SGD(model.parameters(), lr=1.0)).skipped


def test_one_step_per_backward():
    """The first optimizer's step changes the scale, so that of the second one's gradients is unknown."""
    model = _model()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2])]
    amp = Amp("fp16", model)
    amp.backward(model(_data()[0]).mean())
    amp.step(optimizers[0])
    with pytest.raises(UserError, match=r"no amp\.backward since the last step"):
        amp.step(optimizers[1])


def test_sparse_gradients():
    table = nn.Embedding(8, 4, sparse=True)
    before = table.weight.detach().clone()
    amp = Amp("fp16", table)
    amp.backward(table(torch.tensor([1, 1, 3])).sum())
    assert not amp.step(torch.optim.SGD(table.parameters(), lr=1.0)).skipped
    expected = torch.tensor([0.0, 2, 0, 1, 0, 0, 0, 0])[:, None].expand(8, 4)
    torch.testing.assert_close(before - table.weight, expected, rtol=0, atol=1e-6)  # one rounding of weights of size 1


# State


@pytest.mark.parametrize("saved_after", [1, 3, 5])
def test_a_resumed_run_continues_bit_for_bit(saved_after: int):
    overflows = [False, True, False, False, True, False, False, False]

    def make() -> tuple[nn.Module, torch.optim.Optimizer, Amp]:
        model = _model()
        config = LossScalingConfig(init_scale=1024.0, growth_interval=2)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2), Amp("fp16", model, loss_scaling=config)

    model, optimizer, amp = make()
    for overflow in overflows[:saved_after]:
        _step(amp, model, optimizer, overflow=overflow)
    saved = json.loads(json.dumps(amp.state_dict()))
    resumed_model, resumed_optimizer, resumed = make()
    resumed_model.load_state_dict(model.state_dict())
    resumed_optimizer.load_state_dict({**optimizer.state_dict(), "state": _copy(optimizer.state_dict()["state"])})
    resumed.load_state_dict(saved)
    for overflow in overflows[saved_after:]:
        expected, got = _step(amp, model, optimizer, overflow=overflow), _step(resumed, resumed_model, resumed_optimizer, overflow=overflow)
        assert (got.skipped, got.loss_scale) == (expected.skipped, expected.loss_scale)
    assert resumed.state_dict() == amp.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(_state(resumed_model, resumed_optimizer), _state(model, optimizer), strict=True))


def _copy(state: dict) -> dict:
    return {key: {name: value.clone() for name, value in entries.items()} for key, entries in state.items()}


def test_a_state_goes_to_torchs_scaler_and_back():
    ours, theirs = LossScaler(LossScalingConfig(), "cpu"), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=5)
    ours.load_state_dict(theirs.state_dict())
    assert ours.get_scale() == 8.0
    assert ours.get_growth_interval() == 5
    assert ours.skipped_steps == 0
    ours.load_state_dict(ours.state_dict() | {"scale": 2.0, "skipped_steps": 3})
    theirs.load_state_dict(ours.state_dict())
    assert theirs.get_scale() == 2.0
    assert ours.skipped_steps == 3


def test_without_a_scaler_there_is_no_state():
    amp = Amp("bf16", _model())
    assert amp.state_dict() == {}
    amp.load_state_dict(Amp("fp16", _model()).state_dict())
    assert amp.scaler is None
    fp16 = Amp("fp16", _model(), loss_scaling=LossScalingConfig(init_scale=32.0))
    fp16.load_state_dict({})
    assert fp16.scaler is not None
    assert fp16.scaler.get_scale() == 32.0


# A scaler of another library


def test_configure_sets_what_the_config_says():
    config = LossScalingConfig(init_scale=64.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=7)
    scaler = torch.amp.GradScaler("cpu")
    configure(scaler, config)
    wanted = {"scale": 64.0, "growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 7, "_growth_tracker": 0}
    assert scaler.state_dict() == wanted
    assert scaler.scale(torch.ones(())).item() == 64.0
    scaler.load_state_dict(wanted | {"scale": 16.0, "_growth_tracker": 5, "growth_interval": 9})
    configure(scaler, config, resumed=True)
    assert scaler.state_dict() == wanted | {"scale": 16.0, "_growth_tracker": 5}
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    configure(disabled, config)
    assert disabled.get_scale() == 1.0


def test_check_floor():
    scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    check_floor(scaler, LossScalingConfig(min_scale=0.5), step=7, skipped=2)
    with pytest.raises(LossScaleError, match=r"0\.5, below its floor 1, at optimizer step 7 \(2 steps skipped\)"):
        check_floor(scaler, LossScalingConfig(), step=7, skipped=2)


# Wrong input


def test_fp16_weights_are_refused_by_name():
    model = _model()
    model[2].half()
    with pytest.raises(UserError, match=r"parameter '2\.weight' is float16 already; load the model in float32"):
        Amp("fp16", model)
    model[2].requires_grad_(False)
    check_weights(model)  # a frozen parameter has no gradient
    Amp("bf16", model)


def test_wrong_words_are_refused():
    with pytest.raises(UserError, match="unknown precision 'fp61' for autocast; did you mean 'fp16'"):
        Amp("fp61", _model())
    with pytest.raises(UserError, match="no mixed precision for device type 'cpus'; did you mean 'cpu'"):
        Amp("bf16", _model(), device_type="cpus")


def test_scaling_on_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="there is no CUDA device"):
        LossScaler(LossScalingConfig(), "cuda")


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("off", torch.float32)])
def test_autocast(precision: str, dtype: torch.dtype):
    model = _model()
    amp = Amp(precision, model)
    with torch.autocast("cpu", torch.bfloat16), amp.autocast():
        assert model(_data()[0]).dtype == dtype


# With recipes


@pytest.mark.parametrize("recipe", ["fp8_blockwise", "mxfp4"])
def test_a_converted_model_trains_under_fp16(recipe: str):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    lowprec.convert(model, recipe)
    assert sum(isinstance(module, LowPrecisionLinear) for module in model.modules()) == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    amp, losses = Amp("fp16", model), []
    x, y = torch.randn(2, 128, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(30):
        with amp.autocast():
            out = model(x)
            loss = nn.functional.mse_loss(out, y)
        assert out.dtype == torch.float16
        amp.backward(loss)
        amp.step(optimizer, max_norm=10.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert amp.scaler is not None
    assert amp.scaler.skipped_steps < 5  # the scale finds its place
    assert losses[-1] < losses[0] / 2
