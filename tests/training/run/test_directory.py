"""The directory of a run, and the checkpoint that it resumes from."""

import json
from pathlib import Path

import pytest

from lowprec import UserError
from lowprec.files import keep_lines_until
from lowprec.training.checkpoint import files as checkpoint_files
from lowprec.training.checkpoint import run_lock
from lowprec.training.run import contents
from lowprec.training.run import directory as run_directory


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
    assert checkpoint_files.last_checkpoint(tmp_path) == whole


def test_resuming_without_a_directory_takes_the_last_run_that_has_a_checkpoint(tmp_path: Path):
    _checkpoint(tmp_path / "tiny" / "002", 4, "{}")
    expected = _checkpoint(tmp_path / "tiny" / "010", 2, "{}")
    (tmp_path / "tiny" / "011").mkdir()
    found = run_directory.locate("configs/tiny.yaml", {"resume_from_checkpoint": True}, root=tmp_path)
    assert found == (tmp_path / "tiny" / "010", expected)


def test_a_named_checkpoint_is_taken(tmp_path: Path):
    checkpoint = _checkpoint(tmp_path / "run", 4, "{}")
    assert run_directory.locate("x.yaml", {"resume_from_checkpoint": str(checkpoint)}) == (tmp_path / "run", checkpoint)
    with pytest.raises(UserError, match="no such checkpoint"):
        run_directory.locate("x.yaml", {"resume_from_checkpoint": str(tmp_path / "gone")})


def test_locating_makes_nothing_and_numbers_are_taken_once(tmp_path: Path):
    assert run_directory.locate("a/tiny.yaml", {}, root=tmp_path) == (None, None)
    assert list(tmp_path.iterdir()) == []
    first, second = (run_directory.prepare("a/tiny.yaml", {}, root=tmp_path)[0] for _ in range(2))
    assert (first, second) == (tmp_path / "tiny" / "001", tmp_path / "tiny" / "002")
    assert (second / run_lock.LOCK).is_file()
    run_directory.release(second)
    assert _names(second) == set()


