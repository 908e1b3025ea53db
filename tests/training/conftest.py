"""Fixtures that the tests of training share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lowprec.cli.main import main


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the command, in this process and an empty directory, and return the one line with which it refuses."""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        assert stopped.value.code == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        (line,) = printed.err.strip().splitlines()
        assert line.startswith("lowprec: ")
        return line

    return run
