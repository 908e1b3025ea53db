"""Every example runs as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", [path for path in EXAMPLES if path.name != "hf_trainer.py"], ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path):
    """hf_trainer.py is missing here because the test of the README runs it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, str(example)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout or "linear layers converted" in result.stderr


def test_examples_are_short():
    assert all(len(path.read_text().splitlines()) <= 20 for path in EXAMPLES)
