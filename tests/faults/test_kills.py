"""Runs that are killed by SIGKILL, half of the times inside of their file operations, and resume until they end.

Each ends as the run that was never killed: the same losses, metrics and events, the same weights in `model/`, the same validation loss. A
failure says its seed and what was done to the run. Kills at file operations repeat exactly; others come at seeded times.
"""

import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.processes import start
from tests.runs import CONFIG, make_corpus, overrides

STEPS, SAVED = 16, 2
TINY = (
    "model.overrides={num_hidden_layers: 1, hidden_size: 64, intermediate_size: 128, num_attention_heads: 2, num_key_value_heads: 2}",
    "data.seq_len=32",
)
GUARD = {"snapshot_every": 10, "warmup": 4, "window": 8, "data": "replay"}
TIMES = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")
"""Keys of metrics that depend on the clock."""


@dataclass
class Kind:
    """A kind of runs, with the one that is never killed."""

    name: str
    folder: Path
    """Folder of the run that is never killed; the others are beside it."""
    operations: int
    """Number of file operations of that run."""
    seconds: float
    """Duration of that run, or of a shorter one since."""

    def arguments(self, folder: Path, *more: str) -> list[str]:
        return _arguments(self.name, folder, *more)


def _arguments(kind: str, folder: Path, *more: str) -> list[str]:
    """Return the arguments of a run in `folder`."""
    if kind == "trainer":
        return [str(folder)]
    precision = {"recipe": "mxfp4", "guard": GUARD} if kind == "replay" else {"recipe": "mxfp4_aws"}
    settings = {"max_steps": STEPS, "save_steps": SAVED, "save_total_limit": 3, "output_dir": str(folder), "learning_rate": 3e-3}
    if kind == "train":
        settings["logging_steps"] = 3  # checkpoints lie between two logs
    given = {f"trainer__{key}": value for key, value in settings.items()}
    return ["train", str(CONFIG), *overrides(folder.parent.parent / "corpus", precision=precision, **given), *TINY, *more]


def _start(
    kind: str, arguments: list[str], folder: Path, *, kill_at: int | None = None, cut: bool = False, count_to: Path | None = None
) -> Any:
    count = None if count_to is None else str(count_to)
    spec = {"kind": kind, "folder": str(folder), "kill_at": kill_at, "cut": cut, "count_to": count}
    return start("-m", "tests.faults.killed", json.dumps(spec), *arguments)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a kind's name to the kind, whose run is trained when it is first asked for."""
    root, made = tmp_path_factory.mktemp("kills"), {}
    make_corpus(root / "corpus")

    def get(name: str) -> Kind:
        if name not in made:
            folder = root / name / "whole"
            folder.mkdir(parents=True)
            began = time.monotonic()
            result = _start(name, _arguments(name, folder), folder, count_to=root / name / "count").wait()
            assert result.returncode == 0, result.stderr[-4000:]
            made[name] = Kind(name, folder, int((root / name / "count").read_text()), time.monotonic() - began)
        return made[name]

    return get


