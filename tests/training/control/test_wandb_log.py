"""Logs in Weights & Biases (read back from offline runs) and in TensorBoard: losses, precision, events and plans at their steps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from lowprec import LowPrecisionCallback
from lowprec.conversion.convert import make_plan
from lowprec.nn import LowPrecisionLinear
from lowprec.training.control.wandb_log import log_plan, log_scalars
from tests.builders import losses, small_trainer, tiny_llama
from tests.processes import lowprec
from tests.runs import CONFIG, make_corpus, overrides, read_metrics, wandb_history

wandb = pytest.importorskip("wandb")

Rows = list[dict[str, Any]]
LAYER = "model.layers.1.mlp.down_proj"
TWO_PHASES = [{"until": "3 steps", "recipe": "bf16"}, {"until": "100%", "recipe": "fp8_blockwise"}]


class NaNGradient(TrainerCallback):
    """A fault: NaN in the gradient of one layer's weight, in the step after `step` finished ones."""

    def __init__(self, model: Any, step: int) -> None:
        self.step, self.active = step, False
        model.get_submodule(LAYER).weight.register_hook(lambda g: g * torch.nan if self.active else g)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.active = state.global_step == self.step


def by_step(rows: Rows, name: str) -> dict[int, Any]:
    """Return the values that were logged under a name, by step; check that each step has one."""
    found = [(row["train/global_step"], row[name]) for row in rows if name in row]
    assert len(dict(found)) == len(found)
    return dict(found)


