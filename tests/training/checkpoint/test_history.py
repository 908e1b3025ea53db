"""One history of checkpoints: later ones of steps that are taken again are set aside, and old ones go by their steps."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from lowprec import LowPrecisionCallback
from lowprec.conversion.discover import recipes_of
from lowprec.training.checkpoint.history import rotate, set_aside_later
from lowprec.training.checkpoint.torn import STILL_WRITTEN
from tests.builders import losses, prose, small_trainer
from tests.training.control.test_guard_in_training import NaNGradient
from tests.training.control.test_replay import run as run_with_replay

SAVES = {"save_strategy": "steps", "save_steps": 2, "data": prose(100)}


def make(directory: Path, *steps: int) -> None:
    for step in steps:
        folder = directory / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*checkpoint*")}


def test_later_checkpoints_are_renamed_and_none_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make(tmp_path, 2, 4, 6, 10)
    set_aside_later(tmp_path, 4, None)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "replaced-checkpoint-6", "replaced-checkpoint-10"}
    make(tmp_path, 6)
    set_aside_later(tmp_path, 2, 0)  # no limit, as for the Trainer
    again = {"replaced-checkpoint-4", "replaced-checkpoint-6", "replaced-checkpoint-6-2", "replaced-checkpoint-10"}
    assert names(tmp_path) == {"checkpoint-2", *again}
    set_aside_later(tmp_path, 2, None)
    first, second = (record.message for record in caplog.records)
    assert "goes on after step 4: later checkpoints are set aside as replaced-checkpoint-6, replaced-checkpoint-10" in first
    assert "after step 2: later checkpoints are set aside as replaced-checkpoint-4, replaced-checkpoint-6-2" in second


def test_the_limit_holds_for_replaced_checkpoints_too(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Checkpoints that are set aside now all stay; older ones go, which is said."""
    make(tmp_path, 2, 4, 6, 8)
    set_aside_later(tmp_path, 2, 2)
    assert names(tmp_path) == {"checkpoint-2", "replaced-checkpoint-4", "replaced-checkpoint-6", "replaced-checkpoint-8"}
    make(tmp_path, 6)
    set_aside_later(tmp_path, 2, 2)
    assert names(tmp_path) == {"checkpoint-2", "replaced-checkpoint-8", "replaced-checkpoint-6-2"}
    assert caplog.text.count("is deleted: save_total_limit is 2") == 2


def test_rotation_goes_by_step_and_keeps_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path, 2, 4, 6, 8, 10)
    (tmp_path / "checkpoint-best").mkdir()
    for step in (2, 4, 6, 8, 10):  # the clock was set back
        os.utime(tmp_path / f"checkpoint-{step}", (9000 - step, 9000 - step))
    monkeypatch.chdir(tmp_path.parent)
    best = f"./{tmp_path.name}/checkpoint-2"  # in other words than the directory
    rotate(tmp_path, 3, best, last=tmp_path / "checkpoint-10")
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-8", "checkpoint-10", "checkpoint-best"}
    rotate(tmp_path, 1, best, last=tmp_path / "checkpoint-8")
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-8", "checkpoint-best"}
    rotate(tmp_path, None, None, last=tmp_path / "checkpoint-8")
    assert len(names(tmp_path)) == 3


def test_a_trainer_that_goes_on_from_an_earlier_checkpoint(tmp_path: Path):
    """It sets the later ones aside, and takes the same steps again."""
    first = small_trainer(tmp_path, LowPrecisionCallback("mxfp4_aws"), max_steps=6, **SAVES)
    first.train()
    again = small_trainer(tmp_path, LowPrecisionCallback("mxfp4_aws"), max_steps=6, **SAVES)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "replaced-checkpoint-4", "replaced-checkpoint-6"}
    assert losses(again) == losses(first)