class Chain:
    """A run that is killed several times."""

    def __init__(self, kind: Kind, seed: int, kills: int) -> None:
        self.kind, self.kills, self.random = kind, kills, random.Random(seed)
        self.folder = kind.folder.parent / f"killed-{seed}"
        self.killed = {"save": 0, "time": 0}
        self.story: list[str] = []

    def run(self) -> None:
        """Start the run, kill it `kills` times, and let it end."""
        for _ in range(3 * self.kills):  # some of them end before they are killed
            if sum(self.killed.values()) == self.kills or self._is_over():
                break
            if self._go_on(kills=True):
                break
        if not self._is_over():
            assert self._go_on(kills=False), "it did not end"

    def _go_on(self, *, kills: bool) -> bool:
        """Start or resume the run; return True if it has ended."""
        more = self._how_to_resume()
        arguments = self.kind.arguments(self.folder, *more)
        way = min(("save", "time"), key=lambda way: (self.killed[way], self.random.random())) if kills else None
        left = 1 - self._last_step() / STEPS
        kill_at = None
        if way == "save":
            most = max(1, int(self.kind.operations * left))
            late = self.random.random() < 0.25  # the end has few operations, but each its own trap
            kill_at = self.random.randint(max(1, most - 40) if late else 1, most)
        cut = self.random.random() < 0.5
        began = time.monotonic()
        program = _start(self.kind.name, arguments, self.folder, kill_at=kill_at, cut=cut)
        if way == "time":
            seconds = self.random.uniform(0, self.kind.seconds * (0.4 + 0.6 * left))
            deadline = time.monotonic() + seconds
            while program.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            program.kill()
        result = program.wait()
        if result.returncode == 0:  # other programs may have slowed the first run down
            self.kind.seconds = min(self.kind.seconds, (time.monotonic() - began) / max(left, 0.5))
        self.story.append(f"{' '.join(more) or 'start'}: {way} {kill_at or ''}{' cut' if cut else ''} -> {result.returncode}")
        assert result.returncode in ((0, -9) if kills else (0,)), result.stderr[-4000:]
        assert "Traceback" not in result.stderr, result.stderr[-4000:]
        if result.returncode == -9 and way is not None:
            self.killed[way] += 1
        return result.returncode == 0

    def _checkpoints(self) -> list[Path]:
        found = [path for path in self.folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def _last_step(self) -> int:
        return int(self._checkpoints()[-1].name.split("-")[1]) if self._checkpoints() else 0

    def _how_to_resume(self) -> list[str]:
        if self.kind.name == "trainer" or not self.folder.exists():
            return []
        found = self._checkpoints()
        if not found:
            return ["trainer.overwrite_output_dir=true"]
        if len(found) > 1 and self.random.random() < 0.35:  # an earlier one: the later ones are taken again
            return [f"trainer.resume_from_checkpoint={self.random.choice(found[:-1])}"]
        return ["trainer.resume_from_checkpoint=true"]

    def _is_over(self) -> bool:
        return (self.folder / ("weights.safetensors" if self.kind.name == "trainer" else "summary.json")).exists()

    def check(self) -> None:
        """Assert that the run has ended as the one that was never killed."""
        whole, killed = self.kind.folder, self.folder
        if self.kind.name == "trainer":
            assert json.loads((killed / "losses.json").read_text()) == json.loads((whole / "losses.json").read_text())
            assert (killed / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
        else:
            assert _records(killed / "metrics.jsonl") == _records(whole / "metrics.jsonl")
            if self.kind.name == "replay":
                assert (killed / "events.jsonl").read_text() == (whole / "events.jsonl").read_text()
            assert (killed / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
            assert _summary(killed) == _summary(whole)
            assert {path.name for path in (killed / "model").iterdir()} == {path.name for path in (whole / "model").iterdir()}
            assert not (killed / "unfinished").exists()
        assert [path.name for path in self._checkpoints()] == sorted(
            (path.name for path in whole.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1])
        )


def _records(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def _summary(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    timed = ("tokens_per_second", "peak_memory_bytes", "wall_s", "output_dir")
    return {key: value for key, value in summary.items() if key not in timed}


def _kill(kind: Kind, seed: int, kills: int) -> Chain:
    chain = Chain(kind, seed, kills)
    try:
        chain.run()
        chain.check()
    except AssertionError as error:
        raise AssertionError(f"{kind.name}, seed {seed}: {'; '.join(chain.story)}\n{error}") from None
    shutil.rmtree(chain.folder)
    return chain


@pytest.mark.parametrize(("name", "seed"), [("train", 1), ("replay", 2)])
def test_a_killed_run_ends_as_the_one_that_was_never_killed(name: str, seed: int, kinds: Any):
    assert sum(_kill(kinds(name), seed, kills=2).killed.values())


@pytest.mark.faults
def test_two_hundred_kills(kinds: Any):
    counted = {"save": 0, "time": 0}
    seed = 100
    while sum(counted.values()) < 200:
        seed += 1
        chain = _kill(kinds(("train", "replay", "train", "replay", "trainer")[seed % 5]), seed, kills=4)
        for way, number in chain.killed.items():
            counted[way] += number
    print(f"{counted['save']} kills in file operations, {counted['time']} at other moments, {seed - 100} runs")
    assert counted["save"] >= 80
