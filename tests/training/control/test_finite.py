"""A loss that is not finite is shown as it is, in valid JSON, and a run that can't recover from it ends with an error."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from lowprec import LowPrecisionCallback
from lowprec.errors import TrainingStopped
from lowprec.files import from_json, to_json
from lowprec.training.checkpoint.files import is_checkpoint_of
from tests.builders import losses, prose, small_trainer, tiny_llama
from tests.processes import ROOT, lowprec
from tests.runs import CONFIG, make_corpus, overrides


def strict(text: str) -> Any:
    """Return the value of a JSON text as a reader other than Python's would: NaN is no JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


class Poisoned(TrainerCallback):
    """A fault in one step: the loss is NaN, and with `weights` the gradients of a layer are, too."""

    def __init__(self, model: Any, step: int, *, weights: bool, value: float = math.nan) -> None:
        self.step, self.value, self.active = step, value, False
        model.register_forward_hook(self.add)
        if weights:
            model.lm_head.weight.register_hook(lambda g: g * torch.nan if self.active else g)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.active = state.global_step + 1 == self.step

    def add(self, model: Any, inputs: Any, output: Any) -> Any:
        if self.active:
            output.loss = output.loss + self.value  # its gradients are finite
        return output


def run(folder: Path, step: int, *, weights: bool, value: float = math.nan, precision: Any = "mxfp8", **settings: Any) -> Any:
    model = tiny_llama()
    poison = Poisoned(model, step, weights=weights, value=value)
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 20}
    callback = LowPrecisionCallback(precision)
    return callback, small_trainer(folder, callback, poison, model=model, max_steps=8, data=prose(60), **{**saves, **settings})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_loss_that_is_not_finite(value: float, tmp_path: Path):
    """The weights stay finite: the run goes on, and its log tells."""
    _, trainer = run(tmp_path, 3, weights=False, value=value)
    result = trainer.train()
    found = losses(trainer)
    assert repr(found.pop(3)) == repr(value)
    assert all(map(math.isfinite, found.values()))
    assert len(found) == 7
    assert math.isnan(result.metrics["train_loss"])
    told = strict((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert [logs["loss"] for logs in told["log_history"] if logs["step"] == 3] == [to_json(value).strip('"')]
    _, again = run(tmp_path, 3, weights=False, value=value)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert repr(losses(again)[3]) == repr(value)
    assert losses(again)[8] == losses(trainer)[8]
    again.state.global_step, again.state.log_history = 5, again.state.log_history[:5]
    assert is_checkpoint_of(tmp_path / "checkpoint-5", again.state)


@pytest.mark.parametrize("settings", [{}, {"logging_steps": 3}, {"logging_steps": 100}])
@pytest.mark.parametrize("by_callback", [False, True])
def test_weights_that_are_not_finite_end_the_run(by_callback: bool, settings: dict[str, Any], tmp_path: Path):
    """The last checkpoint is from before that."""
    callback, trainer = run(tmp_path, 4, weights=True, **settings)
    with pytest.raises(TrainingStopped, match=r"hold NaN or infinity after step 4, so no later step"):
        callback.train(trainer) if by_callback else trainer.train()
    assert trainer.state.global_step == 4
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (1, 2, 3)]


def test_without_checkpoints_the_next_log_tells(tmp_path: Path):
    _, trainer = run(tmp_path, 4, weights=True, save_strategy="no", logging_steps=3)
    with pytest.raises(TrainingStopped, match="after step 6"):
        trainer.train()
    assert [math.isfinite(loss) for loss in losses(trainer).values()] == [True, False]


def test_a_guard_goes_back(tmp_path: Path):
    _, trainer = run(tmp_path, 4, weights=True, precision={"recipe": "mxfp8", "guard": {"snapshot_every": 2}})
    trainer.train()
    assert trainer.state.global_step == 8
    assert math.isfinite(losses(trainer)[8])


def test_a_run_of_the_command_that_diverges(tmp_path: Path):
    corpus = make_corpus(tmp_path / "corpus")
    settings = {"trainer__max_steps": 30, "trainer__learning_rate": 1e30, "trainer__save_steps": 20, "trainer__logging_steps": 5}
    result = lowprec("train", str(CONFIG), *overrides(corpus, **settings, trainer__output_dir=str(tmp_path / "run")))
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("lowprec: stopped: ")
    assert "Traceback" not in result.stderr
    told = [strict(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "NaN" in [logs.get("loss") for logs in told]
    for path in (tmp_path / "run").rglob("*.json"):
        strict(path.read_text())


def test_json_of_every_float():
    value = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, "d": None}, "e": True, "f": "NaNs"}
    text = to_json(value)
    assert strict(text) == {"a": ["NaN", ["Infinity", 1.5]], "b": {"c": "-Infinity", "d": None}, "e": True, "f": "NaNs"}
    back = from_json(text)
    assert repr(back["a"]) == "[nan, [inf, 1.5]]"
    assert back["b"]["c"] == -math.inf
    assert float("NaN") != float("NaN")
    assert float("Infinity") == math.inf


def test_all_json_is_written_by_it():
    writers = [path for folder in ("lowprec", "trainers") for path in (ROOT / folder).rglob("*.py") if "json.dump" in path.read_text()]
    assert writers == [ROOT / "lowprec" / "files.py"]
