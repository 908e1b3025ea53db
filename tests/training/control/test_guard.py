"""The guard on sequences of numbers: breaches, the layers to blame, and the layers that take more precision."""

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from lowprec.recipe import Recipe, library
from lowprec.training.control import guard as guarding
from lowprec.training.control.blame import ladder_step, layers_to_raise
from lowprec.training.control.guard import Guard, GuardConfig
from lowprec.training.control.signals import SIGNALS, Breach, Observation, Signal

LAYERS = ("embed", "first", "second", "head")
INF, NAN = math.inf, math.nan


def _observation(step: int, **changes: Any) -> Observation:
    """Return a healthy step, with `changes`: its loss is around 2, its gradient norms are around 1."""
    draw = random.Random(step)
    layers = {name: 1 + 0.1 * draw.random() for name in LAYERS}
    healthy = Observation(step, 2 + 0.02 * draw.random(), 2 + 0.1 * draw.random(), layers, skipped=False, scaled=False)
    if "layers" in changes:
        changes["layers"] = {**layers, **changes["layers"]}
    return replace(healthy, **changes)


def _guard(steps: int = 32, **config: Any) -> Guard:
    guard = Guard(GuardConfig(**config))
    for step in range(steps):
        assert guard.observe(_observation(step)) is None
    return guard


def _breach(guard: Guard, **changes: Any) -> Breach:
    breach = guard.observe(_observation(99, **changes))
    assert breach is not None
    return breach


def test_a_loss_far_above_the_median_is_a_breach():
    guard = Guard(GuardConfig(window=8, warmup=8, loss_deviations=8, loss_ratio=1.1))
    for step, loss in enumerate([1.9, 2.0, 2.1, 2.0, 2.2, 1.8, 2.0, 2.0]):
        assert guard.observe(_observation(step, loss=loss)) is None
    # Median 2, median absolute deviation 0.05: a deviation is 0.07413, eight of them are 0.593.
    assert guard.observe(_observation(8, loss=2.59)) is None
    guard.load_state_dict(guard.state_dict() | {"losses": [1.9, 2.0, 2.1, 2.0, 2.2, 1.8, 2.0, 2.0]})
    breach = _breach(guard, loss=2.6)
    assert breach.kind == "loss"
    assert breach.reason == "loss 2.6 is 8.09 deviations above the median 2 of the last 8 steps"


def test_a_steady_loss_may_vary_by_the_ratio():
    guard = Guard(GuardConfig(loss_ratio=1.1))
    for step in range(20):
        assert guard.observe(_observation(step, loss=2.0)) is None
    assert guard.observe(_observation(20, loss=2.19)) is None
    assert "loss 2.21 is above the median 2 of the last 21 steps" in _breach(guard, loss=2.21).reason


def test_a_falling_loss_and_a_negative_one_are_fine():
    guard = Guard(GuardConfig())
    for step in range(200):
        assert guard.observe(_observation(step, loss=10 * 0.97**step)) is None
    guard = Guard(GuardConfig())
    for step in range(20):
        assert guard.observe(_observation(step, loss=-2.0)) is None
    assert guard.observe(_observation(20, loss=-1.9)) is None
    assert _breach(guard, loss=-1.7).kind == "loss"


def test_a_jump_in_a_falling_loss():
    """The loss jumps back to a value of the window, whose spread is the fall of the loss."""
    guard = Guard(GuardConfig())
    for step in range(40):
        assert guard.observe(_observation(step, loss=1 + 4 * 0.95**step + 0.01 * random.Random(step).random())) is None
    breach = _breach(guard, loss=3.0)
    assert breach.kind == "loss"
    assert breach.reason.endswith("of the last 8 steps")


@pytest.mark.parametrize("window", [8, 16, 64])
def test_noise_around_a_falling_loss_is_no_jump(window: int):
    guard, draw = Guard(GuardConfig(window=window)), random.Random(0)
    for step in range(3000):
        loss = (1.5 + 4 * 0.99**step) * (1 + 0.03 * draw.gauss(0, 1))
        assert guard.observe(_observation(step, loss=loss)) is None


