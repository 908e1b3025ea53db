"""The paths and dotted names of the project that the pages print in backticks exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# A path ends in a suffix or in a slash: `lowprec/plan`, for one, is a key of Weights & Biases.
PATH = re.compile(r"(?<![\w./-])(?:lowprec|examples|benchmarks|tests|docs)/(?:[\w.-]+/)*(?:[\w-]+\.\w+)?(?![\w/])")
NAME = re.compile(r"(?<![\w./-])lowprec(?:\.[A-Za-z_]\w*)+")


def code_of(page: Path) -> str:
    """Return the text in backticks of a page, one piece a line. Fenced blocks are left out: other tests run them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return "\n".join(" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", prose))


def exists(name: str) -> bool:
    """Return True if `name` is a module, or an attribute of the longest part of it that is a module."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path):
    missing = [path for path in PATH.findall(code_of(page)) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_dotted_names_exist(page: Path):
    missing = [name for name in NAME.findall(code_of(page)) if not exists(name)]
    assert not missing


def test_names_and_paths_are_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("`lowprec/errors.py` and `lowprec.convert(model)`, `lowprec/plan`, `lowprec/none.py`\n```python\nlowprec.gone\n```\n")
    assert PATH.findall(code_of(page)) == ["lowprec/errors.py", "lowprec/none.py"]
    assert NAME.findall(code_of(page)) == ["lowprec.convert"]
    assert exists("lowprec.convert")
    assert exists("lowprec.errors.UserError")
    assert not exists("lowprec.errors.Nothing")
    assert not exists("lowprec.nothing")
