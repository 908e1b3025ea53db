"""trainers/loop.py refuses what it can't do; tests/training/test_accelerate.py shows that it resumes exactly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8_blokwise",), "loop.py: precision.recipe: unknown recipe 'fp8_blokwise'; did you mean 'fp8_blockwise'?"),
        (("--resume",), "loop.py: --resume: no checkpoint in runs/loop/checkpoint"),
        (("--recipe", "mxfp8"), "loop.py: error: unrecognized arguments: --recipe"),
    ],
)
def test_misuse_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path):
    command = [sys.executable, str(ROOT / "trainers" / "loop.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == message
    assert "Traceback" not in result.stderr
