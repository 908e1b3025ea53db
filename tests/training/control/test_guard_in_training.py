"""The guard in an ordinary Trainer: a run that diverges recovers, and ends with the loss of an undisturbed run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback

from lowprec import LowPrecisionCallback, UserError
from lowprec.errors import TrainingStopped
from lowprec.nn import LowPrecisionLinear
from tests.builders import losses, prose, small_trainer, tiny_llama

GUARD = {"snapshot_every": 10, "warmup": 8, "window": 16}
STEPS = 120
LAYER = "model.layers.1.mlp.down_proj"


class Fault(TrainerCallback):
    """A callback that damages the model in some global steps, once in each."""

    def __init__(self, model: Any, *steps: int) -> None:
        self.model, self.steps, self.active = model, set(steps), False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.active = state.global_step in self.steps
        self.steps.discard(state.global_step)


class NaNGradient(Fault):
    def __init__(self, model: Any, *steps: int) -> None:
        super().__init__(model, *steps)
        model.get_submodule(LAYER).weight.register_hook(lambda g: g.masked_fill(torch.ones_like(g).bool(), torch.nan) if self.active else g)


class NaNBackwards(Fault):
    """NaN in the gradient of a layer's output, which the backward carries to all layers before it."""

    def __init__(self, model: Any, *steps: int) -> None:
        super().__init__(model, *steps)
        model.get_submodule(LAYER).register_forward_hook(self.poison)

    def poison(self, module: Any, args: Any, output: torch.Tensor) -> None:
        if self.active:
            output.register_hook(lambda g: g * torch.nan)


class Explosion(Fault):
    """An update of the output head that blows the loss up in the steps after it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.active:
            with torch.no_grad():
                self.model.lm_head.weight.mul_(30)


class Forgetting(Fault):
    """An update that brings the loss back to where it began."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.active:
            with torch.no_grad():
                self.model.lm_head.weight.zero_()


def run(folder: Path, guard: Any, fault: type[Fault] | None = None, *steps: int, recipe: Any = "mxfp4", **settings: Any) -> Trainer:
    model = tiny_llama()
    callbacks: list[Any] = [LowPrecisionCallback({"recipe": recipe, "guard": guard})]
    if fault is not None:
        callbacks.append(fault(model, *steps))
    # The learning rate is constant: a run that lost some steps learns as much in each of the later ones.
    settings = {"max_steps": STEPS, "lr_scheduler_type": "constant", "data": prose(800), **settings}
    trainer = small_trainer(folder, *callbacks, model=model, **settings)
    callbacks[0].train(trainer)
    return trainer


def final_loss(trainer: Trainer) -> float:
    return sum(list(losses(trainer).values())[-20:]) / 20


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> float:
    folder = tmp_path_factory.mktemp("clean")
    trainer = run(folder, GUARD)
    assert not (folder / "events.jsonl").exists()  # a healthy run has no breach
    loss = final_loss(trainer)
    assert loss < 0.75 * losses(trainer)[1]
    return loss


def test_without_a_guard_a_nan_ends_the_run(tmp_path: Path):
    with pytest.raises(TrainingStopped, match="hold NaN or infinity after step 41, so no later step can be better"):
        run(tmp_path, None, NaNGradient, 40, max_steps=45)


def test_a_jump_while_the_loss_still_falls(tmp_path: Path):
    model = tiny_llama()
    callback = LowPrecisionCallback({"recipe": "mxfp4", "guard": {**GUARD, "window": 64}})
    trainer = small_trainer(tmp_path, callback, Forgetting(model, 26), model=model, max_steps=50, lr_scheduler_type="constant")
    trainer.train()
    found = losses(trainer)
    assert found[28] == pytest.approx(found[1], rel=0.1)
    assert found[27] < 0.3 * found[1]
    breach, back, _ = events(tmp_path)
    assert breach["step"] == 28
    assert breach["reason"].endswith("of the last 8 steps")
    assert "step 20" in back["reason"]
    assert max(found[step] for step in range(29, 51)) < 1.1 * found[20]


