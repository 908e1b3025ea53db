"""Going back to checkpoints on disk (`guard.data: replay`): the choice of the checkpoint, and the state that survives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from lowprec import LowPrecisionCallback, UserError
from lowprec.errors import TrainingStopped
from tests.builders import prose, small_trainer, tiny_llama
from tests.training.control.test_guard_in_training import LAYER, Fault, NaNGradient, events

REPLAY = {"snapshot_every": 10, "warmup": 4, "window": 8, "data": "replay"}


class Poison(Fault):
    """An update that no gradient shows: the weights are NaN after the step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.active:
            with torch.no_grad():
                self.model.get_submodule(LAYER).weight.fill_(torch.nan)


def run(folder: Path, fault: type[Fault] | None, *steps: int, resume: Any = None, **settings: Any) -> tuple[Trainer, list[str]]:
    """Train, and return the Trainer and the names of the checkpoints that it went back to."""
    model = tiny_llama()
    callback = LowPrecisionCallback({"recipe": "mxfp4", "guard": REPLAY})
    faults = [] if fault is None else [fault(model, *steps)]
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 16, **settings}
    trainer = small_trainer(folder, callback, *faults, model=model, data=prose(100), **settings)
    train, taken = trainer.train, []

    def counted(resume_from_checkpoint: Any = None) -> Any:
        taken.append(resume_from_checkpoint)
        return train(resume_from_checkpoint=resume_from_checkpoint)

    trainer.train = counted
    callback.train(trainer, resume)
    return trainer, [Path(path).name for path in taken[1:]]


def test_the_end_of_an_epoch_saves_nothing_after_a_breach(tmp_path: Path):
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "evaluated": prose(4), "save_total_limit": 1, "max_steps": -1}
    trainer, taken = run(tmp_path, NaNGradient, 29, num_train_epochs=2, **settings)
    assert taken == ["checkpoint-25"]
    assert trainer.model.get_submodule(LAYER).weight.isfinite().all()
    assert all(record.get("eval_loss", 0) == record.get("eval_loss", 0) for record in trainer.state.log_history)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-50"]


def test_a_checkpoint_that_was_bad_already_is_not_gone_back_to(tmp_path: Path):
    trainer, taken = run(tmp_path, Poison, 7)  # the weights are bad after step 8, which is saved
    assert taken == ["checkpoint-4"]
    assert trainer.state.global_step == 16
    assert trainer.model.get_submodule(LAYER).weight.isfinite().all()


def test_a_repeated_breach_goes_further_back(tmp_path: Path):
    _, taken = run(tmp_path, NaNGradient, 12, 13, 14)  # one breach in each
    assert taken == ["checkpoint-8", "checkpoint-4", "checkpoint-4"]  # there is no older one
    _, taken = run(tmp_path / "again", type("Lasting", (NaNGradient,), {"on_step_begin": _always_at_12}), 12, max_steps=13, save_steps=3)
    assert taken == ["checkpoint-9", "checkpoint-6"]


def _always_at_12(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    self.count = getattr(self, "count", 0) + (state.global_step == 12)
    self.active = state.global_step == 12 and self.count < 3


def test_another_runs_checkpoints_are_not_gone_back_to(tmp_path: Path):
    run(tmp_path, None, save_steps=3)
    _, taken = run(tmp_path, NaNGradient, 10, save_steps=5)
    assert taken == ["checkpoint-5"]  # not checkpoint-9 of the run before


def test_the_checkpoint_that_a_run_was_resumed_from_may_lie_elsewhere(tmp_path: Path):
    run(tmp_path / "first", None, max_steps=8)
    _, taken = run(tmp_path / "second", NaNGradient, 7, resume=str(tmp_path / "first" / "checkpoint-4"))
    assert taken == ["checkpoint-4"]


@pytest.mark.parametrize(
    "settings, message", [({"save_strategy": "no"}, "save_strategy=no writes none"), ({"save_only_model": True}, "without the optimizer")]
)
def test_replay_needs_checkpoints_to_go_back_to(settings: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"replay goes back to checkpoints, but .*{message}"):
        run(tmp_path, None, **settings)


def test_no_checkpoint_yet(tmp_path: Path):
    with pytest.raises(TrainingStopped, match="no checkpoint before step 3"):
        run(tmp_path, NaNGradient, 2)
    assert events(tmp_path)


@pytest.mark.parametrize("by", ["callback", "trainer"])
def test_a_run_after_one_that_stopped_to_go_back_starts_afresh(by: str, tmp_path: Path):
    model = tiny_llama()
    callback = LowPrecisionCallback({"recipe": "mxfp4", "guard": REPLAY})
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6, "data": prose(100)}
    trainer = small_trainer(tmp_path, callback, NaNGradient(model, 2), model=model, **settings)
    if by == "callback":
        with pytest.raises(TrainingStopped, match="no checkpoint before step 3"):
            callback.train(trainer)
    else:
        trainer.train()
    controller = callback.controller
    assert controller.replay_before == 3
    assert controller.raised
    trainer = small_trainer(tmp_path, callback, **settings)
    trainer.train()
    assert trainer.state.global_step == 6
    assert (controller.raised, controller.recoveries, controller.events) == ({}, 0, [])
    assert controller.replay_before is None
    assert events(tmp_path) == []


def test_a_replay_by_the_trainer_itself_keeps_raised_layers_and_events(tmp_path: Path):
    model = tiny_llama()
    callback = LowPrecisionCallback({"recipe": "mxfp4", "guard": REPLAY})
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10, "data": prose(100)}
    trainer = small_trainer(tmp_path, callback, NaNGradient(model, 8), model=model, **settings)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 10
    assert callback.controller.recoveries == 1
    assert callback.controller.raised
    assert events(tmp_path)


def test_a_replay_to_the_very_beginning_keeps_raised_layers(tmp_path: Path):
    """The checkpoint was written before the first step."""

    class SavesAtOnce(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0 and not (tmp_path / "checkpoint-0").exists():
                trainer._save_checkpoint(trainer.model, None)
                callback.on_save(args, state, control, model=trainer.model)

    model = tiny_llama()
    callback = LowPrecisionCallback({"recipe": "mxfp4", "guard": REPLAY})
    data = prose(100)
    trainer = small_trainer(
        tmp_path, callback, SavesAtOnce(), NaNGradient(model, 2), model=model, data=data, save_strategy="steps", max_steps=6
    )
    callback.train(trainer)
    assert trainer.state.global_step == 6
    assert callback.controller.recoveries == 1
    assert callback.controller.raised


def test_resuming_without_a_checkpoint_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"No valid checkpoint found in output directory \("):
        run(tmp_path, None, resume=True)