def test_a_torn_checkpoint_from_the_future_is_set_aside(tmp_path: Path):
    """Its time does not say that it is being written right now."""
    (tmp_path / "checkpoint-2").mkdir()
    os.utime(tmp_path / "checkpoint-2", (4e9, 4e9))
    began = time.monotonic()
    small_trainer(tmp_path, LowPrecisionCallback("bf16"))
    assert names(tmp_path) == {"torn-checkpoint-2"}
    assert time.monotonic() - began < STILL_WRITTEN


@pytest.mark.parametrize("by", ["callback", "trainer"])
def test_a_clock_that_is_set_back_deletes_no_new_checkpoint(by: str, tmp_path: Path):
    """The checkpoints of the run so far seem to be from the future."""
    settings: dict[str, Any] = {**SAVES, "save_total_limit": 2}
    small_trainer(tmp_path, LowPrecisionCallback("bf16"), max_steps=4, **settings).train()
    for number, step in enumerate((4, 2)):
        future = 4e9 + 100 * number
        os.utime(tmp_path / f"checkpoint-{step}", (future, future))
    callback = LowPrecisionCallback("bf16")
    trainer = small_trainer(tmp_path, callback, max_steps=8, **settings)
    train = trainer.train if by == "trainer" else lambda **resume: callback.train(trainer, **resume)
    train(resume_from_checkpoint=True)
    assert names(tmp_path) == {"checkpoint-6", "checkpoint-8"}


def test_the_best_checkpoint_is_kept_in_a_directory_of_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The greatest loss, that of checkpoint-2, counts as the best here."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "evaluated": prose(4), "load_best_model_at_end": True, "greater_is_better": True}
    settings: dict[str, Any] = {**SAVES, **best, "save_total_limit": 2}
    small_trainer(tmp_path, LowPrecisionCallback("bf16"), max_steps=4, **settings).train()
    monkeypatch.chdir(tmp_path.parent)
    small_trainer(Path(tmp_path.name), LowPrecisionCallback("bf16"), max_steps=8, **settings).train(resume_from_checkpoint=True)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-8"}


def test_a_new_run_in_the_directory_of_another_one(tmp_path: Path):
    """Its own first checkpoints are not the oldest ones there."""
    for steps in (6, 4):
        small_trainer(tmp_path, LowPrecisionCallback("bf16"), max_steps=steps, save_total_limit=2, **SAVES).train()
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "replaced-checkpoint-4", "replaced-checkpoint-6"}


def test_a_replay_sets_the_later_checkpoints_aside(tmp_path: Path):
    """Step 11 breaks; checkpoint-10 is too young to be trusted, and belongs to steps that are taken again."""
    trainer, taken = run_with_replay(tmp_path, NaNGradient, 10, save_steps=5)
    assert taken == ["checkpoint-5"]
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-10", "checkpoint-15", "checkpoint-16", "replaced-checkpoint-10"}
    assert trainer.state.global_step == 16


def test_a_trainer_that_resumes_after_its_last_step_takes_none(tmp_path: Path):
    """transformers alone takes one step too many. The run ends in the phase of its last step, the first one here."""
    precision = {"recipe": "mxfp4_aws", "schedule": [{"until": "4 steps", "recipe": "mxfp4"}, {"recipe": "bf16"}]}

    def make_trainer(steps: int) -> Trainer:
        return small_trainer(tmp_path, LowPrecisionCallback(precision), max_steps=steps, **SAVES)

    first = make_trainer(4)
    first.train()
    again = make_trainer(4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert first.model is not None
    assert again.model is not None
    state = again.model.state_dict()
    assert recipes_of(again.model) == recipes_of(first.model)
    assert not (tmp_path / "events.jsonl").exists()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    again.args.max_steps = 6  # the same Trainer goes on
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    told = (tmp_path / "events.jsonl").read_text()
    assert told.count("phase 2 of 2") == 1
    make_trainer(6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # the phase begins after this checkpoint
    assert (tmp_path / "events.jsonl").read_text() == told
