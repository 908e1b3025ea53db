"""Damaged files: each file that a run reads, damaged in each way. One line names it, and no other numbers follow.

Most cases are checked where the command checks them, without a training. The marker `faults` runs the command on each of them.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from lowprec import LowPrecisionCallback, UserError
from lowprec.files import keep_lines_until
from lowprec.training.accelerate import prepare
from lowprec.training.checkpoint import manifest
from lowprec.training.checkpoint.files import damage, is_whole
from lowprec.training.checkpoint.folders import check_model, check_tokenizer
from lowprec.training.checkpoint.manifest import MANIFEST
from lowprec.training.checkpoint.structure import check_safetensors
from lowprec.training.checkpoint.torn import set_aside_torn
from lowprec.training.data.tokenizer import _wrap, byte_tokenizer
from lowprec.training.run.directory import go_on_from, locate
from tests.builders import counting, small_trainer, tiny_llama
from tests.processes import ROOT, lowprec
from tests.runs import CONFIG, losses, make_corpus, overrides

FILES = (
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    MANIFEST,
)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _other(path: Path) -> None:
    """Put the file of the checkpoint before in its place."""
    shutil.copy(path.parent.with_name("checkpoint-2") / path.name, path)


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


KINDS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped": flip,
    "foreign": _other,
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: _replace(path, Path.mkdir),
    "a link to nothing": lambda path: _replace(path, lambda at: at.symlink_to("nothing")),
    "a link to itself": lambda path: _replace(path, lambda at: at.symlink_to(at.name)),
    "a pipe": lambda path: _replace(path, os.mkfifo),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe no text"),
    "a list": lambda path: path.write_text("[1, 2]"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a huge header": lambda path: path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:]),
}
FORM = {kind: KINDS[kind] for kind in KINDS if kind not in ("flipped", "foreign", "missing", "longer")}
"""The kinds that show in the form of any file that is read."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run with checkpoints after steps 2 and 4, which tests copy."""
    folder = tmp_path_factory.mktemp("run")
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    small_trainer(folder, LowPrecisionCallback("bf16"), data=counting(8), **settings).train()
    return folder


def changes(source: Path, name: str, kind: str) -> bool:
    """Return whether this damage changes the file: some files are the same in both checkpoints."""
    own, other = ((source / checkpoint / name).read_bytes() for checkpoint in ("checkpoint-4", "checkpoint-2"))
    return kind != "foreign" or own != other


@dataclass
class Case:
    """A copy of a run whose last checkpoint has one damaged file."""

    run: Path
    checkpoint: Path


def damaged(source: Path, folder: Path, name: str, kind: str, *, without_manifest: bool = False) -> Case:
    """Return a copy of the run in `source`, below `folder`, with a damaged file."""
    copy = folder / f"{name} is {kind}".replace("/", "-")
    shutil.copytree(source, copy)
    checkpoint = copy / "checkpoint-4"
    if without_manifest:
        (checkpoint / MANIFEST).unlink()
    KINDS[kind](checkpoint / name)
    return Case(copy, checkpoint)


def is_one_line_about(name: str, error: UserError) -> bool:
    return "\n" not in str(error) and f"{name}: " in str(error)


