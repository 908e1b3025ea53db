"""The structure of a mask: the terms that transformers supplies itself, and the terms left to add.

transformers' own predicate is causal and knows the documents of a batch. So a mask for a model is
split at its top-level `&` into `causal` and `document`, which transformers supplies, and the rest.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import reduce
from operator import and_

from lowprec.attention.expression import parse
from lowprec.attention.mask import And, Causal, Document, Mask, Not, Or, Prefix, causal, conjuncts
from lowprec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Terms:
    """A mask, and the terms of it that transformers' own predicate lacks."""

    mask: Mask
    """The whole mask."""
    added: Mask | None
    """The mask without its causal and document terms, which transformers supplies; None if no term
    is left."""
    shows_prefix: bool
    """Flag: the mask shows the future within a prefix."""


def split_terms(mask: Mask | str) -> Terms:
    """Split a mask into the terms that transformers supplies and the rest.

    Raises UserError for a mask that shows the future, that already has document ids, or whose
    `document` is not joined to the rest by &.
    """
    mask = parse(mask)
    terms = conjuncts(mask)
    if any(isinstance(term, Document) and term.ids is not None for term in _atoms(mask)):
        raise UserError(
            f"mask '{mask}': leave the document ids out for a model; each batch brings its own in "
            "position_ids"
        )
    if any(isinstance(atom, Document) for term in terms if term.children for atom in _atoms(term)):
        raise UserError(
            f"mask '{mask}': transformers ANDs documents with the whole mask; write '(...) & "
            "document'"
        )
    future = _future(mask)
    if future == _ANYTHING or not any(isinstance(atom, Causal) for atom in _atoms(mask)):
        raise UserError(
            f"mask '{mask}': a causal language model cannot see the future; write "
            f"'{causal() & mask}'"
        )
    added = [term for term in terms if not isinstance(term, (Causal, Document))]
    return Terms(
        mask=mask, added=reduce(and_, added) if added else None, shows_prefix=future == _PREFIX
    )


def implementation_name(mask: Mask) -> str:
    """Return a name without the words that transformers looks for ("flash", "flex_attention",
    "sdpa", "|")."""
    terms = conjuncts(mask)
    words = re.sub(r"\W+", "_", " ".join(map(str, terms))).strip("_")
    if any(term.children for term in terms):
        words += "_" + hashlib.sha256(str(mask).encode()).hexdigest()[:8]
    return f"lowprec_{words}"


# How much of the future a mask shows. `&` takes the minimum of these, `|` the maximum.
_NOTHING, _PREFIX, _ANYTHING = range(3)


def _future(mask: Mask) -> int:
    """Return an upper bound on how much of the future a mask shows, from its structure."""
    match mask:
        case Causal():
            return _NOTHING
        case Prefix():
            return _PREFIX
        case And(left=left, right=right):
            return min(_future(left), _future(right))
        case Or(left=left, right=right):
            return max(_future(left), _future(right))
        case Not(inner=Not(inner=inner)):
            return _future(inner)
        case _:
            return _ANYTHING


def _atoms(mask: Mask) -> list[Mask]:
    """Return the masks at the leaves of the expression."""
    return [atom for child in mask.children for atom in _atoms(child)] if mask.children else [mask]
