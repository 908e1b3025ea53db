"""One process at a time writes a run: the lock of its directory, which ends with the process that holds it."""

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from lowprec import LowPrecisionCallback, UserError
from lowprec.training.checkpoint import run_lock
from lowprec.training.run import directory as run_directory
from tests.builders import small_trainer
from tests.processes import start

# A process that holds the lock of a directory, and its forked child, as a worker of a data loader is one.
_HOLDER = """
import os, signal, sys, time
from pathlib import Path
from lowprec.training.checkpoint import run_lock

folder = Path(sys.argv[1])
run_lock.hold(folder)
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
(folder / "child").write_text(str(child))
os.rename(folder / "child", folder / "ready")
time.sleep(60)
"""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_WAIT", 0.0)


def test_the_lock_ends_with_the_process_that_holds_it(tmp_path: Path, at_once: None):
    """A child that it forked does not keep it."""
    holder = start("-c", _HOLDER, str(tmp_path))
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = int((tmp_path / "ready").read_text())
    try:
        message = rf"process {holder.pid} on \S+ is writing the run in {tmp_path}; wait for its end"
        for look in (run_lock.hold, run_lock.check_not_held):
            with pytest.raises(UserError, match=message):
                look(tmp_path)
        (tmp_path / "checkpoint-2").mkdir()
        (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
        for given in ({"resume_from_checkpoint": True}, {"overwrite_output_dir": True}, {}):
            with pytest.raises(UserError, match=message):
                run_directory.prepare("x.yaml", {"output_dir": str(tmp_path), **given})
        (tmp_path / "checkpoint-4").mkdir()  # as if the holder were writing it: nobody else sets it aside
        before = sorted(path.name for path in tmp_path.iterdir())
        saves = small_trainer(tmp_path, LowPrecisionCallback("bf16"), save_strategy="steps", max_steps=1)
        with pytest.raises(UserError, match=message):
            saves.train()
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        holder.kill()
        os.kill(child, 0)  # it lives
        run_lock.check_not_held(tmp_path)
        run_lock.hold(tmp_path)
        run_lock.release(tmp_path)
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
    assert not (tmp_path / run_lock.LOCK).exists()


def test_one_process_may_hold_a_lock_several_times(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path)
    run_lock.hold(tmp_path)
    run_lock.hold(tmp_path / "link")
    run_lock.check_not_held(tmp_path)
    run_lock.release(tmp_path)
    assert (tmp_path / run_lock.LOCK).exists()
    run_lock.release(tmp_path)
    assert not (tmp_path / run_lock.LOCK).exists()
    run_lock.release(tmp_path)


def test_a_lock_whose_file_is_deleted_meanwhile_is_taken_on_the_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The holder deletes the file between another process's `open` and `flock`."""
    flock, deleted = fcntl.flock, []

    def delete_first(file: int, how: int) -> None:
        if not deleted:
            (tmp_path / run_lock.LOCK).unlink()
            deleted.append(file)
        flock(file, how)

    monkeypatch.setattr(run_lock.fcntl, "flock", delete_first)
    run_lock.hold(tmp_path)
    other = os.open(tmp_path / run_lock.LOCK, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
    run_lock.release(tmp_path)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def fail(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", fail)
    run_lock.hold(tmp_path)
    run_lock.release(tmp_path)
    assert "this file system has no locks (No locks available)" in caplog.text


def test_trainers_of_one_process_share_a_directory_one_after_the_other(tmp_path: Path):
    """Also after a training that failed, while its callback is still there."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    failed = LowPrecisionCallback("bf16")
    trainer = small_trainer(tmp_path, failed, **settings)
    trainer.training_step = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        trainer.train()
    assert (tmp_path / run_lock.LOCK).exists()
    for _ in range(2):
        small_trainer(tmp_path, LowPrecisionCallback("bf16"), **settings).train()
    del trainer, failed
    small_trainer(tmp_path / "none", LowPrecisionCallback("bf16"), max_steps=1).train()
    assert not (tmp_path / "none" / run_lock.LOCK).exists()
