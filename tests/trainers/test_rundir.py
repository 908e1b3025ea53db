"""Where a run writes, and which checkpoint it goes on from."""

import json
from pathlib import Path

import pytest

from lowprec import UserError
from trainers import rundir


def _checkpoint(directory: Path, step: int, state: str | None = None) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_half_written_checkpoints_are_not_taken(tmp_path: Path):
    whole = _checkpoint(tmp_path, 9, json.dumps({"global_step": 9}))
    _checkpoint(tmp_path, 20)  # killed before its last file
    _checkpoint(tmp_path, 30, '{"global_st')  # killed in the middle of it
    _checkpoint(tmp_path, 5, json.dumps({"global_step": 5}))
    (tmp_path / "checkpoint-best").mkdir()
    assert rundir.last_checkpoint(tmp_path) == whole


def test_resuming_without_a_directory_takes_the_last_run_that_has_a_checkpoint(tmp_path: Path):
    _checkpoint(tmp_path / "tiny" / "002", 4, "{}")
    expected = _checkpoint(tmp_path / "tiny" / "010", 2, "{}")
    (tmp_path / "tiny" / "011").mkdir()
    found = rundir.locate("configs/tiny.yaml", {"resume_from_checkpoint": True}, root=tmp_path)
    assert found == (tmp_path / "tiny" / "010", expected)


def test_a_named_checkpoint_is_taken(tmp_path: Path):
    checkpoint = _checkpoint(tmp_path / "run", 4, "{}")
    assert rundir.locate("x.yaml", {"resume_from_checkpoint": str(checkpoint)}) == (tmp_path / "run", checkpoint)
    with pytest.raises(UserError, match="no such checkpoint"):
        rundir.locate("x.yaml", {"resume_from_checkpoint": str(tmp_path / "gone")})


def test_locating_makes_nothing_and_numbers_are_taken_once(tmp_path: Path):
    assert rundir.locate("a/tiny.yaml", {}, root=tmp_path) == (None, None)
    assert list(tmp_path.iterdir()) == []
    first, second = (rundir.prepare("a/tiny.yaml", {}, root=tmp_path)[0] for _ in range(2))
    assert (first, second) == (tmp_path / "tiny" / "001", tmp_path / "tiny" / "002")


def test_a_directory_of_other_things_is_no_run(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    assert rundir.prepare("x.yaml", {"output_dir": str(tmp_path)}) == (tmp_path, None)


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path):
    path = tmp_path / rundir.METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    rundir.keep_lines_until(tmp_path / rundir.METRICS, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
