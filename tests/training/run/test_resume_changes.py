"""Each setting that changes when a run resumes is applied or refused, never ignored."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lowprec import LowPrecisionCallback, UserError
from lowprec.training.checkpoint.manifest import write_manifest
from lowprec.training.control.data_order import DataOrder
from lowprec.training.optim.settings import apply_settings
from lowprec.training.run.config import RunConfig
from lowprec.training.run.resume_changes import SECTIONS, TRAINER, Change, changes, check_changes, rule
from lowprec.training.run.training_args import OWN_KEYS
from tests.builders import prose, small_trainer
from tests.processes import lowprec
from tests.runs import CONFIG, make_corpus, overrides, read_metrics


def test_the_table_has_every_field():
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert set(TRAINER) == fields | set(OWN_KEYS)
    assert {path.partition(".")[0] for path in SECTIONS} - {"lora", "sft"} == set(RunConfig.model_fields) - {"trainer"}
    assert rule("trainer.of_a_later_version") is rule("unheard_of") is Change.REFUSED


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"trainer": {"optim_args": "amsgrad=True"}}, "trainer.optim_args: .* with null, .* resume with trainer.optim_args=null"),
        ({"trainer": {"dataloader_drop_last": True}}, {}, "trainer.dataloader_drop_last: .* with true, not false"),
        ({"lora": True}, {"lora": {"r": 8}}, "lora: can't change"),
        ({"trainer": {"deepspeed": "x.json"}}, {}, "trainer.deepspeed"),
    ],
)
def test_what_is_refused(before: dict[str, Any], now: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check_changes(changes(before, now), ("linear", "linear"))


def test_what_is_not_refused():
    before = {"trainer": {"learning_rate": 1e-3}, "data": {"source": "a"}, "precision": "bf16", "device": "cpu"}
    now = {"trainer": {"learning_rate": 2e-3, "save_steps": 5, "optim_args": None}, "data": {"source": "b"}, "compile": "blocks"}
    found = changes(before, now)
    assert found["trainer.learning_rate"] == (1e-3, 2e-3)
    assert "trainer.optim_args" not in found
    check_changes(found, ("linear", "cosine"))
    with pytest.raises(UserError, match="can't change with the schedule reduce_lr_on_plateau"):
        check_changes(found, ("linear", "reduce_lr_on_plateau"))


# The optimizer and the learning rate


def train(folder: Path, checkpoint: Path | None = None, **settings: Any) -> Trainer:
    given = {"max_steps": 6, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1, **settings}
    trainer = small_trainer(folder, LowPrecisionCallback("mxfp8"), data=prose(60), save_strategy="steps", save_steps=3, **given)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def rates(trainer: Trainer) -> dict[int, float]:
    return {logs["step"]: logs["learning_rate"] for logs in trainer.state.log_history if "learning_rate" in logs}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return train(tmp_path_factory.mktemp("first"))


def check_applied(first: Trainer, settings: dict[str, Any], folder: Path) -> None:
    """Check that the learning rates are those of a run that has had the new settings from its begin, and the optimizer's settings, too."""
    again = train(folder / "again", Path(str(first.args.output_dir)) / "checkpoint-3", **settings)
    anew = train(folder / "anew", **settings) if settings else first
    assert rates_after(again, 3) == rates_after(anew, 3)
    for mine, other in zip(again.optimizer.param_groups, anew.optimizer.param_groups, strict=True):
        for name in ("initial_lr", "weight_decay", "betas", "eps"):
            assert mine[name] == other[name], name
    same = all(torch.equal(one, two) for one, two in zip(again.model.parameters(), first.model.parameters(), strict=True))
    assert same == (not settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"learning_rate": 1e-3},
        {"weight_decay": 0.0, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6},
        {"max_steps": 9},
        {"lr_scheduler_type": "linear", "warmup_steps": 4},
        {"lr_scheduler_type": "constant", "learning_rate": 5e-4},
    ],
    ids=lambda settings: "-".join(settings) or "none",
)
def test_a_new_setting_is_applied_from_the_first_step(first: Trainer, settings: dict[str, Any], tmp_path: Path):
    check_applied(first, settings, tmp_path)


def test_to_an_optimizer_whose_learning_rate_is_a_tensor():
    """Compiled steps read the tensor, so it keeps its identity."""
    weight = torch.nn.Parameter(torch.ones(4))

    def make(rate: float) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = torch.optim.AdamW([weight], lr=torch.tensor(rate), weight_decay=rate, capturable=True, foreach=False)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    optimizer, scheduler = make(1e-2)
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": 4})
    tensor = optimizer.param_groups[0]["lr"]
    apply_settings(optimizer, scheduler, [{"initial_lr": torch.tensor(2e-2), "weight_decay": 0.5}])
    assert optimizer.param_groups[0]["lr"] is tensor
    assert tensor.item() == (torch.tensor(2e-2) * (1 / 5)).item()
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert scheduler.base_lrs[0].item() == torch.tensor(2e-2).item()


