"""A resumed run is the same run, bit for bit: with recipes that keep state, in every phase, with the guard's memory, and after a kill."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from lowprec import LowPrecisionCallback
from lowprec.nn import LowPrecisionLinear
from lowprec.training.checkpoint import files as checkpoint_files
from lowprec.training.checkpoint.torn import STILL_WRITTEN
from lowprec.training.control.controller import PrecisionController
from tests.builders import losses, prose, small_trainer, tiny_llama
from tests.processes import run

PHASES = [{"until": "25%", "recipe": "bf16"}, {"until": "75%"}, {"recipe": {"base": "mxfp4_aws", "fprop": "bf16"}}]
GUARD = {"snapshot_every": 4, "warmup": 4, "window": 8}


def trainer_of(folder: Path, precision: Any, *more: TrainerCallback, model: Any = None, **settings: Any) -> Trainer:
    given = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2, "data": prose(200), **settings}
    return small_trainer(folder, LowPrecisionCallback(precision), *more, model=model, **given)


def assert_same_run(first: Trainer, again: Trainer, step: int) -> None:
    """Check that `again`, which resumed after `step`, is the same run as `first`."""
    after = {at: loss for at, loss in losses(first).items() if at > step}
    assert after
    assert {at: loss for at, loss in losses(again).items() if at > step} == after
    state = again.model.state_dict()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("recipe", ["bf16", "fp8_delayed", "mxfp4_aws", "qat_int8dyn_int4"])
def test_a_resumed_run_is_the_same_run(recipe: str, tmp_path: Path):
    first = trainer_of(tmp_path, recipe, max_steps=6)
    first.train()
    torch.manual_seed(99)  # a run that resumes exactly does not depend on it
    again = trainer_of(tmp_path, recipe, model=tiny_llama(seed=7), max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_run(first, again, 4)


def test_in_the_middle_of_each_phase_and_at_its_ends(tmp_path: Path):
    precision = {"recipe": "mxfp4_aws", "schedule": PHASES, "guard": GUARD, "probe_every": 5}
    first = trainer_of(tmp_path, precision, max_steps=12, save_steps=1, save_total_limit=20)
    first.train()
    for step in (1, 3, 6, 8, 9, 11):
        again = trainer_of(tmp_path, precision, model=tiny_llama(seed=7), max_steps=12, save_strategy="no")
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(first, again, step)


class NaNOnce(TrainerCallback):
    """A fault: NaN in the gradients of one layer, in one step."""

    def __init__(self, model: Any, step: int) -> None:
        self.step, self.active = step, False
        model.model.layers[0].mlp.up_proj.weight.register_hook(lambda g: g * torch.nan if self.active else g)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.active = state.global_step == self.step


@pytest.mark.parametrize("step", [6, 10])
def test_the_guards_memory_is_in_the_checkpoint(step: int, tmp_path: Path):
    """A run that resumes before a breach meets it in the same way. In one that resumes after it, the raised layer stays raised."""
    precision = {"recipe": "mxfp4_aws", "guard": GUARD}

    def run(seed: int, checkpoint: str | None = None, **settings: Any) -> Trainer:
        model = tiny_llama(seed)
        trainer = trainer_of(tmp_path, precision, NaNOnce(model, 8), model=model, max_steps=13, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    first, told = run(0), (tmp_path / "events.jsonl").read_text()
    assert told.count("\n") == 3
    again = run(7, str(tmp_path / f"checkpoint-{step}"), save_strategy="no")
    assert_same_run(first, again, step)
    assert (tmp_path / "events.jsonl").read_text() == told
    raised = {name: m.recipe.name for name, m in again.model.named_modules() if isinstance(m, LowPrecisionLinear)}
    assert raised["model.layers.0.mlp.up_proj"] == "fp8_blockwise"


def test_a_checkpoint_without_the_callbacks_state_is_taken(tmp_path: Path):
    """The checkpoint is from a run without the callback: the resumed run has the precision that it is given now."""
    plain = small_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    plain.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert PrecisionController.name not in json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    trainer = small_trainer(tmp_path, LowPrecisionCallback({"recipe": "mxfp4_aws", "guard": True}), max_steps=4)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
    assert losses(trainer)[4] != losses(plain)[4]


def test_transformers_restoring_callbacks_does_not_disturb_ours(tmp_path: Path):
    first = trainer_of(tmp_path, "mxfp4_aws", max_steps=4)
    first.train()
    again = trainer_of(tmp_path, "mxfp4_aws", max_steps=4, restore_callback_states_from_checkpoint=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_run(first, again, 2)


_KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
import torch
from tests.builders import small_trainer, prose
from lowprec import LowPrecisionCallback
from lowprec.training.checkpoint import saving

saving._saves_as_known = lambda trainer: False  # as for a class of one's own: the Trainer writes in place
torch.set_num_threads(1)
saves = {"save_strategy": "steps", "save_steps": 2}
trainer = small_trainer(Path(sys.argv[1]), LowPrecisionCallback("mxfp4_aws"), max_steps=6, data=prose(100), **saves)
save, what = torch.save, sys.argv[2]

def killed(value, path, *args, **kwargs):
    if "checkpoint-4" in str(path) and what in str(path):
        save(value, path, *args, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    save(value, path, *args, **kwargs)

torch.save = killed
if what == "trainer_state":
    state = type(trainer.state)
    own = state.save_to_json
    def to_json(self, path):
        if "checkpoint-4" in path:
            Path(path).write_text('{"global_step": 4, "log_hist')
            os.kill(os.getpid(), signal.SIGKILL)
        own(self, path)
    state.save_to_json = to_json
trainer.train()
"""