# Where a NaN comes from is found before the data is chosen, so each fault needs no run of its own with either choice.
@pytest.mark.parametrize(("data", "fault"), [("skip", NaNGradient), ("skip", NaNBackwards), ("replay", NaNGradient)])
def test_a_nan_in_one_layers_gradients(fault: type[Fault], data: str, tmp_path: Path, clean: float):
    settings = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 2} if data == "replay" else {}
    trainer = run(tmp_path, {**GUARD, "data": data}, fault, 47, **settings)
    assert trainer.state.global_step == STEPS
    assert final_loss(trainer) == pytest.approx(clean, rel=0.02)
    breach, back, raised = events(tmp_path)
    assert (breach["step"], breach["event"]) == (48, "breach")
    assert breach["layers"][0] == LAYER  # not the layers before it, which the NaN reached too
    assert back["event"] == {"skip": "restored", "replay": "stopped"}[data]
    assert "step 40" in back["reason"] or data == "replay"
    assert raised["layers"] == [f"{LAYER}: mxfp4 -> fp8_blockwise"]
    layers = {name: module.recipe.name for name, module in trainer.model.named_modules() if isinstance(module, LowPrecisionLinear)}
    assert layers.pop(LAYER) == "fp8_blockwise"
    assert set(layers.values()) == {"mxfp4"}
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["totals"]["recipes"] == {"mxfp4": 13, "fp8_blockwise": 1}


def test_an_exploding_loss(tmp_path: Path, clean: float):
    trainer = run(tmp_path, GUARD, Explosion, 52)
    assert final_loss(trainer) == pytest.approx(clean, rel=0.02)
    told = events(tmp_path)
    assert told[0]["reason"].startswith(("loss: loss ", "gradient: gradient norm "))
    assert told[0]["step"] in (53, 54)
    assert "step 50" in told[1]["reason"]
    assert told[0]["layers"]


def test_repeated_breaches_go_up_the_ladder_and_then_stop_the_run(tmp_path: Path):
    with pytest.raises(TrainingStopped, match="after 3 recoveries") as caught:
        run(tmp_path, GUARD, NaNGradient, *range(40, 60))
    assert "\n" not in str(caught.value)
    raised = [event["layers"] for event in events(tmp_path) if event["event"] == "raised"]
    assert raised[0] == [f"{LAYER}: mxfp4 -> fp8_blockwise"]
    assert raised[1] == [f"{LAYER}: fp8_blockwise -> bf16"]
    restored = [event["reason"] for event in events(tmp_path) if event["event"] == "restored"]
    assert restored[0].startswith("weights and optimizer of step 40")  # the loss of that step was healthy
    assert restored[1].startswith("weights and optimizer of step 30")  # the newer snapshot did not help