def rates_after(trainer: Trainer, step: int) -> dict[int, float]:
    return {at: rate for at, rate in rates(trainer).items() if at > step}


# The place in the data


def tampered(trainer: Trainer, folder: Path, **order: int) -> Path:
    """Copy a checkpoint, as a run with another order of the data would have written it."""
    checkpoint = shutil.copytree(Path(str(trainer.args.output_dir)) / "checkpoint-3", folder / "checkpoint-3")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"][DataOrder.name].update(order)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(checkpoint, 3)
    return checkpoint


@pytest.mark.parametrize(
    ("order", "settings", "message"),
    [
        ({"processes": 2}, {}, r"has 8 sequences \(4 x 1 accumulated x 2 processes\), a step of this run 4 .*=2$"),
        ({"processes": 2}, {"gradient_accumulation_steps": 2}, None),
        ({"processes": 2}, {"per_device_train_batch_size": 8}, None),
        ({"batch": 6}, {}, "resume with 1 processes and per_device_train_batch_size=6 gradient_accumulation_steps=1"),
        ({"seed": 43}, {}, "seed: .* in the order of seed 43, not 42"),
        ({"seed": 43}, {"data_seed": 43}, None),
        ({"seed": 43}, {"ignore_data_skip": True}, None),
    ],
)
def test_the_place_in_the_data(order: dict[str, int], settings: dict[str, Any], message: str | None, first: Trainer, tmp_path: Path):
    checkpoint = tampered(first, tmp_path, **order)
    if message is None:
        train(tmp_path / "again", checkpoint, **settings)
    else:
        with pytest.raises(UserError, match=message):
            train(tmp_path / "again", checkpoint, **settings)


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("command")
    corpus = make_corpus(folder / "corpus")
    settings = {"trainer__max_steps": 4, "trainer__save_steps": 2, "trainer__lr_scheduler_type": "constant", "trainer__learning_rate": 1e-3}
    arguments = ["train", str(CONFIG), *overrides(corpus, **settings)]
    lowprec(*arguments, f"trainer.output_dir={folder / 'run'}", check=True)
    return folder / "run", arguments


def test_the_command_refuses_before_anything_is_written(run: tuple[Path, list[str]], refused: Callable[..., str]):
    folder, arguments = run
    shutil.rmtree(folder / "checkpoint-4")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    resume = [*arguments, f"trainer.output_dir={folder}", "trainer.resume_from_checkpoint=true"]
    line = refused(*resume, "trainer.gradient_accumulation_steps=3")
    assert "trainer.per_device_train_batch_size: a step of the checkpoint's run has 4 sequences" in line
    assert "trainer.seed: " in refused(*resume, "trainer.seed=7")
    assert "trainer.dataloader_drop_last: " in refused(*resume, "trainer.dataloader_drop_last=true")
    assert "data.tokenizer: " in refused(*resume, "data.tokenizer=bpe", "data.vocab_size=300")
    checkpoint = folder / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"][DataOrder.name]  # a checkpoint of an earlier version, of two ranks
    kept = (checkpoint / "trainer_state.json").read_bytes(), (checkpoint / "lowprec_manifest.json").read_bytes()
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    write_manifest(checkpoint, 2)
    assert "has 8 sequences (4 x 1 accumulated x 2 processes)" in refused(*resume)
    (checkpoint / "rng_state_1.pth").unlink()
    (checkpoint / "rng_state_0.pth").rename(checkpoint / "rng_state.pth")
    (checkpoint / "trainer_state.json").write_bytes(kept[0])
    (checkpoint / "lowprec_manifest.json").write_bytes(kept[1])
    assert before.keys() == dict.fromkeys(folder.rglob("*"), 0).keys()


def test_the_command_applies_a_learning_rate(run: tuple[Path, list[str]], tmp_path: Path):
    folder, arguments = run
    resume = [f"trainer.output_dir={tmp_path / 'again'}", f"trainer.resume_from_checkpoint={folder / 'checkpoint-2'}"]
    result = lowprec(*arguments, *resume, "trainer.learning_rate=1e-4", check=True)
    assert "trainer.learning_rate 0.001 -> 0.0001" in result.stderr
    assert "the optimizer's settings from here on: learning rate 0.001 -> 0.0001" in result.stderr
    assert {logs["learning_rate"] for logs in read_metrics(tmp_path / "again") if "learning_rate" in logs} == {1e-4}
