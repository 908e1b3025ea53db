"""Imports go one way: each part of the package imports only parts that come before it, and none imports the programs built on them."""

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import lowprec

PACKAGE = Path(lowprec.__file__).parent

# Each row may import the rows above it; parts in one row may not import each other. `testing` is last: nothing imports it.
ORDER = (
    ("errors", "log"),
    ("config", "files"),
    ("formats",),
    ("quant",),
    ("gemm",),
    ("recipe",),
    ("nn",),
    ("conversion",),
    ("attention",),
    ("integrations",),
    ("distributed",),
    ("observe",),
    ("bench",),
    ("training",),
    ("cli",),
    ("__main__",),
    ("testing",),
)
# The order inside `training`, the largest part.
TRAINING = (
    ("file_names", "log"),
    ("checkpoint", "data", "optim"),
    ("control",),
    ("accelerate", "amp", "callback"),
    ("run",),
)
RANK = {part: rank for rank, row in enumerate(ORDER) for part in row}
TRAINING_RANK = {part: rank for rank, row in enumerate(TRAINING) for part in row}

HEAVY = ("torch", "transformers", "numpy", "pydantic", "ruamel", "triton")


def imports(path: Path, package: Path) -> list[tuple[int, str]]:
    """Return (line, full module name) of every import in a file, including those inside functions and `if TYPE_CHECKING`."""
    found = []
    inside = [package.name, *path.relative_to(package).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from lowprec import quant` names a part in its list
            found += [(node.lineno, f"{module}.{alias.name}" if module == package.name else module) for alias in node.names]
    return found


def violations(package: Path) -> list[str]:
    """Return every import in `package` that goes against the order, as 'file:line imports module: why'."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        own = relative.with_suffix("").parts
        for line, module in imports(path, package):
            place = f"{relative}:{line} imports {module}"
            root, *other = module.split(".")
            if root in ("trainers", "tests"):
                wrong.append(f"{place}: the package does not know its users")
            elif root != package.name:
                continue
            elif own == ("__init__",):
                wrong.append(f"{place}: `import lowprec` must stay cheap")
            elif (reason := upward(own, other)) is not None:
                wrong.append(f"{place}: {reason}")
    return wrong


def upward(own: Sequence[str], other: Sequence[str]) -> str | None:
    """Return the reason why a module may not import another one, both as parts of their names below `lowprec`; None if it may."""
    if list(other) == ["__version__"]:
        return None
    part, imported = own[0], other[0] if other else ""
    if imported == "training" == part:
        part, imported, rank = own[1], other[1] if len(other) > 1 else "", TRAINING_RANK
    else:
        rank = RANK
    if imported == part or rank.get(imported, len(rank)) < rank.get(part, -1):
        return None
    return f"{imported or 'the package itself'} does not come before {part}"


def test_every_part_has_its_place():
    assert _parts(PACKAGE) - {"__init__"} == set(RANK)
    assert _parts(PACKAGE / "training") - {"__init__"} == set(TRAINING_RANK)


def _parts(folder: Path) -> set[str]:
    return {path.name.removesuffix(".py") for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def test_imports_go_one_way():
    assert violations(PACKAGE) == []


def circles(package: Path) -> list[str]:
    """Return the pairs of modules that reach each other by imports, including imports inside functions and `if TYPE_CHECKING`."""
    files = {".".join([package.name, *path.relative_to(package).with_suffix("").parts]): path for path in package.rglob("*.py")}
    taken = {}
    for name, path in files.items():
        names = {module for _, module in imports(path, package)}
        names |= {f"{module}.{alias}" for module, alias in imported_names(path)}
        taken[name] = (names & files.keys()) - {name}
    reached = {name: set(others) for name, others in taken.items()}
    for middle in files:
        for name in files:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    return sorted(f"{a} and {b}" for a in files for b in reached[a] if a < b and a in reached[b])


def imported_names(path: Path) -> list[tuple[str, str]]:
    """Return (module, name) of every `from module import name`; the name may itself be a module."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    return [(node.module or "", alias.name) for node in nodes for alias in node.names]


def test_no_modules_import_each_other(tmp_path: Path):
    assert circles(PACKAGE) == []
    folder = tmp_path / "lowprec" / "quant"
    folder.mkdir(parents=True)
    (folder / "spec.py").write_text("from lowprec.quant import fake")
    (folder / "fake.py").write_text("def f():\n    import lowprec.quant.qtensor")
    (folder / "qtensor.py").write_text("from lowprec.quant.spec import OperandSpec")
    assert len(circles(tmp_path / "lowprec")) == 3


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("formats/element.py", "from lowprec.quant import quantize", "quant does not come before formats"),
        ("nn/linear.py", "def f():\n    import trainers.pretrain", "the package does not know its users"),
        ("nn/linear.py", "from lowprec import conversion", "conversion does not come before nn"),
        ("gemm/base.py", "from ..recipe import Recipe", "recipe does not come before gemm"),
        ("config/schema.py", "from lowprec.conversion.plan import Plan", "conversion does not come before config"),
        ("conversion/convert.py", "import lowprec", "the package itself does not come before conversion"),
        ("attention/hf.py", "from lowprec.integrations.liger import plan_liger", "integrations does not come before attention"),
        ("training/control/guard.py", "from lowprec.training.callback import STATE", "callback does not come before control"),
        ("training/optim/adamw.py", "from lowprec.training.data.cache import build_once", "data does not come before optim"),
        ("quant/spec.py", "from lowprec.testing import sqnr_db", "testing does not come before quant"),
        ("quant/spec.py", "import lowprec.unheard_of", "unheard_of does not come before quant"),
        ("__init__.py", "from lowprec.errors import UserError", "`import lowprec` must stay cheap"),
    ],
)
def test_the_walk_finds_what_it_looks_for(tmp_path, file, text, message):
    path = tmp_path / "lowprec" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (found,) = violations(tmp_path / "lowprec")
    assert found.endswith(message)


@pytest.mark.parametrize(
    "file, text",
    [
        ("quant/spec.py", "from lowprec.formats.element import ElementFormat\nfrom lowprec.errors import UserError"),
        ("quant/spec.py", "from lowprec.quant.qtensor import QTensor\nfrom .qtensor import QTensor\nimport torch"),
        ("testing/cases.py", "from lowprec.conversion.convert import convert"),
    ],
)
def test_the_walk_lets_the_rest_pass(tmp_path, file, text):
    path = tmp_path / "lowprec" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert violations(tmp_path / "lowprec") == []


def run(code: str) -> list[str]:
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return out.stdout.split()


def test_importing_the_package_imports_nothing_heavy():
    assert run(f"import sys, lowprec; dir(lowprec); print(*[name for name in {HEAVY} if name in sys.modules])") == []


def test_converting_a_plain_model_needs_no_transformers():
    code = "import sys, torch, lowprec; lowprec.convert(torch.nn.Sequential(torch.nn.Linear(8, 8)), 'mxfp8')"
    assert run(f"{code}; print(*[name for name in ('transformers', 'lowprec.training', 'lowprec.testing') if name in sys.modules])") == []


def test_every_public_name_exists():
    assert dir(lowprec) == sorted(lowprec.__all__)
    for name in lowprec.__all__:
        assert getattr(lowprec, name) is not None
    with pytest.raises(AttributeError, match="module 'lowprec' has no attribute 'quantise'"):
        lowprec.quantise  # noqa: B018
