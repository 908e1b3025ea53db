"""Imports go one way: each part of the package imports only parts that come before it, and the package never imports the trainers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowprec

PACKAGE = Path(lowprec.__file__).parent

# Each row may import the rows above it; parts in one row may not import each other. `testing` is last: nothing imports it.
ORDER = (
    ("errors",),
    ("files", "schema", "yaml12"),
    ("formats",),
    ("quant",),
    ("gemm",),
    ("recipe",),
    ("nn",),
    ("config", "payoff", "plan"),
    ("fusion", "weights"),
    ("conversion",),
    ("attention", "bench", "kernels", "observe"),
    ("testing",),
)
RANK = {part: rank for rank, row in enumerate(ORDER) for part in row}

HEAVY = ("torch", "transformers", "numpy", "pydantic", "yaml", "triton")


def imports(path: Path, package: Path) -> list[tuple[int, str]]:
    """(line, full module name) of every import in a file, those inside functions and `if TYPE_CHECKING` too."""
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
    """Every import in `package` that goes against the order, as 'file:line imports module: why'."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        part = relative.parts[0].removesuffix(".py")
        for line, module in imports(path, package):
            place = f"{relative}:{line} imports {module}"
            root, _, rest = module.partition(".")
            other = rest.split(".")[0]
            if root in ("trainers", "tests"):
                wrong.append(f"{place}: the package does not know its users")
            elif root == package.name and relative.parts == ("__init__.py",):
                wrong.append(f"{place}: `import lowprec` must stay cheap")
            elif root == package.name and other != part and RANK.get(other, len(ORDER)) >= RANK.get(part, -1):
                wrong.append(f"{place}: {other or 'the package itself'} does not come before {part}")
    return wrong


def test_every_part_has_its_place():
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == set(RANK)


def test_imports_go_one_way():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("formats/element.py", "from lowprec.quant import quantize", "quant does not come before formats"),
        ("nn/linear.py", "def f():\n    import trainers.callback", "the package does not know its users"),
        ("nn/linear.py", "from lowprec import conversion", "conversion does not come before nn"),
        ("gemm/base.py", "from ..recipe import Recipe", "recipe does not come before gemm"),
        ("config.py", "from lowprec.plan import Plan", "plan does not come before config"),
        ("conversion.py", "import lowprec", "the package itself does not come before conversion"),
        ("kernels/liger.py", "from lowprec.attention.mask import parse", "attention does not come before kernels"),
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
        ("testing/cases.py", "from lowprec.conversion import convert"),
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
    assert run(f"{code}; print(*[name for name in ('transformers', 'trainers', 'lowprec.testing') if name in sys.modules])") == []


def test_every_public_name_exists():
    assert dir(lowprec) == sorted(lowprec.__all__)
    for name in lowprec.__all__:
        assert getattr(lowprec, name) is not None
    with pytest.raises(AttributeError, match="module 'lowprec' has no attribute 'quantise'"):
        lowprec.quantise  # noqa: B018
