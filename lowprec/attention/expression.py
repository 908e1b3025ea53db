"""Mask expressions: the text form of the mask algebra, as configurations have it.

>>> mask = parse("causal & sliding_window(1024) & document")
>>> mask == causal() & sliding_window(1024) & document()
True
>>> str(mask)
'causal & sliding_window(1024) & document'
"""

import ast
from collections.abc import Callable

from lowprec.attention.mask import Mask, causal, document, prefix, sliding_window
from lowprec.errors import UserError, nearest, shown

_FACTORIES: dict[str, Callable[..., Mask]] = {
    "causal": causal,
    "document": document,
    "prefix": prefix,
    "sliding_window": sliding_window,
}
_TAKES_SIZE = ("prefix", "sliding_window")
_MAX_EXPRESSION = 1000
"""Maximum number of characters; a longer expression could exhaust the parser's recursion limit."""
_MOST_OPERATORS = 100
"""Maximum number of operators, for the recursion over the parsed expression."""


def parse(expression: Mask | str) -> Mask:
    """Return the mask of an expression such as "causal & sliding_window(1024) & document".

    Names: causal, document, prefix(n), sliding_window(n). Operators, by precedence: ~ & | and
    parentheses, as in Python. The text is read with `ast`, and only these nodes are accepted;
    nothing is evaluated. Raises UserError for anything else. A Mask is returned as it is.
    """
    if isinstance(expression, Mask):
        return expression
    if not isinstance(expression, str) or len(expression) > _MAX_EXPRESSION:
        raise UserError(
            "mask: expected an expression such as 'causal & document', got "
            f"{str(expression)[:40]!r}"
        )
    if sum(expression.count(operator) for operator in "&|~") > _MOST_OPERATORS:
        raise UserError(f"mask: more than {_MOST_OPERATORS} operators in {shown(expression)}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(
            f"mask: cannot read {expression!r}; write it as in 'causal & sliding_window(1024) & "
            "document'"
        ) from None
    return _from_node(tree.body, expression)


def _from_node(node: ast.expr, text: str) -> Mask:
    match node:
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _from_node(left, text) & _from_node(right, text)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _from_node(left, text) | _from_node(right, text)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_from_node(operand, text)
        case ast.Name(id=name):
            return _atom(name, [], text)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _atom(name, args, text)
        case ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
            raise UserError(
                f"mask: write '&', '|' and '~' in place of 'and', 'or' and 'not' in {text!r}"
            )
        case _:
            raise UserError(
                f"mask: {ast.unparse(node)!r} in {text!r} is neither a mask nor one of the "
                "operators & | ~"
            )


def _atom(name: str, args: list[ast.expr], text: str) -> Mask:
    if name not in _FACTORIES:
        raise UserError(f"mask: unknown name '{name}' in {text!r}{nearest(name, _FACTORIES)}")
    if name not in _TAKES_SIZE:
        if args:
            raise UserError(f"mask: '{name}' takes no argument in an expression, got {text!r}")
        return _FACTORIES[name]()
    if len(args) != 1 or not isinstance(args[0], ast.Constant):
        raise UserError(f"mask: {name}(n) takes one positive integer, got {text!r}")
    return _FACTORIES[name](args[0].value)
