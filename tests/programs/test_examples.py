"""Every example runs unchanged."""

from pathlib import Path

import pytest

from tests.processes import ROOT, run

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", [path for path in EXAMPLES if path.name != "hf_trainer.py"], ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path):
    """hf_trainer.py is not in the list because the test of the README runs it."""
    result = run(str(example), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout or "linear layers converted" in result.stderr


def test_examples_are_short():
    assert all(len(path.read_text().splitlines()) <= 20 for path in EXAMPLES)