@pytest.mark.parametrize("name", FILES)
def test_a_named_checkpoint_is_refused(name: str, run: Path, tmp_path: Path):
    """The command ends with this line and with 2: `locate` comes before anything is written."""
    for kind in KINDS:
        if (name == MANIFEST and kind in ("missing", "longer")) or not changes(run, name, kind):
            continue
        case = damaged(run, tmp_path, name, kind)
        with pytest.raises(UserError) as refusal:
            locate("config.yaml", {"resume_from_checkpoint": str(case.checkpoint)})
        assert "\n" not in str(refusal.value)
        # A manifest of another checkpoint speaks of the files that differ from it.
        assert f"{name}: " in str(refusal.value) or (name, kind) == (MANIFEST, "foreign"), f"{kind}: {refusal.value}"


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", MANIFEST])
def test_the_last_checkpoint_is_set_aside_for_the_one_before(name: str, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The command does it in `go_on_from`, with the lock of the run; a Trainer when it is made, unless a file changed just now."""
    for kind in ("cut short", "flipped", "a folder"):
        case = damaged(run, tmp_path, name, kind)
        settings = {"resume_from_checkpoint": True, "output_dir": str(case.run)}
        assert locate("config.yaml", settings) == (case.run, case.run / "checkpoint-2")
        assert set_aside_torn(case.run) == []
        caplog.clear()
        go_on_from(case.run, case.run / "checkpoint-2", None)
        (line,) = [record.message for record in caplog.records]
        assert f"checkpoint-4 is not whole: {name}: " in line
        assert line.endswith("the last whole one is checkpoint-2")
        assert not case.checkpoint.exists()
        torn = (case.run / "torn-checkpoint-4").rename(case.checkpoint)
        for path in (torn, *torn.rglob("*")):
            os.utime(path, (1e9, 1e9), follow_symlinks=False)
        ((aside, problem),) = set_aside_torn(case.run)
        assert aside == case.run / "torn-checkpoint-4"
        assert problem.startswith(f"{name}: ")


def test_no_whole_checkpoint_is_left(run: Path, tmp_path: Path):
    case = damaged(run, tmp_path, "optimizer.pt", "flipped")
    flip(case.run / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(UserError, match=r"no whole checkpoint in .*: checkpoint-4: optimizer\.pt: its content"):
        locate("config.yaml", {"resume_from_checkpoint": True, "output_dir": str(case.run)})


def test_manifests(run: Path, tmp_path: Path):
    """One of another checkpoint, of another format, with another step, with names outside of its folder, and none."""
    case = damaged(run, tmp_path, MANIFEST, "foreign")
    problem = damage(case.checkpoint)
    assert problem is not None
    own = json.loads((run / "checkpoint-4" / MANIFEST).read_text())
    for change, line in (
        ({"format": 2}, "has format 2, this version of lowprec reads 1"),
        ({"format": "1"}, "has format '1'"),
        ({"step": 2}, "is of step 2, trainer_state.json of 4"),
        ({"step": None}, "is of step None"),
        ({"step": [4]}, "its step is no number"),
        ({"files": ["model.safetensors"]}, "does not name files"),
        ({"files": {"model.safetensors": 12}}, "does not name files"),
        ({"files": {**own["files"], "../checkpoint-2/optimizer.pt": {"size": 1, "crc32": "00"}}}, "optimizer.pt: is missing"),
        ({"files": {**own["files"], "": {"size": 1, "crc32": "00"}}}, ": is missing"),
    ):
        (case.checkpoint / MANIFEST).write_text(json.dumps(own | change))
        assert line in str(damage(case.checkpoint)), change
    (case.checkpoint / MANIFEST).unlink()
    assert is_whole(case.checkpoint)  # as one of another program: its form is checked


def test_files_that_the_manifest_does_not_name(run: Path, tmp_path: Path):
    """A file that the Trainer would read changes the run; a user's own file does not."""
    for name in ("scaler.pt", "pytorch_model.bin", "adapter_model.safetensors"):
        copy = tmp_path / name
        shutil.copytree(run / "checkpoint-4", copy)
        shutil.copy(run / "checkpoint-2" / "scheduler.pt", copy / name)
        assert damage(copy) == f"{name}: does not belong to this checkpoint: {MANIFEST} does not name it"
    copy = tmp_path / "notes"
    shutil.copytree(run / "checkpoint-4", copy)
    (copy / "notes.txt").write_text("mine")
    assert damage(copy) is None
    assert manifest.unlisted(copy) == ["notes.txt"]


@pytest.mark.parametrize("name", [name for name in FILES if name not in (MANIFEST, "training_args.bin")])
def test_without_a_manifest_the_form_is_checked(name: str, run: Path, tmp_path: Path):
    """Checkpoints of earlier versions and of other programs."""
    for kind in FORM:
        if kind == "a huge header" and name not in ("model.safetensors", "trainer_state.json", "config.json"):
            continue  # those bytes belong to an entry of the archive that is named again at its end
        case = damaged(run, tmp_path, name, kind, without_manifest=True)
        problem = damage(case.checkpoint)
        assert problem is not None, kind
        assert problem.startswith(f"{name}: "), f"{kind}: {problem}"
    for kind in ("missing", *(["flipped"] if name == "optimizer.pt" else [])):
        case = damaged(run, tmp_path, name, kind, without_manifest=True)
        problem = damage(case.checkpoint)
        # config.json is not read when a run resumes.
        assert (problem is None) if name == "config.json" else str(problem).startswith(f"{name}: "), problem


def test_an_index_without_one_of_its_shards(tmp_path: Path):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    check_model(tmp_path, "model.path")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        UserError, match=rf"model\.path: .* is not whole: {shard.name}: is missing; model\.safetensors\.index\.json names it"
    ):
        check_model(tmp_path, "model.path")