def test_a_slow_rise_is_seen_too():
    guard = _guard(64)
    found = next(breach for step in range(64) if (breach := guard.observe(_observation(64 + step, loss=2 + 0.03 * step))) is not None)
    assert found.kind == "loss"
    assert found.reason.endswith("of the last 64 steps")


def test_gradients_that_are_not_finite_do_not_blame_the_weights():
    nan = {"layers": {"first": NAN}, "grad_norm": NAN}
    assert _breach(_guard(), **nan).began_well
    assert _breach(_guard(), **nan, loss=0.0).began_well
    assert not _breach(_guard(), **nan, loss=5.0).began_well
    assert not _breach(_guard(), **nan, loss=NAN).began_well
    assert not _breach(_guard(), **nan, loss=None).began_well
    assert not _breach(_guard(), loss=5.0).began_well


def test_a_gradient_norm_far_above_the_median_is_a_breach():
    guard = Guard(GuardConfig(gradient_ratio=50))
    for step in range(20):
        assert guard.observe(_observation(step, grad_norm=2.0)) is None
    assert guard.observe(_observation(20, grad_norm=100.0)) is None
    breach = _breach(guard, grad_norm=100.1)
    assert (breach.kind, breach.reason) == ("gradient", "gradient norm 100.1 is 50 times the median 2 of the last 21 steps")


def test_an_infinite_ratio_switches_its_check_off():
    assert _guard(loss_ratio=INF).observe(_observation(99, loss=1e30)) is None
    assert _guard(loss_deviations=INF).observe(_observation(99, loss=1e30)) is None
    guard = _guard(gradient_ratio=INF)
    assert guard.observe(_observation(99, grad_norm=1e30)) is None
    assert _breach(guard, grad_norm=NAN).kind == "not finite"
    constant = Guard(GuardConfig(loss_ratio=INF, loss_deviations=INF, gradient_ratio=INF))
    assert not any(constant.observe(_observation(step, loss=0.0, grad_norm=1.0)) for step in range(32))
    assert constant.observe(_observation(99, loss=5.0, grad_norm=9.0)) is None


def test_zero_gradients_set_no_median():
    guard = Guard(GuardConfig())
    for step in range(20):
        assert guard.observe(_observation(step, grad_norm=0.0, layers=dict.fromkeys(LAYERS, 0.0))) is None
    assert guard.observe(_observation(20)) is None


def test_only_values_that_are_not_finite_are_a_breach_before_the_warmup_ends():
    wild = {"loss": 1e6, "grad_norm": 1e6, "sqnr": {"head": -10.0}}
    config = {"warmup": 16, "window": 8, "sqnr_floor": 10.0}  # a window may be shorter than the warmup
    assert _guard(15, **config).observe(_observation(15, **wild)) is None
    assert _breach(_guard(16, **config), **wild).kind == "loss"
    for changes in ({"loss": NAN}, {"loss": INF}, {"grad_norm": NAN}, {"grad_norm": INF}, {"layers": {"head": NAN}}):
        assert _breach(_guard(0), **changes).kind == "not finite"


def test_gradients_that_are_not_finite_are_normal_in_steps_that_loss_scaling_skips():
    guard = _guard()
    overflow = {"grad_norm": INF, "layers": {"first": INF}}
    assert guard.observe(_observation(40, **overflow, skipped=True, scaled=True)) is None
    assert _breach(guard, **overflow, skipped=False, scaled=True).kind == "not finite"
    assert _breach(guard, **overflow, skipped=True, scaled=False).kind == "not finite"
    assert _breach(guard, loss=NAN, skipped=True, scaled=True).kind == "not finite"


