"""A checkpoint is written whole or not at all, and is checked against its manifest when it is loaded."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from lowprec import LowPrecisionCallback, UserError
from lowprec.errors import TrainingStopped
from lowprec.training.checkpoint import files as checkpoint_files
from lowprec.training.checkpoint import manifest
from lowprec.training.checkpoint.manifest import MANIFEST
from lowprec.training.control.replay import Replay
from tests.builders import counting, losses, small_trainer
from tests.processes import run, run_ranks

SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def trainer_of(folder: Path, **settings: Any) -> tuple[Trainer, LowPrecisionCallback]:
    callback = LowPrecisionCallback("mxfp4_aws")
    return small_trainer(folder, callback, **{**SAVES, **settings}), callback


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    """Return the directory of a finished run, which tests copy, and its losses."""
    folder = tmp_path_factory.mktemp("finished")
    trainer, callback = trainer_of(folder)
    callback.train(trainer)
    return folder, losses(trainer)


def test_the_manifest_names_all_files(finished: tuple[Path, dict[int, float]]):
    for checkpoint in checkpoint_files.checkpoints(finished[0]):
        named = json.loads((checkpoint / MANIFEST).read_text())
        assert named["step"] == checkpoint_files.step_of(checkpoint)
        assert {path.name for path in checkpoint.iterdir()} == {MANIFEST, *named["files"]}
        assert all((checkpoint / name).stat().st_size == entry["size"] for name, entry in named["files"].items())
        assert checkpoint_files.damage(checkpoint) is None
    assert not (finished[0] / "unfinished").exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_last_checkpoint_is_damaged(finished: tuple[Path, dict[int, float]], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The previous one is taken by either way to train, which is said, and the losses are the same."""
    for plain in (False, True):
        folder = tmp_path / str(plain)
        shutil.copytree(finished[0], folder)
        flip(folder / "checkpoint-6" / "optimizer.pt")
        shutil.rmtree(folder / "checkpoint-4")
        age(folder)
        caplog.clear()
        trainer, callback = trainer_of(folder)
        if plain:
            trainer.train(resume_from_checkpoint=True)
        else:
            callback.train(trainer, True)
        assert {step: loss for step, loss in losses(trainer).items() if step > 2} == {
            step: loss for step, loss in finished[1].items() if step > 2
        }
        (line,) = [record.message for record in caplog.records if "optimizer.pt" in record.message]
        assert "checkpoint-6 is not whole" in line
        assert "the last whole one is checkpoint-2" in line
        assert (folder / "torn-checkpoint-6").is_dir()


