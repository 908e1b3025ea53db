"""The commands and snippets of the README and the guides run as they are printed; only trainings are cut short."""

import re
import shlex
from pathlib import Path

import pytest

from tests.processes import ROOT, run

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = ["trainer.max_steps=1", "trainer.per_device_train_batch_size=2", "trainer.per_device_eval_batch_size=32", "data.max_bytes=60000"]


def _blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        blocks = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        found += [(page.name, block) for block in blocks]
    return found


COMMANDS = [(page, line) for page, block in _blocks("bash") for line in block.splitlines() if line.strip()]


def test_there_is_something_to_run():
    assert len(COMMANDS) >= 8
    assert len(_blocks("python")) >= 3


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command(page: str, command: str, tmp_path: Path):
    program, *arguments = shlex.split(command, comments=True)
    if program == "make":
        (target,) = arguments
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    # The command runs in another directory, so that nothing is written into the source tree.
    arguments = [str(ROOT / argument) if (ROOT / argument).is_file() else argument for argument in arguments]
    if program == "lowprec":
        shortened = SHORT if arguments[0] == "train" else []
        arguments = ["-m", "lowprec", *arguments, *shortened]
    else:
        assert program == "python"
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout


@pytest.mark.parametrize(("page", "code"), _blocks("python"))
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_snippet(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    prose = re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\((?!http)([^)#]+)\)", prose)
    assert all((page.parent / link).exists() for link in links), links
