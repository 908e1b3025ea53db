"""trainers/loop.py refuses what it can't do; tests/training/test_accelerate.py shows that it resumes exactly."""

from pathlib import Path

import pytest

from tests.processes import ROOT, run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8_blokwise",), "loop.py: precision.recipe: unknown recipe 'fp8_blokwise'; did you mean 'fp8_blockwise'?"),
        (("--resume",), "loop.py: --resume: no checkpoint in runs/loop/checkpoint"),
        (("--recipe", "mxfp8"), "loop.py: error: unrecognized arguments: --recipe"),
    ],
)
def test_misuse_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path):
    result = run(str(ROOT / "trainers" / "loop.py"), *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == message
    assert "Traceback" not in result.stderr