def test_skipped_steps_are_counted_in_a_row():
    guard = _guard(skipped_steps=3)
    skipped = {"skipped": True, "scaled": True, "grad_norm": NAN, "layers": {"second": NAN, "first": NAN}}
    for step in (40, 41, 43, 44):
        if step == 43:
            assert guard.observe(_observation(42, scaled=True)) is None
        assert guard.observe(_observation(step, **skipped)) is None
    breach = _breach(guard, **skipped)
    assert (breach.kind, breach.layers) == ("skipped steps", ("second", "first"))
    assert "3 steps in a row" in breach.reason
    assert guard.observe(_observation(46, **skipped)) is None  # after a breach the count starts again
    assert _guard(0, skipped_steps=3).observe(_observation(0, **skipped)) is None


def test_a_low_signal_to_noise_ratio_is_a_breach_only_with_a_floor():
    sqnr = {"first": 9.0, "second": 30.0, "head": 3.5}
    assert _guard().observe(_observation(40, sqnr=sqnr)) is None
    breach = _breach(_guard(sqnr_floor=10.0), sqnr=sqnr)
    assert (breach.kind, breach.layers) == ("sqnr", ("head", "first"))
    assert breach.reason == "the quantisation of head has a signal-to-noise ratio of 3.5 dB, below 10 dB, and 1 more are"
    assert _guard(sqnr_floor=3.0).observe(_observation(40, sqnr=sqnr)) is None
    assert _breach(_guard(sqnr_floor=3.0), sqnr=sqnr | {"second": NAN}).layers == ("second",)


def test_breaches_and_skipped_steps_do_not_enter_the_statistics():
    guard = _guard()
    before = guard.state_dict()
    for changes in ({"loss": 50.0}, {"grad_norm": 1e4}, {"loss": NAN}, {"skipped": True, "scaled": True, "grad_norm": INF}):
        guard.observe(_observation(99, **changes))
        assert guard.state_dict() | {"skipped": 0} == before
    assert guard.observe(_observation(100)) is None
    assert guard.state_dict() != before


def test_the_blamed_layers_and_their_order():
    guard = _guard()
    # Values that are not finite: from the output to the input. Finite values: by the ratio to the layer's own median.
    assert _breach(guard, layers={"embed": NAN, "first": INF, "second": NAN}).layers == ("second", "first", "embed")
    assert _breach(guard, grad_norm=1e4, layers={"second": 9e3, "first": 30.0, "head": 1.5}).layers == ("second", "first")
    assert _breach(guard, loss=9.0, sqnr={"first": 20.0, "second": 12.0}).layers == ("second", "first")
    assert _breach(guard, loss=9.0).layers == ()


def test_a_layer_is_compared_with_itself():
    guard = Guard(GuardConfig())
    for step in range(20):
        assert guard.observe(_observation(step, layers={"first": 100.0, "second": 1e-3})) is None
    assert _breach(guard, loss=9.0, layers={"first": 300.0, "second": 1e-2}).layers == ("second", "first")