def recipes(log: Path, rows: Rows) -> dict[int, dict[str, str]]:
    """Return the tables of plans by step, as the recipe of each converted layer."""
    tables = {}
    for step, path in by_step(rows, "lowprec/plan.path").items():
        table = json.loads((log.parent / "files" / path).read_text())
        columns = [table["columns"].index(name) for name in ("layer", "recipe")]
        cells = ([row[column] for column in columns] for row in table["data"])
        tables[step] = {layer: recipe for layer, recipe in cells if recipe}
    return tables


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Rows]:
    """Run `lowprec train` in two phases, with a guard and probes. Return its directory, its wandb file, and the rows in that."""
    folder = tmp_path_factory.mktemp("command")
    output = folder / "run"
    precision = {"precision__schedule": TWO_PHASES, "precision__guard": {"snapshot_every": 2}, "precision__probe_every": 4}
    trainer = {"trainer__max_steps": 6, "trainer__output_dir": str(output), "trainer__report_to": "wandb"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        lowprec("train", str(CONFIG), *overrides(make_corpus(folder / "corpus"), **precision, **trainer), check=True)
    (log,) = output.glob("wandb/offline-run-*/run-*.wandb")
    return output, log, wandb_history(log)


def test_the_commands_run_is_in_wandb_as_in_its_metrics(command: tuple[Path, Path, Rows]):
    output, _, rows = command
    steps = [record for record in read_metrics(output) if "loss" in record]
    for name in ("loss", "phase", "tokens_per_second", "guard_recoveries", "guard_raised_layers", "sqnr_x_min", "sqnr_g_median"):
        expected = {record["step"]: record[name] for record in steps if name in record}
        assert by_step(rows, f"train/{name}") == pytest.approx(expected, rel=1e-12), name
    assert by_step(rows, "train/phase") == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
    assert by_step(rows, "train/guard_recoveries") == dict.fromkeys(range(1, 7), 0)
    # Measured in the steps after 0 and 4 finished ones: the rounding to bf16 (8 bits), then to E4M3 (4 bits).
    noise = by_step(rows, "train/sqnr_w_median")
    assert list(noise) == [1, 5]
    assert noise[1] > 50 > 35 > noise[5]
    assert min(by_step(rows, "train/tokens_per_second").values()) > 0


def test_the_commands_events_and_the_plan_after_them(command: tuple[Path, Path, Rows]):
    output, log, rows = command
    (event,) = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    assert by_step(rows, "lowprec/event") == {3: f"phase: {event['reason']}"}
    plan = json.loads((output / "plan.json").read_text())
    assert recipes(log, rows)[3] == {layer["name"]: layer["recipe"] for layer in plan["layers"] if layer["converted"]}
    assert set(recipes(log, rows)[3].values()) == {"fp8_blockwise"}


def test_the_commands_run_begins_with_the_plan_of_its_first_phase(command: tuple[Path, Path, Rows]):
    _, log, rows = command
    plans = recipes(log, rows)
    assert {step: set(plan.values()) for step, plan in plans.items()} == {0: {"bf16"}, 3: {"fp8_blockwise"}}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the wandb runs of a test offline, in the test's folder, and finish them."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # wandb reads them once
    yield
    wandb.finish()
    wandb.teardown()


def summary_and_log(folder: Path) -> tuple[dict[str, Any], Path]:
    """Finish the active run, and return its summary and its log."""
    summary = dict(wandb.run.summary)
    wandb.finish()
    wandb.teardown()  # this waits until the file is written
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return summary, log


def test_an_untouched_trainer_whose_wandb_comes_first(tmp_path: Path, offline: None):
    callback = LowPrecisionCallback({"schedule": TWO_PHASES, "loss_scaling": {"init_scale": 1024, "growth_interval": 2}})
    # Clipping would need autocast, to know that the gradients are scaled.
    trainer = small_trainer(tmp_path, callback, max_steps=6, report_to="wandb", max_grad_norm=0.0)
    order = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert order.index("WandbCallback") < order.index("LowPrecisionCallback")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # with fp16 on a GPU it has one
    trainer.train()
    summary, log = summary_and_log(tmp_path)
    rows = wandb_history(log)
    assert by_step(rows, "train/loss") == losses(trainer)
    assert by_step(rows, "train/phase") == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
    assert by_step(rows, "train/loss_scale") == {1: 1024, 2: 2048, 3: 2048, 4: 4096, 5: 4096, 6: 8192}
    assert by_step(rows, "train/skipped_steps") == dict.fromkeys(range(1, 7), 0)
    plans = recipes(log, rows)
    assert {step: set(plan.values()) for step, plan in plans.items()} == {0: {"bf16"}, 3: {"fp8_blockwise"}}
    assert list(plans[0]) == [name for name, module in trainer.model.named_modules() if isinstance(module, LowPrecisionLinear)]
    assert summary["lowprec/plan"]["_type"] == "table-file"  # the workspace finds the table by this name
    assert callback.plan is not None
    assert summary["lowprec/plan_summary"] == callback.plan.summary()


def test_a_breach_is_logged_line_by_line_and_the_plan_shows_raised_layers(tmp_path: Path, offline: None):
    model = tiny_llama()
    precision = {"recipe": "mxfp4", "guard": {"snapshot_every": 2, "warmup": 2}}
    trainer = small_trainer(tmp_path, LowPrecisionCallback(precision), NaNGradient(model, 4), model=model, max_steps=6, report_to="wandb")
    trainer.train()
    _, log = summary_and_log(tmp_path)
    rows = wandb_history(log)
    told = [row["lowprec/event"] for row in rows if row.get("train/global_step") == 5 and "lowprec/event" in row]
    assert told == [
        f"breach: not finite: gradients that are not finite in step 5, in 1 of {len(watched(trainer))} watched layers\n  {LAYER}",
        "restored: weights and optimizer of step 4; the data continues",
        f"raised: precision of 1 of 14 layers\n  {LAYER}: mxfp4 -> fp8_blockwise",
    ]
    assert len(told) == sum("lowprec/event" in row for row in rows)
    for name in ("recoveries", "raised_layers"):
        assert by_step(rows, f"train/guard_{name}") == {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1}
    before, after = (recipes(log, rows)[step] for step in (0, 5))
    assert set(before.values()) == {"mxfp4"}
    assert {layer: recipe for layer, recipe in after.items() if before[layer] != recipe} == {LAYER: "fp8_blockwise"}


def watched(trainer: Trainer) -> list[str]:
    """Return the names of the watched modules: those with parameters of their own, the head and the embeddings too."""
    return [name for name, module in trainer.model.named_modules() if list(module.parameters(recurse=False))]


def test_without_a_run_nothing_is_logged_and_none_is_started():
    callback = LowPrecisionCallback("mxfp8")
    log_plan(callback.controller.convert(tiny_llama()))
    log_scalars({"phase": 1.0}, 1)
    assert wandb.run is None


def test_tensorboard_shows_the_precision_if_the_callback_comes_first(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    callback = LowPrecisionCallback({"schedule": TWO_PHASES, "guard": True, "probe_every": 4})
    trainer = small_trainer(tmp_path, callback, max_steps=6, report_to="tensorboard")
    callback.put_first(trainer)
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    shown = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert shown["train/phase"] == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
    assert shown["train/guard_recoveries"] == dict.fromkeys(range(1, 7), 0)
    assert list(shown["train/sqnr_x_min"]) == [1, 5]
    assert list(shown["train/loss"]) == list(range(1, 7))


def test_the_configuration_has_the_recipe_that_was_asked_for_and_what_runs(tmp_path: Path, offline: None):
    wandb.init(project="test", mode="offline")
    plan = make_plan(torch.nn.ModuleDict({"body": torch.nn.Linear(32, 32), "lm_head": torch.nn.Linear(32, 32)}), "mxfp8")
    log_plan(plan)
    shares = {"mxfp8": 0.5, "high precision": 0.5}
    assert wandb.run is not None
    assert wandb.run.config["lowprec"] == {"asked_recipe": "mxfp8", "weights": shares, "flops": shares}