def age(folder: Path) -> None:
    """Make the files in `folder` old, so that no process can be writing them."""
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("plain", [False, True])
def test_a_named_checkpoint_is_damaged(plain: bool, finished: tuple[Path, dict[int, float]], tmp_path: Path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    trainer, callback = trainer_of(tmp_path)
    flip(tmp_path / "checkpoint-4" / "optimizer.pt")
    train = trainer.train if plain else lambda resume_from_checkpoint: callback.train(trainer, resume_from_checkpoint)
    with pytest.raises(UserError, match=r"checkpoint-4 is not whole: optimizer\.pt: its content is not what was written"):
        train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tests.builders import small_trainer
from lowprec import LowPrecisionCallback

torch.set_num_threads(1)
folder, what, resume, plain = Path(sys.argv[1]), *sys.argv[2:]
callback = LowPrecisionCallback("mxfp4_aws")
trainer = small_trainer(folder, callback, max_steps=6, save_strategy="steps", save_steps=2)

def kill_before(module, name, applies):
    inner = getattr(module, name)
    def killed(*args, **kwargs):
        if applies(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)
    setattr(module, name, killed)

kill_before(torch, "save", lambda value, path, *_: "checkpoint-4" in str(path) and what in str(path))
if what == "manifest":
    from lowprec.training.checkpoint import saving
    kill_before(saving, "write_manifest", lambda path, *_: "checkpoint-4" in str(path))
checkpoint = str(folder / resume) if resume else None
if plain:
    trainer.train(resume_from_checkpoint=checkpoint)
else:
    callback.train(trainer, checkpoint)
"""


@pytest.mark.parametrize(("what", "again"), [("optimizer", False), ("rng_state", True), ("manifest", True)])
def test_killed_while_it_writes_a_checkpoint(what: str, again: bool, finished: tuple[Path, dict[int, float]], tmp_path: Path):
    """The checkpoint has its name only when it is complete; one that is written again stays until then."""
    if again:
        shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    plain = "" if what == "optimizer" else "plain"
    process = run("-c", _KILLED, str(tmp_path), what, "checkpoint-2" if again else "", plain)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    assert (tmp_path / "unfinished" / "checkpoint-4").is_dir()
    assert all(map(checkpoint_files.is_whole, checkpoint_files.checkpoints(tmp_path)))
    trainer, callback = trainer_of(tmp_path)
    callback.train(trainer, True if not again else str(tmp_path / "checkpoint-2"))
    assert losses(trainer) == finished[1]
    assert not (tmp_path / "unfinished").exists()


def test_the_best_checkpoint_has_its_name_and_is_checked(tmp_path: Path):
    data = {"data": counting(8), "evaluated": counting(4), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    trainer, _ = trainer_of(tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=1, **data)
    trainer.train()
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert checkpoint_files.checkpoints(tmp_path) == [best]
    flip(best / "model.safetensors")
    with pytest.raises(UserError, match=r"^load_best_model_at_end .*checkpoint-4 is not whole: model\.safetensors: its content"):
        trainer._load_best_model()


class Own(Trainer):
    """A Trainer that looks for the checkpoint's folder under its name."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        (Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / "own.txt").write_text("own")


def test_a_class_of_ones_own_writes_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.builders.Trainer", Own)
    trainer, _ = trainer_of(tmp_path, max_steps=2)
    trainer.train()
    assert "own.txt" in json.loads((tmp_path / "checkpoint-2" / MANIFEST).read_text())["files"]
    assert checkpoint_files.is_whole(tmp_path / "checkpoint-2")


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save = torch.save

    def full(value: Any, path: Any, *args: Any) -> None:
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(value, path, *args)

    monkeypatch.setattr(torch, "save", full)
    trainer, _ = trainer_of(tmp_path)
    with pytest.raises(TrainingStopped, match=r"checkpoint-4 can't be written: .*No space left on device.*; the last whole .*checkpoint-2"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-2"]
    assert not list((tmp_path / "unfinished").glob("*"))


def test_going_back_passes_by_a_damaged_checkpoint(
    finished: tuple[Path, dict[int, float]], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    replay = Replay(LowPrecisionCallback("bf16").controller)
    replay._checkpoints = [tmp_path / f"checkpoint-{step}" for step in (2, 4, 6)]
    assert replay._last_good(9, None) == tmp_path / "checkpoint-6"
    flip(tmp_path / "checkpoint-6" / "optimizer.pt")
    assert replay._last_good(9, None) == tmp_path / "checkpoint-4"
    (line,) = [record.message for record in caplog.records]
    assert "checkpoint-6 is not gone back to: it is not whole: optimizer.pt: " in line


@pytest.mark.parametrize("name", ["plan.json", "events.jsonl"])
def test_a_folder_in_place_of_a_trainers_file(name: str, tmp_path: Path):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"^output_dir: .*{name}: is a folder"):
        trainer_of(tmp_path)[0].train()


_RANKS = """
import json, sys, torch
from pathlib import Path
from lowprec import LowPrecisionCallback, UserError
from lowprec.distributed.processes import name_the_cpu
from lowprec.training.checkpoint.files import is_whole
from lowprec.training.checkpoint.manifest import MANIFEST
from tests.builders import small_trainer

folder = Path(sys.argv[1])
callback = LowPrecisionCallback("bf16")
trainer = small_trainer(folder, callback, max_steps=4, save_strategy="steps", save_steps=2)
name_the_cpu(trainer.args)
rank = trainer.args.process_index
trainer.train()
last = folder / "checkpoint-4"
assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors"} <= set(json.loads((last / MANIFEST).read_text())["files"])
trainer.args.distributed_state.wait_for_everyone()
if rank == 0:
    content = bytearray((last / "rng_state_1.pth").read_bytes())
    content[100] ^= 1
    (last / "rng_state_1.pth").write_bytes(content)
trainer.args.distributed_state.wait_for_everyone()
for train in (trainer.train, lambda path: callback.train(trainer, path)):
    try:
        train(str(last))
    except UserError as error:
        assert "checkpoint-4 is not whole: rng_state_1.pth: its content" in str(error), error
    else:
        raise AssertionError("a damaged checkpoint was loaded")
callback.train(trainer, True)
assert trainer.state.global_step == 4 and is_whole(last)
(folder / f"done-{rank}").touch()
"""


def test_ranks_write_one_checkpoint_and_all_refuse_a_damaged_one(tmp_path: Path):
    """The manifest names the files of both ranks; without the damaged one, both resume from the checkpoint before."""
    run_ranks(_RANKS, tmp_path, str(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run").glob("done-*")) == ["done-0", "done-1"]


def test_a_file_that_may_not_be_read(finished: tuple[Path, dict[int, float]], monkeypatch: pytest.MonkeyPatch):
    def refused(path: Path, **_: Any) -> tuple[int, str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(manifest, "_checksum", refused)
    assert manifest.damage(finished[0] / "checkpoint-4") == "config.json: can't be read: Permission denied"
