"""trainers/pretrain.py runs a configured training, as `lowprec train` does."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.processes import ROOT, run
from tests.runs import make_corpus, overrides


def pretrain(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(str(ROOT / "trainers" / "pretrain.py"), *arguments, cwd=folder, WANDB_MODE="offline")


def test_a_shipped_configuration_trains_from_any_folder(tmp_path: Path):
    settings = overrides(make_corpus(tmp_path / "corpus"), trainer__max_steps=2, precision__recipe="mxfp8")
    result = pretrain(tmp_path, "llama-tiny-cpu", *settings)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "mxfp8 in 80.0% of the linear weights: 2 steps" in result.stdout
    summary = json.loads((tmp_path / "runs" / "llama-tiny-cpu" / "001" / "summary.json").read_text())
    assert (summary["recipe"], summary["steps"]) == ("mxfp8", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: pretrain.py CONFIG [key=value ...]"),
        (("trainer.max_steps=3",), "usage: pretrain.py CONFIG [key=value ...]"),
        (("llama-tiny-cup",), "llama-tiny-cup: no such file or shipped configuration; did you mean 'llama-tiny-cpu'?"),
    ],
)
def test_misuse_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path):
    result = pretrain(tmp_path, *arguments)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"pretrain.py: {message}"
    assert "Traceback" not in result.stderr