def test_a_directory_of_other_files_is_not_a_run(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    assert run_directory.prepare("x.yaml", {"output_dir": str(tmp_path)}) == (tmp_path, None)


def test_a_run_goes_on_from_a_checkpoint_without_what_came_later(tmp_path: Path):
    """The result of the end stays known as the run's own while it is renamed: a kill in between leaves a run that resumes."""
    run = _finished(tmp_path)
    for step in (2, 6):
        _checkpoint(run, step, json.dumps({"global_step": step}))
    lines = ['{"step": 2, "loss": 1}', '{"step": 4, "loss": 1}', '{"step": 4, "train_runtime": 1}', '{"step": 4, "eval_loss": 1}']
    (run / run_directory.METRICS).write_text("\n".join(lines) + "\n")
    run_directory.go_on_from(run, run / "checkpoint-4", None)
    assert (run / run_directory.METRICS).read_text().splitlines() == lines[:2]
    left = {"checkpoint-2", "checkpoint-4", "replaced-checkpoint-6", "config.yaml", "metrics.jsonl"}
    assert _names(run) == left | {"replaced-model", "replaced-summary.json"}
    (run / ".summary.json").write_text('{"steps": 4}')  # an end that a kill cut short
    _folder(run / "model")
    run_directory.locate("x.yaml", {"output_dir": str(run), "resume_from_checkpoint": True})  # model/ is the run's own
    run_directory.go_on_from(run, run / "checkpoint-4", None)
    assert {"model", ".summary.json"} < _names(run)  # that end is written again
    run_directory.go_on_from(run, run / "checkpoint-2", None)
    assert _names(run) == left - {"checkpoint-4"} | {"replaced-checkpoint-4", "replaced-model", "replaced-summary.json"}


def test_a_replaced_checkpoint_is_resumed_from_in_another_directory(tmp_path: Path):
    """The metrics and the earlier checkpoints beside it are those of another history."""
    replaced = _checkpoint(tmp_path, 4, json.dumps({"global_step": 4})).rename(tmp_path / "replaced-checkpoint-4")
    resume = {"resume_from_checkpoint": str(replaced)}
    with pytest.raises(UserError, match="of steps that this run has taken again since; resume from it in another directory"):
        run_directory.locate("x.yaml", resume)
    other = tmp_path / "other"
    assert run_directory.locate("x.yaml", {**resume, "output_dir": str(other)}) == (other, replaced)


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path):
    path = tmp_path / run_directory.METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    keep_lines_until(tmp_path / run_directory.METRICS, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def _finished(directory: Path, **trainer: object) -> Path:
    """Write the files of a finished run of four steps into `directory`."""
    _checkpoint(directory, 4, '{"global_step": 4}')
    _folder(directory / "model")
    (directory / run_directory.CONFIG).write_text(f"trainer: {json.dumps(trainer)}")
    (directory / run_directory.SUMMARY).write_text('{"steps": 4}')
    return directory


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def _names(directory: Path) -> set[str]:
    """Return the names in a directory, without the lock that this process holds."""
    return {path.name for path in directory.iterdir()} - {run_lock.LOCK}


def test_a_model_of_the_users_own_is_not_a_run_and_is_not_overwritten(tmp_path: Path):
    """A run would write its own model there when it ends."""
    _folder(tmp_path / "model")
    for more in ({}, {"overwrite_output_dir": True}):
        with pytest.raises(UserError, match="model is not the model of a run that finished there") as refused:
            run_directory.prepare("x.yaml", {"output_dir": str(tmp_path), **more})
        assert "holds another run" not in str(refused.value)
    (tmp_path / run_directory.SUMMARY).write_text('{"title": "mine"}')
    with pytest.raises(UserError, match="is not the model of a run"):
        run_directory.prepare("x.yaml", {"output_dir": str(tmp_path), "overwrite_output_dir": True})
    assert _names(tmp_path) == {"model", run_directory.SUMMARY}


@pytest.mark.parametrize("resume", [True, "checkpoint-4"])
def test_a_run_that_resumes_does_not_overwrite_a_model_of_the_users_own(resume: bool | str, tmp_path: Path):
    _checkpoint(tmp_path, 4, '{"global_step": 4}')
    _folder(tmp_path / "model")
    trainer = {"output_dir": str(tmp_path), "resume_from_checkpoint": resume if resume is True else str(tmp_path / resume)}
    with pytest.raises(UserError, match="is not the model of a run that finished there"):
        run_directory.locate("x.yaml", trainer)
    (tmp_path / run_directory.SUMMARY).write_text('{"steps": 4}')
    assert run_directory.locate("x.yaml", trainer) == (tmp_path, tmp_path / "checkpoint-4")


def test_a_model_is_not_deleted_if_its_run_saves_no_model(tmp_path: Path):
    run = _finished(tmp_path / "run", save_strategy="no")
    with pytest.raises(UserError, match="is not the model of a run"):
        run_directory.prepare("x.yaml", {"output_dir": str(run), "overwrite_output_dir": True})
    run_directory.prepare("x.yaml", {"output_dir": str(run), "overwrite_output_dir": True, "save_strategy": "no"})
    assert _names(run) == {"model"}
    assert run_directory.prepare("x.yaml", {"output_dir": str(run), "save_strategy": "no"}) == (run, None)


def test_overwriting_deletes_the_files_of_runs_and_nothing_else(tmp_path: Path):
    run = _finished(tmp_path / "run")
    for name in (
        "torn-checkpoint-6",
        "replaced-checkpoint-6",
        "replaced-checkpoint-6-2",
        "replaced-model",
        ".deleted-checkpoint-2",
        "checkpoint-best",
        "mine",
    ):
        (run / name).mkdir()
    for name in ("config-4.yaml", "replaced-config-6.yaml", "replaced-summary.json", ".summary.json"):
        (run / name).write_text("{}")
    run_directory.prepare("x.yaml", {"output_dir": str(run), "overwrite_output_dir": True})
    assert _names(run) == {"checkpoint-best", "mine"}


def test_inputs_of_a_run_are_not_deleted(tmp_path: Path):
    run, store = _finished(tmp_path / "run"), _folder(tmp_path / "store")
    (run / "checkpoint-5").symlink_to(store)
    (tmp_path / "link").symlink_to(run)
    trainer = {"output_dir": str(run), "overwrite_output_dir": True}
    for read in ("run/model", "run/model/config.json", "link/model", "run/../run/checkpoint-4", "run/checkpoint-5"):
        with pytest.raises(UserError, match=r"trainer.overwrite_output_dir: this run reads .* would be deleted"):
            run_directory.prepare("x.yaml", trainer, reads=[tmp_path / read])
    assert _names(run) == {"checkpoint-4", "checkpoint-5", "model", run_directory.CONFIG, run_directory.SUMMARY}
    run_directory.prepare("x.yaml", trainer, reads=[store, tmp_path / "gone"])
    assert _names(run) == set()
    assert _names(store) == {"config.json"}


def test_the_checkpoint_to_resume_from_is_not_deleted(tmp_path: Path):
    """The checkpoint is named by a link elsewhere, so it counts as one of another run than the one that is overwritten."""
    run = _finished(tmp_path / "run")
    (tmp_path / "best").symlink_to(run / "checkpoint-4")
    trainer = {"output_dir": str(run), "overwrite_output_dir": True, "resume_from_checkpoint": str(tmp_path / "best")}
    with pytest.raises(UserError, match=r"this run reads .*best, and .*checkpoint-4 would be deleted"):
        run_directory.prepare("x.yaml", trainer)
    assert (run / "checkpoint-4").is_dir()


def test_a_checkpoint_behind_a_link_is_of_the_run_that_has_the_link(tmp_path: Path):
    run, store = _finished(tmp_path / "run"), _checkpoint(tmp_path / "store", 8, '{"global_step": 8}')
    link = run / "checkpoint-8"
    link.symlink_to(store)
    before = _names(run)
    for more in ({}, {"overwrite_output_dir": True}):
        trainer = {"output_dir": str(run), "resume_from_checkpoint": str(link), **more}
        assert run_directory.prepare("x.yaml", trainer) == (run, link)
        assert _names(run) == before
    (run / "checkpoint-9").symlink_to(tmp_path / "gone")
    run_directory.prepare("x.yaml", {"output_dir": str(run), "overwrite_output_dir": True})
    assert _names(run) == set()
    assert (store / "trainer_state.json").is_file()


def test_the_directory_of_a_checkpoint_named_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(_checkpoint(tmp_path, 4, '{"global_step": 4}'))
    assert run_directory.locate("x.yaml", {"resume_from_checkpoint": "."}) == (tmp_path, Path("."))


def test_a_path_that_cannot_be_deleted_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = _finished(tmp_path / "run")

    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(contents.shutil, "rmtree", fail)
    with pytest.raises(UserError, match=r"trainer.overwrite_output_dir: .*checkpoint-4 can't be deleted: Permission denied"):
        run_directory.prepare("x.yaml", {"output_dir": str(run), "overwrite_output_dir": True})
    assert (run / run_directory.CONFIG).is_file()


def test_the_configuration_in_a_runs_directory_resumes_that_run(tmp_path: Path):
    run = _finished(tmp_path / "somewhere")
    other = _checkpoint(tmp_path / "config" / "001", 2, '{"global_step": 2}')
    resume = {"resume_from_checkpoint": True}
    assert run_directory.locate(run / run_directory.CONFIG, resume, root=tmp_path) == (run, run / "checkpoint-4")
    assert run_directory.locate(tmp_path / run_directory.CONFIG, resume, root=tmp_path) == (other.parent, other)
    elsewhere = {**resume, "output_dir": str(other.parent)}
    assert run_directory.locate(run / run_directory.CONFIG, elsewhere, root=tmp_path) == (other.parent, other)
