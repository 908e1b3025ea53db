"""Find the linear layers by whose weight the module around them multiplies without calling them, by
the source of its class: `self.dt_proj.weight @ x`, as Mamba's mixer has it.

A layer is found if the code that `forward` reaches reads its weight, not only a property such as
`weight.dtype`, and uses the layer in no other way. A layer that is called in one branch and read in
another is not found: only a step shows which one runs (`observe.Calls`).
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

_PROPERTIES = {"dtype", "device", "shape", "size", "ndim", "dim", "requires_grad", "is_cuda"}
"""Attributes of a weight that say nothing about its values."""

_BESIDE_THE_WEIGHT = {"bias", "in_features", "out_features"}
"""Attributes of a layer whose use is no call of it."""


def read_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the submodules by whose weight `module` multiplies without calling them."""
    for name in read_names(type(module)):
        layer = module._modules.get(name)
        if layer is not None:
            yield layer


@cache
def read_names(kind: type) -> tuple[str, ...]:
    """Return the names of the submodules whose weight the code of a class reads, and which it uses
    in no other way; none if some of that code can't be read."""
    if not _mentions_weight(kind):
        return ()
    uses = _Uses(kind)
    done: set[str] = set()
    while waiting := uses.methods - done:
        name = min(waiting)
        done.add(name)
        tree = _source(kind, name)
        if tree is None:
            return ()
        uses.visit(tree)
    return () if uses.calls_super else tuple(sorted(uses.read - uses.used))


class _Uses(ast.NodeVisitor):
    """The ways in which the methods of a class use its attributes."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.methods = {"forward"}
        """Methods that `forward` reaches."""
        self.read: set[str] = set()
        """Attributes whose `weight` is read."""
        self.used: set[str] = set()
        """Attributes that are used in another way."""
        self.calls_super = False

    def visit_Name(self, node: ast.Name) -> None:
        self.calls_super = self.calls_super or node.id == "super"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name) or inner.id != "self":
            self.visit(inner)
            return
        name, *rest = parts
        if _method(self.kind, name) is not None:
            self.methods.add(name)
        elif rest[:1] != ["weight"]:
            if not rest or rest[0] not in _BESIDE_THE_WEIGHT:
                self.used.add(name)
        elif not _PROPERTIES.intersection(rest[1:2]):
            self.read.add(name)


def _mentions_weight(kind: type) -> bool:
    """Return whether any code of a class has the word `weight`: to read sources takes longer."""
    names = (name for cls in kind.__mro__[: kind.__mro__.index(nn.Module)] for name in vars(cls))
    functions = (_method(kind, name) for name in names)
    return any("weight" in function.__code__.co_names for function in functions if function)


def _method(kind: type, name: str) -> Any:
    """Return the function of a method that a class has by its own code, below nn.Module's."""
    for cls in kind.__mro__:
        if cls is nn.Module:
            return None
        if name in vars(cls):
            found = inspect.unwrap(vars(cls)[name])
            return found if inspect.isfunction(found) else None
    return None


def _source(kind: type, name: str) -> ast.AST | None:
    function = _method(kind, name)
    if function is None:
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
