"""Attention masks as an algebra: small predicates over (batch, head, query, key), combined with
`&`, `|` and `~`.

The method. Which key a query may look at is a boolean function m(b, h, q, kv) of four indices.
Every mask of a language model is a combination of a few such functions:

    causal             kv <= q
    sliding_window(n)  q - kv < n      (says nothing about the future: write causal & sliding_window(n))
    document           id[b, q] == id[b, kv]
    prefix(n)          kv < n          (prefix language model: causal | prefix(n))

and one function serves three kernels. On broadcast index tensors it gives the dense boolean matrix;
on the scalars that `vmap` feeds it, FlexAttention compiles it into the attention kernel; and
evaluated once per 128 x 128 tile it gives the `BlockMask` that lets the kernel skip the tiles in
which nothing is visible, so the cost falls from Q*K to what is really attended to (Dong et al.,
"Flex Attention", arXiv 2412.05496).

Indices are absolute: query 0 and key 0 are the same token. Shapes: B batch, Q and K lengths.

    >>> mask = parse("causal & sliding_window(1024) & document")
    >>> mask == causal() & sliding_window(1024) & document()
    True
    >>> str(mask)
    'causal & sliding_window(1024) & document'
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from lowprec.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A predicate m(b, h, q, kv): may query q look at key kv? Immutable; combine with `&`, `|`,
    `~`.

    `str(mask)` is the expression that `parse` reads back (document ids are data of one batch and
    are not part of it).
    """

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """The predicate. Arguments: integer tensors that broadcast (or vmapped scalars). Returns:
        bool, of a shape that broadcasts to theirs (a mask that does not look at b has no batch
        dimension)."""
        raise NotImplementedError

    @property
    def children(self) -> tuple["Mask", ...]:
        """The masks that this one combines."""
        return tuple(
            value for field in fields(self) if isinstance(value := getattr(self, field.name), Mask)
        )

    @property
    def needs_documents(self) -> bool:
        """Does a `document` occur in it, with or without ids?"""
        return any(child.needs_documents for child in self.children)

    def bind(self, document_ids: Tensor) -> "Mask":
        """This mask with `document_ids` (int [B, S], equal where the document is the same) in each
        `document`.

        Raises UserError for ids of another shape or type. A mask without `document` comes back
        equal.
        """
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self,
            **{
                name: part.bind(document_ids)
                for name, part in parts.items()
                if isinstance(part, Mask)
            },
        )

    def dense(
        self, batch: int, q_len: int, kv_len: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The boolean matrix, True where visible: [B, 1, Q, K], or [1, 1, Q, K] if the mask does
        not depend on the batch."""
        rows = self._rows(batch, q_len, kv_len)
        b = torch.arange(rows, device=device)[:, None, None, None]
        h = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
        q = torch.arange(q_len, device=device)[None, None, :, None]
        kv = torch.arange(kv_len, device=device)[None, None, None, :]
        return self.mod(b, h, q, kv).expand(rows, 1, q_len, kv_len)

    def block_mask(
        self, batch: int, q_len: int, kv_len: int, device: torch.device | str = "cpu"
    ) -> BlockMask:
        """The mask in 128 x 128 tiles for FlexAttention (torch.nn.attention.flex_attention); batch
        size B or 1 as in `dense`."""
        return build_block_mask(
            self.function(), self._rows(batch, q_len, kv_len), q_len, kv_len, device
        )

    def function(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """`mod` as a plain function. PyTorch counts the arguments of its code object to tell a mask
        from a score modification, and a bound method has one more (self)."""

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return self.mod(b, h, q, kv)

        return mask_mod

    def _rows(self, batch: int, q_len: int, kv_len: int) -> int:
        if not self.needs_documents:
            return 1
        for ids in _bound_ids(self):
            if ids.shape[0] != batch or ids.shape[1] < max(q_len, kv_len):
                raise UserError(
                    f"document ids of shape {list(ids.shape)} do not cover a batch of {batch} with "
                    f"{q_len} queries and {kv_len} keys"
                )
        return batch

    def __and__(self, other: "Mask") -> "Mask":
        return And(left=self, right=other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or(left=self, right=other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> "Mask":
        return Not(inner=self)


@dataclass(frozen=True, kw_only=True)
class Causal(Mask):
    """kv <= q."""

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv <= q

    def __str__(self) -> str:
        return "causal"


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Mask):
    """q - kv < n: the token itself and the n - 1 before it."""

    n: int

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return q - kv < self.n

    def __str__(self) -> str:
        return f"sliding_window({self.n})"


@dataclass(frozen=True, kw_only=True)
class Prefix(Mask):
    """kv < n: the first n tokens are visible to all."""

    n: int

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv < self.n

    def __str__(self) -> str:
        return f"prefix({self.n})"


# Equality and hash are written out: the generated ones would compare tensors element by element.
@dataclass(frozen=True, eq=False, kw_only=True)
class Document(Mask):
    """id[b, q] == id[b, kv]; without ids a placeholder that each training batch fills in."""

    ids: Tensor | None = None

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if self.ids is None:
            raise UserError(
                "the mask 'document' has no document ids yet: mask.bind(ids) with an int tensor "
                "[batch, length]"
            )
        return self.ids[b, q] == self.ids[b, kv]

    @property
    def needs_documents(self) -> bool:
        return True

    def bind(self, document_ids: Tensor) -> Mask:
        return document(document_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Document) and self.ids is other.ids

    def __hash__(self) -> int:
        return hash((Document, id(self.ids)))

    def __str__(self) -> str:
        return "document"


@dataclass(frozen=True, kw_only=True)
class And(Mask):
    left: Mask
    right: Mask

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return self.left.mod(b, h, q, kv) & self.right.mod(b, h, q, kv)

    def __str__(self) -> str:
        # Parentheses on the right keep the shape of the tree: a & (b & c) reads back as itself.
        return f"{_wrap(self.left, Or)} & {_wrap(self.right, Or, And)}"


@dataclass(frozen=True, kw_only=True)
class Or(Mask):
    left: Mask
    right: Mask

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return self.left.mod(b, h, q, kv) | self.right.mod(b, h, q, kv)

    def __str__(self) -> str:
        return f"{self.left} | {_wrap(self.right, Or)}"


@dataclass(frozen=True, kw_only=True)
class Not(Mask):
    inner: Mask

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ~self.inner.mod(b, h, q, kv)

    def __str__(self) -> str:
        return f"~{_wrap(self.inner, Or, And)}"


def _wrap(mask: Mask, *looser: type[Mask]) -> str:
    return f"({mask})" if isinstance(mask, looser) else str(mask)


def _bound_ids(mask: Mask) -> list[Tensor]:
    if isinstance(mask, Document):
        return [] if mask.ids is None else [mask.ids]
    return [ids for child in mask.children for ids in _bound_ids(child)]


def causal() -> Mask:
    """Each token sees itself and what precedes it: kv <= q."""
    return Causal()


def sliding_window(n: int) -> Mask:
    """Each token sees at most the n - 1 tokens before it: q - kv < n. The future stays visible:
    compose it with `causal()`."""
    return SlidingWindow(n=_size("sliding_window", n))


def prefix(n: int) -> Mask:
    """The first n tokens are visible to every query: kv < n. A prefix language model is `causal() |
    prefix(n)`."""
    return Prefix(n=_size("prefix", n))


def document(ids: Tensor | None = None) -> Mask:
    """Only tokens of the same document see each other. `ids`: integer tensor [B, S], or None for a
    placeholder (`Mask.bind`)."""
    if ids is not None and (
        not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.is_complex()
    ):
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else repr(ids)
        raise UserError(f"document ids must be an integer tensor [batch, length], got {got}")
    return Document(ids=ids)


def _size(name: str, n: Any) -> int:
    if type(n) is not int or n < 1:
        raise UserError(f"mask: {name}(n) takes one positive integer, got {n!r}")
    return n


_FACTORIES: dict[str, Callable[..., Mask]] = {
    "causal": causal,
    "document": document,
    "prefix": prefix,
    "sliding_window": sliding_window,
}
_TAKES_SIZE = ("prefix", "sliding_window")
_MAX_EXPRESSION = (
    1000  # characters; keeps a hostile expression from exhausting the recursion of the parser
)


def parse(expression: "str | Mask") -> Mask:
    """The mask that `expression` describes, e.g. "causal & sliding_window(1024) & document"; a Mask
    is returned as it is.

    Names: causal, document, prefix(n), sliding_window(n). Operators, by precedence: ~ & | and
    parentheses, as in Python. The text is read with `ast` and only these nodes are accepted;
    nothing is evaluated. Raises UserError for anything else.
    """
    if isinstance(expression, Mask):
        return expression
    if not isinstance(expression, str) or len(expression) > _MAX_EXPRESSION:
        raise UserError(
            "mask: expected an expression such as 'causal & document', got "
            f"{str(expression)[:40]!r}"
        )
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


@cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


def build_block_mask(
    mod: Callable[..., Tensor], rows: int, q_len: int, kv_len: int, device: torch.device | str
) -> BlockMask:
    """`create_block_mask` for the predicate `mod`, compiled on CUDA.

    Uncompiled it writes the whole [rows, 1, Q, K] matrix to memory before it reduces it to tiles
    (gigabytes at long lengths); compiled, the two steps are one kernel. On a CPU the compilation
    costs more than it saves. Inside an outer `torch.compile` the plain function is right: the outer
    one compiles it.
    """
    compiled = torch.device(device).type == "cuda" and not torch.compiler.is_compiling()
    create = _compiled_create_block_mask() if compiled else create_block_mask
    return create(mod, rows, None, q_len, kv_len, device)
