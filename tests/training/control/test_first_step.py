"""The first step of a run finds the converted layers that the model does not call, and the plan is corrected."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lowprec import LowPrecisionCallback, UserError
from lowprec.conversion import describe
from lowprec.conversion.convert import convert
from lowprec.observe.called import BYPASSED
from lowprec.training.control import first_step
from lowprec.training.control.events import Events
from tests.builders import losses, small_trainer, tiny_llama
from tests.training.test_accelerate import Loop, fresh_state  # noqa: F401

UP = [f"model.layers.{number}.mlp.up_proj" for number in range(2)]
DOWN = [f"model.layers.{number}.mlp.down_proj" for number in range(2)]


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """Multiply by the weight of a layer without calling it."""
    return nn.functional.linear(x, layer.weight)  # pyright: ignore[reportArgumentType]


class Reading(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * product(self.up_proj, x))


class Sleeping(LlamaMLP):
    """It calls down_proj from the fourth time on."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        y = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(y) if self.passes > 3 else y[..., : x.shape[-1]]


def llama(mlp: type[LlamaMLP] = Reading) -> LlamaForCausalLM:
    model: Any = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.__class__ = mlp
    return model


def status(folder: Path) -> dict[str, str]:
    """Return the names and reasons of the layers that plan.json calls "not called"."""
    plan = json.loads((folder / "plan.json").read_text())
    found = {layer["name"]: layer["reason"] for layer in plan["layers"] if not layer["called"]}
    assert plan["totals"]["not called"] == len(found)
    assert not any(layer["converted"] for layer in plan["layers"] if layer["name"] in found)
    return found


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in log.records if "uncalled" in record.getMessage()]
    log.clear()
    return found


def test_the_plan_is_corrected_once_and_a_resumed_run_keeps_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    settings: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    callback = LowPrecisionCallback("mxfp4")
    trainer = small_trainer(tmp_path, callback, model=llama(), **settings)
    trainer.train()
    assert status(tmp_path).keys() == set(UP)
    (warning,) = warnings(caplog)
    assert "2 layers are out of the plan; 12 of 15 linear layers converted" in warning
    assert "model.layers.{0-1}.mlp.up_proj: planned as mxfp4, but in the first step its layer did not run" in warning
    assert callback.plan is not None
    assert "2 not called" in callback.plan.summary()
    assert callback.plan.warnings[-1].startswith("2 converted layers were not called: model.layers.{0-1}.mlp.up_proj: planned as mxfp4")
    assert "model.layers.{0-1}.mlp.up_proj" in str(callback.plan)
    assert [event["event"] for event in callback.controller.events] == ["uncalled"]

    resumed = small_trainer(tmp_path, LowPrecisionCallback("mxfp4"), model=llama(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert status(tmp_path).keys() == set(UP)
    assert not warnings(caplog)

    monkeypatch.setattr(first_step.FirstStepCheck, "begin", lambda *_, **__: None)
    unwatched = small_trainer(tmp_path / "unwatched", LowPrecisionCallback("mxfp4"), model=llama(), **settings)
    unwatched.train()
    assert not status(tmp_path / "unwatched")
    assert losses(unwatched) == losses(trainer) == losses(resumed)


def test_strict_refuses_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(describe, "_check_strict", lambda plan: None)  # all is emulated on a CPU
    callback = LowPrecisionCallback({"recipe": "mxfp4", "strict": True})
    trainer = small_trainer(tmp_path, callback, model=llama(), save_strategy="steps", save_steps=1)
    with pytest.raises(UserError, match=r"^precision.strict: model.layers.\{0-1\}.mlp.up_proj: planned as mxfp4, but"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    # A layer that is not used yet is no error.
    callback = LowPrecisionCallback({"recipe": "mxfp4", "strict": True})
    small_trainer(tmp_path, callback, model=llama(Sleeping), max_steps=1).train()
    assert status(tmp_path).keys() == set(DOWN)


def test_a_later_phase_reports_what_the_first_step_found(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    schedule = [{"until": "2 steps", "recipe": "none"}, {"until": "3 steps"}, {"until": "100%", "recipe": "mxfp8"}]
    callback = LowPrecisionCallback({"recipe": "mxfp4", "schedule": schedule})
    small_trainer(tmp_path, callback, model=llama(), max_steps=4).train()
    assert [(event["step"], event["event"]) for event in callback.controller.events] == [
        (2, "phase"),
        (2, "uncalled"),
        (3, "phase"),
    ]
    assert status(tmp_path).keys() == set(UP)
    assert len(warnings(caplog)) == 1


def test_a_layer_that_is_used_later_comes_back_into_the_plan(fresh_state: None, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    from tests.training import test_accelerate

    monkeypatch.setattr(test_accelerate, "tiny_llama", lambda: llama(Sleeping))
    loop = Loop("mxfp4").train(2)
    plan = loop.controller.plan
    assert plan is not None
    assert [layer.name for layer in plan.layers if not layer.called] == DOWN
    assert "no gradient" in plan.reasons_of(DOWN)[0]
    saved = json.loads(json.dumps(loop.controller.state_dict()))
    loop.train(3, begin=2)
    assert [event["event"] for event in loop.controller.events] == ["uncalled"]
    loop.train(4, begin=3)
    assert loop.controller.plan is not None
    assert all(layer.called for layer in loop.controller.plan.layers)
    assert [(event["step"], event["event"]) for event in loop.controller.events] == [(1, "uncalled"), (4, "called")]
    assert saved["uncalled"].keys() == set(DOWN)


def test_an_optimizer_without_hooks_is_judged_after_its_step():
    model = llama()
    plan = convert(model, "mxfp4")
    check = first_step.FirstStepCheck(Events())
    check.begin(model, SimpleNamespace(step=lambda: None), plan)
    check.before_step()
    tokens = torch.arange(16)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert check.after_step()
    assert check.uncalled == dict.fromkeys(UP, BYPASSED)
    assert not check.after_step()