@pytest.mark.parametrize("with_manifest", [True, False])
def test_models_and_tokenizers(with_manifest: bool, tmp_path: Path):
    source = tmp_path / "model"
    tiny_llama().save_pretrained(source)
    _wrap(byte_tokenizer()).save_pretrained(source)
    if with_manifest:
        manifest.write_manifest(source)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        for kind, make in (KINDS if with_manifest else FORM).items():
            if kind == "foreign":
                continue
            copy = tmp_path / f"{name} is {kind}"
            shutil.copytree(source, copy)
            make(copy / name)
            check = check_tokenizer if name.startswith("tokenizer") else check_model
            with pytest.raises(UserError) as refusal:
                check(copy, "model.path")
            assert is_one_line_about(name, refusal.value), f"{kind}: {refusal.value}"
            if name == "model.safetensors" and kind in FORM:
                assert check_safetensors(copy / name) is not None


@pytest.mark.parametrize("name", ["config.yaml", "plan.json", "metrics.jsonl", "events.jsonl", "summary.json"])
def test_files_of_a_run_that_it_could_not_write(name: str, run: Path, tmp_path: Path):
    for kind in ("a folder", "a link to nothing", "a link to itself", "a pipe"):
        copy = tmp_path / kind
        shutil.copytree(run, copy)
        (copy / name).write_text("{}")
        KINDS[kind](copy / name)
        with pytest.raises(UserError) as refusal:
            locate("x.yaml", {"resume_from_checkpoint": True, "output_dir": str(copy)})
        assert is_one_line_about(name, refusal.value), f"{kind}: {refusal.value}"


def test_a_damaged_config_of_a_run(run: Path, tmp_path: Path):
    for kind in ("no UTF-8", "a list", "nested"):
        copy = tmp_path / kind
        shutil.copytree(run, copy)
        (copy / "config.yaml").write_text("{}")
        KINDS[kind](copy / "config.yaml")
        with pytest.raises(UserError, match=r"config\.yaml"):
            locate("x.yaml", {"resume_from_checkpoint": True, "output_dir": str(copy)})


def test_damaged_lines_of_a_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The whole lines stay, and the others are counted; a kill may have cut the last one short."""
    log = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "loss": 2.0}', b"\xff\xfe", b"[1]", b'{"step": "2"}', b"[" * 100_000, b'{"step": 2}', b'{"step": 3}', b'{"st']
    log.write_bytes(b"\n".join(lines))
    keep_lines_until(log, 2)
    assert log.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2}\n'
    assert [record.message for record in caplog.records] == [f"{log}: 4 damaged lines are dropped"]


def _accelerated() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prepare(accelerator, model, optimizer, precision="bf16", steps=2)
    return accelerator


def test_checkpoints_of_accelerate(tmp_path: Path):
    source = tmp_path / "state"
    source.mkdir()
    (source / "mine.log").write_text("before")
    accelerator = _accelerated()
    accelerator.save_state(str(source))
    (source / "mine.log").write_text("a file of the program, which changes")
    accelerator.load_state(str(source))
    names = json.loads((source / MANIFEST).read_text())["files"]
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "lowprec_run.json"} == set(names)
    before = {name: value.clone() for name, value in accelerator._models[0].state_dict().items()}
    for name in names:
        for kind in ("empty", "cut short", "flipped", "missing", "a folder"):
            copy = tmp_path / f"{name} is {kind}"
            shutil.copytree(source, copy)
            KINDS[kind](copy / name)
            with pytest.raises(UserError) as refusal:
                accelerator.load_state(str(copy))
            assert is_one_line_about(name, refusal.value), f"{kind}: {refusal.value}"
    assert all(torch.equal(value, before[name]) for name, value in accelerator._models[0].state_dict().items())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_kill_leaves_the_checkpoint_of_accelerate_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A loop saves to one folder again and again. The folder is exchanged when the new checkpoint is complete."""
    accelerator = _accelerated()
    folder = tmp_path / "state"
    assert accelerator.save_state(str(folder)) == str(folder)
    first = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        accelerator._models[0].lm_head.weight.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.checkpointing.save", lambda *args, **settings: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            accelerator.save_state(str(folder))
    check_model(folder, "load_state")
    assert (folder / "model.safetensors").read_bytes() == first
    accelerator.save_state(output_dir=str(folder))
    check_model(folder, "load_state")
    assert (folder / "model.safetensors").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Killed(BaseException):
    """An exception that stands for a kill."""