@pytest.mark.parametrize("what", ["optimizer", "rng_state", "trainer_state"])
def test_killed_while_it_writes_a_checkpoint(what: str, tmp_path: Path):
    """The run resumes from the checkpoint before, also if the Trainer looks for the last one."""
    process = run("-c", _KILLED_WHILE_WRITING, str(tmp_path), what)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    torn = tmp_path / "checkpoint-4"
    assert torn.is_dir()
    assert checkpoint_files.last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    for path in (torn, *torn.iterdir()):  # as if some time had passed
        os.utime(path, (time.time() - 60, time.time() - 60))

    def trainer(folder: Path) -> Trainer:
        return small_trainer(folder, LowPrecisionCallback("mxfp4_aws"), max_steps=6, save_strategy="steps", save_steps=2, data=prose(100))

    again = trainer(tmp_path)
    assert not torn.exists()
    assert (tmp_path / "torn-checkpoint-4").is_dir()
    again.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert_same_run(whole, again, 2)


def test_a_checkpoint_that_is_being_written_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The callback waits for its end."""
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    writer = threading.Timer(1.0, lambda: (checkpoint / "trainer_state.json").write_text('{"global_step": 4}'))
    writer.start()
    small_trainer(tmp_path, LowPrecisionCallback("bf16"))
    writer.join()
    assert checkpoint_files.is_whole(checkpoint)
    assert [record.message for record in caplog.records if "may be written right now" in record.message]


def test_a_checkpoint_that_was_cut_short_just_now_is_not_resumed_from(tmp_path: Path):
    """An interrupted run is often started again at once."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    small_trainer(tmp_path, LowPrecisionCallback("bf16"), max_steps=2, **settings).train()
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"half of it")
    began = time.monotonic()
    again = small_trainer(tmp_path, LowPrecisionCallback("bf16"), max_steps=4, **settings)
    assert time.monotonic() - began < STILL_WRITTEN + 3
    assert (tmp_path / "torn-checkpoint-4").is_dir()
    again.train(resume_from_checkpoint=True)
    assert sorted(losses(again)) == [1, 2, 3, 4]