@pytest.mark.parametrize("restart", [3, 20, 40, 55])
def test_a_guard_restored_from_json_reports_the_same(restart: int):
    draw = random.Random(restart)
    steps = []
    for step in range(80):
        changes: dict[str, Any] = {}
        if draw.random() < 0.2:
            changes = draw.choice(
                [{"loss": draw.choice([2.2, 2.5, NAN])}, {"grad_norm": 80 + 40 * draw.random(), "layers": {"first": 50.0}}]
            )
        elif draw.random() < 0.3:
            changes = {"skipped": True, "scaled": True, "grad_norm": INF}
        steps.append(_observation(step, **changes))
    config = GuardConfig(window=16, skipped_steps=2)
    whole, first, second = Guard(config), Guard(config), Guard(config)
    expected = [whole.observe(step) for step in steps]
    for step in steps[:restart]:
        first.observe(step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert [second.observe(step) for step in steps[restart:]] == expected[restart:]
    assert second.state_dict() == whole.state_dict()
    assert {breach.kind for breach in expected if breach} == {"loss", "gradient", "not finite", "skipped steps"}


def test_a_new_signal_is_one_class_and_one_row(monkeypatch: pytest.MonkeyPatch):
    class Negative(Signal):
        name = "negative"

        def __init__(self, config: GuardConfig) -> None:
            pass

        def check(self, seen: Observation) -> Breach | None:
            return Breach(self.name, "negative") if seen.loss is not None and seen.loss < 0 else None

    older = _guard().state_dict()
    monkeypatch.setattr(guarding, "SIGNALS", (*SIGNALS, Negative))
    guard = Guard(GuardConfig())
    guard.load_state_dict(older)
    breach = _breach(guard, loss=-1.0, layers={"second": 30.0})
    assert (breach.kind, breach.layers, breach.began_well) == ("negative", ("second",), False)
    assert guard.state_dict() == older


def test_the_ladder():
    ladder = GuardConfig().ladder
    get = library.get
    assert ladder_step(get("mxfp4"), ladder) == get("fp8_blockwise")
    assert ladder_step(get("mxfp6_e2m3"), ladder) == get("fp8_blockwise")
    assert ladder_step(get("fp8_blockwise").changed({"wgrad": get("bf16")}, {}), ladder) == get("bf16")
    assert ladder_step(get("bf16"), ladder) is None
    assert ladder_step(get("mxfp4"), ("mxfp4",)) is None


def _raised(layers: tuple[str, ...], recipes: dict[str, str], sqnr: dict[str, float] | None = None, share: float = 0.3) -> dict[str, str]:
    known: dict[str, Recipe] = {name: library.get(recipe) for name, recipe in recipes.items()}
    raised = layers_to_raise(Breach("loss", "", layers), known, sqnr, ladder=GuardConfig().ladder, share=share)
    return {name: recipe.name for name, recipe in raised.items()}


TEN = {f"layer{number}": "fp8_blockwise" for number in range(8)} | {"layer8": "mxfp4", "layer9": "bf16"}


def test_the_blamed_layers_rise_and_no_more_than_the_share():
    assert _raised(("layer4", "norm", "layer9", "layer8"), TEN) == {"layer4": "bf16", "layer8": "fp8_blockwise"}
    assert list(_raised(("layer4", "layer3", "layer2", "layer1"), TEN)) == ["layer4", "layer3", "layer2"]
    assert list(_raised(("layer4", "layer3"), TEN, share=0.01)) == ["layer4"]


def test_without_blame_the_noisiest_rise_or_those_with_the_fewest_bits():
    assert list(_raised((), TEN, {"layer5": 8.0, "layer2": 4.0, "layer9": 1.0, "layer7": 9.0, "layer1": 20.0})) == [
        "layer2",
        "layer5",
        "layer7",
    ]
    assert list(_raised((), TEN, {"layer5": NAN, "layer2": 4.0}, share=0.1)) == ["layer5"]
    for sqnr in (None, {}, {"layer9": 1.0}):
        assert _raised(("layer9",), TEN, sqnr) == {"layer8": "fp8_blockwise", "layer0": "bf16", "layer1": "bf16"}


def test_at_the_top_nothing_rises():
    assert _raised(("head",), {"head": "bf16", "first": "fp32"}) == {}
    assert _raised((), {}) == {}


def test_an_adapter_stands_for_the_layer_that_it_adapts():
    recipes = {"model.q_proj.base_layer": "mxfp4", "model.k_proj.base_layer": "mxfp4", "model.up_proj": "mxfp4"}
    blamed = ("model.k_proj.lora_B.default", "model.k_proj.lora_A.default", "model.k_proj_norm")
    assert _raised(blamed, recipes, share=1.0) == {"model.k_proj.base_layer": "fp8_blockwise"}


def test_experts_that_are_watched_as_one_rise_weight_by_weight():
    recipes = {"mlp.experts.gate_up_proj": "mxfp4", "mlp.experts.down_proj": "bf16", "up_proj": "mxfp4"}
    assert _raised(("mlp.experts",), recipes, share=1.0) == {"mlp.experts.gate_up_proj": "fp8_blockwise"}