def test_a_raised_precision_holds_in_later_phases_of_lower_precision(tmp_path: Path):
    model = tiny_llama()
    schedule = [{"until": "30 steps", "recipe": "mxfp4"}, {"until": "35 steps", "recipe": "bf16"}, {"recipe": "mxfp8"}]
    callback = LowPrecisionCallback({"schedule": schedule, "guard": {**GUARD, "ladder": ["mxfp4", "fp8_blockwise"]}})
    seen = []

    class See(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(model.get_submodule(LAYER).recipe.name)

    small_trainer(tmp_path, callback, NaNGradient(model, 20), See(), model=model, max_steps=40).train()
    assert (seen[19], seen[20], seen[29], seen[30], seen[39]) == ("mxfp4", "fp8_blockwise", "fp8_blockwise", "bf16", "mxfp8")


@pytest.mark.parametrize("first", [False, True])
def test_the_step_of_a_breach_is_not_saved(first: bool, tmp_path: Path):
    """It would replace the checkpoint to go back to."""
    model = tiny_llama()
    callback = LowPrecisionCallback({"recipe": "mxfp4", "guard": {**GUARD, "data": "replay"}})
    saves = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    trainer = small_trainer(tmp_path, callback, NaNGradient(model, 15), model=model, max_steps=20, **saves)
    if first:
        callback.put_first(trainer)
    callback.train(trainer)
    assert trainer.state.global_step == 20
    assert [event["step"] for event in events(tmp_path) if event["event"] == "breach"] == [16]
    assert model.get_submodule(LAYER).weight.isfinite().all()


def test_a_second_run_starts_without_the_events_of_the_first(tmp_path: Path):
    model = tiny_llama()
    callback = LowPrecisionCallback({"recipe": "mxfp4", "guard": GUARD})
    trainer = small_trainer(tmp_path, callback, NaNGradient(model, 15), model=model, max_steps=18)
    trainer.train()
    assert callback.controller.recoveries == 1
    trainer.train()
    assert callback.controller.recoveries == 0
    assert {module.recipe.name for module in model.modules() if isinstance(module, LowPrecisionLinear)} == {"mxfp4"}
    assert not (tmp_path / "events.jsonl").read_text()  # the events of the run before are gone


@pytest.mark.parametrize(
    "guard, message",
    [
        ({"ladder": ["mxfp4", "fp8_blokwise"]}, "guard.ladder: unknown recipe 'fp8_blokwise'; did you mean 'fp8_blockwise'"),
        ({"ladder": ["bf16", "mxfp4"]}, "guard.ladder: the ladder must rise: mxfp4 (4 bits) is no higher than bf16 (16 bits)"),
        ({"ladder": []}, "guard.ladder: the ladder needs at least one recipe"),
        ({"snapshots_every": 5}, "guard.snapshots_every: unknown key; did you mean 'snapshot_every'?"),
        ({"sqnr_floor": 10.0}, "guard.sqnr_floor looks at what probe_every measures"),
        ({"window": True}, "guard.window: expected a number, got true"),
    ],
)
def test_wrong_settings_are_one_line(guard: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        LowPrecisionCallback({"guard": guard})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quantisation_errors_are_logged_and_may_be_a_breach(tmp_path: Path):
    precision = {"recipe": "mxfp4", "probe_every": 10, "guard": {**GUARD, "sqnr_floor": 17.5, "max_recoveries": 50, "raise_share": 0.2}}
    trainer = small_trainer(tmp_path, LowPrecisionCallback(precision), max_steps=30)
    trainer.train()
    logged = [record["step"] for record in trainer.state.log_history if "sqnr_x_min" in record]
    assert logged == [1, 11, 21]
    told = events(tmp_path)
    assert told[0]["reason"].startswith("sqnr: the quantisation of model.layers.")
    assert len(told[2]["layers"]) == 2
    after = next(record for record in trainer.state.log_history if record.get("step") == 21)
    assert after["sqnr_x_median"] >= 17.5


def test_experts_go_up_the_ladder(tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=4, use_cache=False, **sizes))

    fault = Fault(model, 14)
    weight = model.model.layers[1].mlp.experts.down_proj
    weight.register_hook(lambda g: g * torch.nan if fault.active else g)
    callback = LowPrecisionCallback({"recipe": "mxfp4", "guard": {**GUARD, "raise_share": 0.2}})
    trainer = small_trainer(tmp_path, callback, fault, model=model, max_steps=20)
    trainer.train()
    breach, _, raised = events(tmp_path)
    prefix = "model.layers.1.mlp.experts"
    assert breach["layers"][0] == prefix
    assert raised["layers"] == [f"{prefix}.{name}: mxfp4 -> fp8_blockwise" for name in ("gate_up_proj", "down_proj")]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert {layer["recipe"] for layer in plan["layers"] if layer["name"].startswith(prefix)} == {"fp8_blockwise"}
