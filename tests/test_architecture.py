"""docs/architecture.md is true: its pictures have the order of imports, and its table names paths and tables that hold what it claims."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lowprec.attention.mask
import lowprec.conversion.layer_backends
import lowprec.formats.element
import lowprec.gemm
import lowprec.recipe.library
import lowprec.training.control.signals
from lowprec.attention.expression import _FACTORIES, _TAKES_SIZE
from lowprec.conversion.layer_backends import LAYER_BACKENDS, LayerBackend
from lowprec.formats.element import FORMATS, ElementFormat
from lowprec.gemm import BACKENDS, GemmBackend
from lowprec.recipe import Recipe
from lowprec.testing.tolerances import SQNR_FLOORS_DB
from lowprec.training.control.signals import SIGNALS, Signal
from tests.test_layering import ORDER, TRAINING

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("| to add | touch |")[2].partition("\n\n")[0]
ROWS = {what: how for what, how in re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", TABLE, re.MULTILINE) if "---" not in what}
PATH = r"`([\w./-]+/[\w./-]*)`"


def picture(number: int) -> list[tuple[str, ...]]:
    """Return the names on the left of a picture of parts, from the bottom up."""
    block = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[number]
    return [tuple(line.split("  ")[0].split(", ")) for line in reversed(block.splitlines())]


def test_the_pictures_have_the_order_of_imports():
    assert picture(0) == [tuple(row) for row in ORDER if row != ("testing",)]
    assert picture(1) == [tuple(row) for row in TRAINING]


def test_there_are_rows():
    assert len(ROWS) >= 10


@pytest.mark.parametrize("what", ROWS)
def test_paths_and_tables_of_a_row_exist(what: str):
    paths = re.findall(PATH, ROWS[what])
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path
    for table, path in re.findall(r"`(\w+)` in " + PATH, ROWS[what]):
        assert table in assigned(ROOT / path)


def assigned(path: Path) -> set[str]:
    """Return the names that a file assigns at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_files_named_anywhere_exist():
    named = set(re.findall(r"[\w/]+/\w+\.py", PAGE))
    assert len(named) > 15
    assert [path for path in named if not ((ROOT / path).exists() or (ROOT / "lowprec" / path).exists())] == []


def subclasses(base: type, *modules: ModuleType) -> set[type]:
    """Return the classes below `base` that can have instances and that these modules, or the files of a package among them, define."""
    files = list(modules)
    for module in modules:
        if hasattr(module, "__path__"):
            files += [importlib.import_module(f"{module.__name__}.{name}") for _, name, _ in pkgutil.iter_modules(module.__path__)]
    found = {value for file in files for value in vars(file).values() if isinstance(value, type) and issubclass(value, base)}
    return {kind for kind in found - {base} if not inspect.isabstract(kind)}


def instances(base: type, module: ModuleType) -> list[Any]:
    return [value for value in vars(module).values() if isinstance(value, base)]


def test_each_element_format_is_a_row():
    assert set(FORMATS.values()) == set(instances(ElementFormat, lowprec.formats.element))
    assert all(name == fmt.name for name, fmt in FORMATS.items())


def test_each_recipe_is_a_row_with_its_bounds():
    library = lowprec.recipe.library
    assert [recipe.name for recipe in library._RECIPES] == library.names()
    assert set(library.names()) == set(SQNR_FLOORS_DB)
    assert all(isinstance(recipe, Recipe) for recipe in library._RECIPES)
    assert instances(Recipe, library) == []  # no recipe is defined outside the table


def test_each_gemm_backend_is_a_file_and_an_entry():
    assert {type(backend) for backend in BACKENDS.values()} == subclasses(GemmBackend, lowprec.gemm)
    files = [inspect.getsourcefile(type(backend)) for backend in BACKENDS.values()]
    assert len(set(files)) == len(BACKENDS)


def test_each_layer_backend_is_an_entry():
    kinds = {type(backend) for backend in LAYER_BACKENDS.values()}
    assert subclasses(LayerBackend, lowprec.conversion.layer_backends) - kinds == {lowprec.conversion.layer_backends.GemmLayers}


def test_each_signal_is_an_entry():
    assert set(SIGNALS) == subclasses(Signal, lowprec.training.control.signals)


def test_each_mask_has_a_name():
    masks = lowprec.attention.mask
    made = {type(factory(4)) if name in _TAKES_SIZE else type(factory()) for name, factory in _FACTORIES.items()}
    assert made == subclasses(masks.Mask, masks) - {masks.And, masks.Or, masks.Not}
