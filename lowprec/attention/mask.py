"""Attention masks as an algebra: small predicates over (batch, head, query, key), combined with
`&`, `|` and `~`.

The method. A boolean function m(b, h, q, kv) of four indices says which keys a query may look at.
Every mask of a language model is a combination of a few such functions:

    causal             kv <= q
    sliding_window(n)  q - kv < n      (the future stays visible: write causal & sliding_window(n))
    document           id[b, q] == id[b, kv]
    prefix(n)          kv < n          (a prefix language model is causal | prefix(n))

Joined to `document` by &, `prefix(n)` counts from the start of each document: every packed example
of `(causal | prefix(n)) & document` has a prefix of its own.

One function serves three kernels:

* On broadcast index tensors it gives the dense boolean matrix.
* On the scalars that `vmap` passes to it, FlexAttention compiles it into the attention kernel.
* Reduced over each tile of 128 x 128 it gives the `BlockMask`. The kernel then skips the tiles in
  which nothing is visible, so the cost falls from Q*K to the number of visible tiles (Dong et al.,
  "Flex Attention", arXiv 2412.05496).

Indices are absolute: query 0 and key 0 are the same token. Shapes: B batch, Q and K lengths.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from lowprec.errors import UserError

_NO_IDS = "the mask '{}' has no document ids yet: mask.bind(ids) with an int tensor [batch, length]"


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A predicate m(b, h, q, kv), True if query q may look at key kv.

    Masks are immutable; `&`, `|` and `~` combine them. `str(mask)` is the expression that `parse`
    reads back. It does not hold document ids, which belong to one batch.
    """

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """Evaluate the predicate.

        The arguments are integer tensors that broadcast, or vmapped scalars. The result is bool, of
        a shape that broadcasts to theirs: a mask that does not depend on b has no batch dimension.
        """
        raise NotImplementedError

    @property
    def children(self) -> tuple["Mask", ...]:
        """Masks that this one combines."""
        return tuple(
            value for part in fields(self) if isinstance(value := getattr(self, part.name), Mask)
        )

    @property
    def needs_documents(self) -> bool:
        """Flag: the mask contains a `document`, with or without ids."""
        return any(child.needs_documents for child in self.children)

    def bind(self, document_ids: Tensor) -> "Mask":
        """Return this mask with `document_ids` in each `document`.

        `document_ids` is int [B, S]; tokens of one document have one id. A mask without `document`
        is returned as an equal mask. Raises UserError for ids of another shape or type.
        """
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
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
        """Return the boolean matrix, True where a key is visible.

        It is [B, 1, Q, K], or [1, 1, Q, K] if the mask does not depend on the batch.
        """
        rows = self._mask_batch(batch, q_len, kv_len)
        b = torch.arange(rows, device=device)[:, None, None, None]
        h = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
        q = torch.arange(q_len, device=device)[None, None, :, None]
        kv = torch.arange(kv_len, device=device)[None, None, None, :]
        return self.mod(b, h, q, kv).expand(rows, 1, q_len, kv_len)

    def block_mask(
        self, batch: int, q_len: int, kv_len: int, device: torch.device | str = "cpu"
    ) -> BlockMask:
        """Return the mask in tiles of 128 x 128 for FlexAttention
        (torch.nn.attention.flex_attention). Its batch size is B or 1, as in `dense`."""
        return build_block_mask(
            self.function(), self._mask_batch(batch, q_len, kv_len), q_len, kv_len, device
        )

    def function(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Return `mod` as a plain function.

        PyTorch counts the arguments of the code object to distinguish a mask from a score
        modification, and a bound method has one argument more (self).
        """

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return self.mod(b, h, q, kv)

        return mask_mod

    def _mask_batch(self, batch: int, q_len: int, kv_len: int) -> int:
        """Return the batch size of the mask: B with documents, else 1. Raise UserError if the
        document ids do not cover the batch."""
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
    """The mask kv <= q: each token sees itself and the tokens before it."""

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv <= q

    def __str__(self) -> str:
        return "causal"


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Mask):
    """The mask q - kv < n: each token sees itself, the n - 1 tokens before it, and later ones."""

    n: int

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return q - kv < self.n

    def __str__(self) -> str:
        return f"sliding_window({self.n})"


# Equality and hash are written by hand, here and in Document. The generated ones would compare
# tensors elementwise.
@dataclass(frozen=True, eq=False, kw_only=True)
class Prefix(Mask):
    """The mask kv < n: all tokens see the first n tokens.

    In a conjunction with `document` it is counted from the start of each document (`And` sets the
    fields below).
    """

    n: int
    per_document: bool = False
    """Flag: n counts from the start of each document."""
    ids: Tensor | None = None
    """Document ids, integer [B, S], of a mask per document; None: they are bound later."""
    positions: Tensor | None = field(default=None, repr=False)
    """Position of each token in its document, int64 [B, S]."""

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if not self.per_document:
            return kv < self.n
        if self.positions is None:
            raise UserError(_NO_IDS.format(self))
        return self.positions[b, kv] < self.n

    @property
    def needs_documents(self) -> bool:
        return self.per_document

    def bind(self, document_ids: Tensor) -> Mask:
        if not self.per_document:
            return self
        _ = document(document_ids)  # checks the ids
        return self.within(document_ids)

    def within(self, ids: Tensor | None) -> "Prefix":
        """Return this prefix, counted from the start of each document; None binds no ids yet."""
        if self.per_document and self.ids is ids:
            return self
        positions = None if ids is None else _positions(ids)
        return Prefix(n=self.n, per_document=True, ids=ids, positions=positions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prefix) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return Prefix, self.n, self.per_document, None if self.ids is None else id(self.ids)

    def __str__(self) -> str:
        return f"prefix({self.n})"


def _positions(ids: Tensor) -> Tensor:
    """Return the number of earlier tokens of the same document for each token, int64 [B, S]."""
    ids = ids.to(torch.int64)
    order = ids.argsort(dim=1, stable=True)
    grouped = ids.gather(1, order)
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    start = torch.where(is_first, place, 0).cummax(1).values
    return torch.empty_like(ids).scatter_(1, order, place - start)


@dataclass(frozen=True, eq=False, kw_only=True)
class Document(Mask):
    """The mask id[b, q] == id[b, kv]: each token sees the tokens of its own document."""

    ids: Tensor | None = None
    """Document ids, integer [B, S]; None makes the mask a placeholder for the ids of each batch."""

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if self.ids is None:
            raise UserError(_NO_IDS.format(self))
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
    """A mask that shows what both of its parts show."""

    left: Mask
    right: Mask

    def __post_init__(self) -> None:
        documents = [term for term in conjuncts(self) if isinstance(term, Document)]
        if documents:
            for name in ("left", "right"):
                part = _prefixes_within(getattr(self, name), documents[0].ids)
                object.__setattr__(self, name, part)

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return self.left.mod(b, h, q, kv) & self.right.mod(b, h, q, kv)

    def __str__(self) -> str:
        # Parentheses on the right keep the tree's shape: `parse` reads a & (b & c) back as it was.
        return f"{_wrap(self.left, Or)} & {_wrap(self.right, Or, And)}"


@dataclass(frozen=True, kw_only=True)
class Or(Mask):
    """A mask that shows what at least one of its parts shows."""

    left: Mask
    right: Mask

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return self.left.mod(b, h, q, kv) | self.right.mod(b, h, q, kv)

    def __str__(self) -> str:
        return f"{self.left} | {_wrap(self.right, Or)}"


@dataclass(frozen=True, kw_only=True)
class Not(Mask):
    """A mask that shows what its part hides."""

    inner: Mask

    def mod(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ~self.inner.mod(b, h, q, kv)

    def __str__(self) -> str:
        return f"~{_wrap(self.inner, Or, And)}"


def conjuncts(mask: Mask) -> list[Mask]:
    """Return the terms that `&` joins at the top of the expression."""
    return [*conjuncts(mask.left), *conjuncts(mask.right)] if isinstance(mask, And) else [mask]


def _prefixes_within(mask: Mask, ids: Tensor | None) -> Mask:
    """Return the mask with each of its prefixes counted from the start of each document."""
    if isinstance(mask, Prefix):
        return mask.within(ids)
    parts = {
        item.name: _prefixes_within(part, ids)
        for item in fields(mask)
        if isinstance(part := getattr(mask, item.name), Mask)
    }
    unchanged = all(part is getattr(mask, name) for name, part in parts.items())
    return mask if unchanged else replace(mask, **parts)


def _wrap(mask: Mask, *looser: type[Mask]) -> str:
    return f"({mask})" if isinstance(mask, looser) else str(mask)


def _bound_ids(mask: Mask) -> list[Tensor]:
    if isinstance(mask, Document):
        return [] if mask.ids is None else [mask.ids]
    return [ids for child in mask.children for ids in _bound_ids(child)]


def causal() -> Mask:
    """Return the mask kv <= q: each token sees itself and the tokens before it."""
    return Causal()


def sliding_window(n: int) -> Mask:
    """Return the mask q - kv < n: each token sees itself and the n - 1 tokens before it.

    Later tokens stay visible, so combine the mask with `causal()`.
    """
    return SlidingWindow(n=_size("sliding_window", n))


def prefix(n: int) -> Mask:
    """Return the mask kv < n: all tokens see the first n tokens.

    A prefix language model has the mask `causal() | prefix(n)`, and on packed documents
    `(causal() | prefix(n)) & document()`, under which each document has its own prefix.
    """
    return Prefix(n=_size("prefix", n))


def document(ids: Tensor | None = None) -> Mask:
    """Return the mask under which only tokens of the same document see each other.

    `ids` is an integer tensor [B, S], or None for a placeholder (see `Mask.bind`).
    """
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


@cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


def build_block_mask(
    mod: Callable[..., Tensor], rows: int, q_len: int, kv_len: int, device: torch.device | str
) -> BlockMask:
    """Run `create_block_mask` for the predicate `mod`; on CUDA, compiled.

    The uncompiled function writes the whole [rows, 1, Q, K] matrix to memory before it reduces the
    matrix to tiles (gigabytes at long lengths). Compiled, the two steps are one kernel. On a CPU
    the compilation costs more than it saves. Inside an outer `torch.compile` the plain function is
    called, because the outer one compiles it.
    """
    compiled = torch.device(device).type == "cuda" and not torch.compiler.is_compiling()
    create = _compiled_create_block_mask() if compiled else create_block_mask
    return create(mod, rows, None, q_len, kv_len, device)