# The command, on each case


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the corpus, and the directory of a run of the command with checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("command")
    corpus = make_corpus(folder / "corpus")
    _train(corpus, check=True, trainer__output_dir=str(folder / "run"), trainer__save_steps=2)
    return corpus, folder / "run"


def _train(corpus: Path, check: bool = False, **settings: Any) -> subprocess.CompletedProcess[str]:
    settings = {"trainer__max_steps": 4, **settings}
    return lowprec("train", str(CONFIG), *overrides(corpus, **settings), cwd=ROOT, check=check)


def _last_lines(result: subprocess.CompletedProcess[str], count: int = 1) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.strip()][-count:]


@pytest.mark.faults
@pytest.mark.parametrize("name", [*FILES, "tokenizer.json"])
def test_the_command_refuses_a_named_checkpoint(name: str, commanded: tuple[Path, Path], tmp_path: Path):
    corpus, source = commanded
    for kind in KINDS:
        if (name == MANIFEST and kind in ("missing", "longer")) or not changes(source, name, kind):
            continue
        case = damaged(source, tmp_path, name, kind)
        result = _train(corpus, trainer__resume_from_checkpoint=str(case.checkpoint), trainer__max_steps=6)
        assert result.returncode == 2, f"{kind}: {result.stderr[-2000:]}"
        assert "Traceback" not in result.stderr
        assert "interrupted" not in result.stderr
        (line,) = _last_lines(result)
        assert line.startswith("lowprec: trainer.resume_from_checkpoint: "), kind
        shutil.rmtree(case.run)


@pytest.mark.faults
@pytest.mark.parametrize("name", [*FILES, "tokenizer.json"])
def test_the_command_takes_the_checkpoint_before(name: str, commanded: tuple[Path, Path], tmp_path: Path):
    """The losses are those of the whole run, and a line names the file."""
    corpus, source = commanded
    for kind in KINDS:
        if (name == MANIFEST and kind in ("missing", "longer")) or not changes(source, name, kind):
            continue
        case = damaged(source, tmp_path, name, kind)
        result = _train(corpus, trainer__resume_from_checkpoint=True, trainer__output_dir=str(case.run))
        assert result.returncode == 0, f"{kind}: {result.stderr[-2000:]}"
        (line,) = [line for line in result.stderr.splitlines() if "checkpoint-4 is not whole: " in line]
        assert "the last whole one is checkpoint-2" in line
        assert losses(case.run) == losses(source), kind
        assert (case.run / "torn-checkpoint-4").is_dir()
        shutil.rmtree(case.run)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", MANIFEST])
def test_the_command_refuses_a_damaged_model(name: str, commanded: tuple[Path, Path], tmp_path: Path):
    corpus, source = commanded
    for kind, make in KINDS.items():
        if kind == "foreign" or (name == MANIFEST and kind in ("missing", "longer")):
            continue
        model = tmp_path / f"{name} is {kind}"
        shutil.copytree(source / "model", model)
        make(model / name)
        given = overrides(corpus, model__path=str(model), data__tokenizer=str(model), trainer__output_dir=str(tmp_path / "run"))
        given = [override for override in given if not override.startswith("model.overrides")]
        result = lowprec("train", str(CONFIG), "model.preset=null", "trainer.max_steps=1", *given)
        assert result.returncode == 2, f"{kind}: {result.stderr[-2000:]}"
        (line,) = _last_lines(result)
        assert line.startswith("lowprec: "), kind
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "run").exists()
