"""The mask algebra agrees with plain Python loops over (query, key), and the parser reads what masks print."""

import dataclasses

import pytest
import torch

from lowprec.attention import causal, document, parse, prefix, sliding_window
from lowprec.attention.mask import And
from lowprec.errors import UserError

B, Q, K = 2, 9, 7
IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 3, 3, 3, 3, 3, 3, 5]])  # ids need not ascend

PLACES = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 2]])  # of each token in its document

# expression -> the same predicate in plain Python
PREDICATES = {
    "causal": lambda b, q, kv: kv <= q,
    "sliding_window(3)": lambda b, q, kv: q - kv < 3,
    "prefix(2)": lambda b, q, kv: kv < 2,
    "document": lambda b, q, kv: bool(IDS[b, q] == IDS[b, kv]),
    "causal & sliding_window(3)": lambda b, q, kv: kv <= q and q - kv < 3,
    "causal & document": lambda b, q, kv: kv <= q and bool(IDS[b, q] == IDS[b, kv]),
    "causal | prefix(4)": lambda b, q, kv: kv <= q or kv < 4,
    "(causal | prefix(4)) & document": lambda b, q, kv: (kv <= q or PLACES[b, kv] < 4) and bool(IDS[b, q] == IDS[b, kv]),
    "document & (~prefix(2) | causal & prefix(1))": lambda b, q, kv: (
        bool(IDS[b, q] == IDS[b, kv]) and (PLACES[b, kv] >= 2 or (kv <= q and PLACES[b, kv] < 1))
    ),
    "causal & document & (sliding_window(2) | prefix(1))": lambda b, q, kv: (
        kv <= q and bool(IDS[b, q] == IDS[b, kv]) and (q - kv < 2 or PLACES[b, kv] < 1)
    ),
    "prefix(3) & (causal | document)": lambda b, q, kv: kv < 3 and (kv <= q or bool(IDS[b, q] == IDS[b, kv])),  # not joined by &
    "~causal": lambda b, q, kv: not kv <= q,
    "~(causal & document) | prefix(1)": lambda b, q, kv: not (kv <= q and IDS[b, q] == IDS[b, kv]) or kv < 1,
    "causal & (sliding_window(2) & ~document)": lambda b, q, kv: kv <= q and q - kv < 2 and IDS[b, q] != IDS[b, kv],
    "causal & sliding_window(4) & document | prefix(1)": lambda b, q, kv: (
        (kv <= q and q - kv < 4 and bool(IDS[b, q] == IDS[b, kv])) or kv < 1
    ),
}


def by_loops(predicate) -> torch.Tensor:
    return torch.tensor([[[[bool(predicate(b, q, kv)) for kv in range(K)] for q in range(Q)]] for b in range(B)])


@pytest.mark.parametrize("expression", PREDICATES)
def test_dense_equals_loops(expression):
    mask = parse(expression).bind(IDS)
    dense = mask.dense(B, Q, K)
    assert dense.dtype == torch.bool
    assert dense.shape == (B if mask.needs_documents else 1, 1, Q, K)
    assert torch.equal(dense.expand(B, 1, Q, K), by_loops(PREDICATES[expression]))


@pytest.mark.parametrize("expression", PREDICATES)
def test_block_mask_covers_what_is_visible(expression):
    # 300 tokens are 3 tiles, the last one partial; a tile is listed if and only if it has a visible pair.
    ids = (torch.arange(300) // 130).expand(2, 300)
    mask = parse(expression).bind(ids)
    dense = mask.dense(2, 300, 300)
    blocks = mask.block_mask(2, 300, 300)
    assert blocks.shape[-2:] == (300, 300)
    padded = torch.nn.functional.pad(dense, (0, 84, 0, 84))
    tiles = padded.unflatten(-1, (3, 128)).unflatten(-3, (3, 128)).any(-1).any(-2)
    assert torch.equal(blocks.to_dense().bool(), tiles)


@pytest.mark.parametrize("expression", PREDICATES)
def test_text_round_trip(expression):
    mask = parse(expression)
    assert str(mask) == expression
    assert parse(str(mask)) == mask
    assert hash(parse(str(mask))) == hash(mask)


def test_operators_and_parser_agree():
    assert parse("causal & sliding_window(1024) & document") == causal() & sliding_window(1024) & document()
    assert parse(" causal() | ~ prefix( 3 ) ") == causal() | ~prefix(3)
    assert parse("~(causal | document) & causal") == ~(causal() | document()) & causal()
    assert str(causal() & (sliding_window(2) & document())) == "causal & (sliding_window(2) & document)"
    assert str((causal() & prefix(2)) | document()) == "causal & prefix(2) | document"
    assert str(~~causal()) == "~~causal"
    assert parse(mask := causal() & document()) is mask


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("casual & document", "unknown name 'casual' in 'casual & document'; did you mean 'causal'?"),
        ("window(3)", "did you mean 'sliding_window'?"),
        ("causal and document", "write '&', '|' and '~'"),
        ("not causal", "write '&', '|' and '~'"),
        ("causal ^ document", "'causal ^ document' in 'causal ^ document' is neither a mask nor one of the operators & | ~"),
        ("causal &", "cannot read 'causal &'"),
        ("", "cannot read ''"),
        ("sliding_window", "sliding_window(n) takes one positive integer, got 'sliding_window'"),
        ("sliding_window(0)", "sliding_window(n) takes one positive integer, got 0"),
        ("sliding_window(-1)", "takes one positive integer"),
        ("sliding_window(True)", "takes one positive integer, got True"),
        ("sliding_window(8.0)", "takes one positive integer, got 8.0"),
        ("prefix('a')", "takes one positive integer, got 'a'"),
        ("causal(3)", "'causal' takes no argument"),
        ("prefix(n=3)", "neither a mask"),
        ("__import__('os').system('true')", "neither a mask"),
        ("causal & 3", "'3' in 'causal & 3' is neither a mask"),
        ("~" * 2000 + "causal", "expected an expression"),
        ("(" * 500 + "causal" + ")" * 400, "cannot read"),
        (None, "expected an expression such as 'causal & document', got 'None'"),
    ],
)
def test_bad_expressions_are_one_line(expression, message):
    with pytest.raises(UserError) as error:
        parse(expression)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_documents_are_bound_once_for_all_placeholders():
    mask = (causal() & document()) | ~document()
    assert mask.needs_documents
    assert not (causal() & prefix(3)).needs_documents
    bound = mask.bind(IDS)
    assert bound.needs_documents
    assert bound != mask
    assert bound == mask.bind(IDS)
    assert str(bound) == str(mask)
    assert causal().bind(IDS) == causal()


def test_bad_documents():
    with pytest.raises(UserError, match="has no document ids yet"):
        (causal() & document()).dense(1, 4, 4)
    for ids in (torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4), [[0, 1]]):
        with pytest.raises(UserError, match="must be an integer tensor"):
            document(ids)
    with pytest.raises(UserError, match=r"shape \[2, 9\] do not cover a batch of 3 with 9 queries and 9 keys"):
        document(IDS).dense(3, 9, 9)
    with pytest.raises(UserError, match="10 queries"):
        document(IDS).block_mask(2, 10, 9)


def test_masks_are_immutable_and_combine_only_with_masks():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sliding_window(3).n = 4
    for bad in (3, "document", None):
        with pytest.raises(TypeError):
            causal() & bad
        with pytest.raises(TypeError):
            causal() | bad
    for bad in (0, -3, 2.0, True, "3"):
        with pytest.raises(UserError):
            sliding_window(bad)


def test_each_packed_document_has_its_own_prefix():
    """Packed examples see what they would see alone, in the dense matrix and in FlexAttention's predicate."""
    lengths = [5, 3, 8]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    mask = parse("(causal | prefix(4)) & document")
    packed = mask.bind(ids).dense(1, 16, 16)[0, 0]
    alone = [parse("causal | prefix(4)").dense(1, n, n)[0, 0] for n in lengths]
    assert torch.equal(packed, torch.block_diag(*(part.float() for part in alone)).bool())
    assert mask == (causal() | prefix(4)) & document()
    assert mask != And(left=causal() | prefix(4), right=causal())
    bound = mask.bind(ids)
    place = torch.arange(16)
    assert torch.equal(bound.function()(torch.tensor(0), torch.tensor(0), place[:, None], place[None, :]), packed)
    assert (causal() | prefix(4)) & document(ids) == bound
    # 300 tokens of three documents: a tile is listed if it has a visible pair, also one that is above the diagonal.
    ids = (torch.arange(300) // 100).expand(2, 300)
    tall = parse("(causal | prefix(60)) & document").bind(ids)
    tiles = torch.nn.functional.pad(tall.dense(2, 300, 300), (0, 84, 0, 84)).unflatten(-1, (3, 128)).unflatten(-3, (3, 128)).any(-1).any(-2)
    assert torch.equal(tall.block_mask(2, 300, 300).to_dense().bool(), tiles)
    assert tiles[0, 0, 0, 1]
    with pytest.raises(UserError, match=r"the mask 'prefix\(4\)' has no document ids yet"):
        mask.dense(1, 16, 16)


@pytest.mark.parametrize(("queries", "keys"), [(9, 10), (10, 9), (10, 10)])
def test_document_ids_cover_queries_and_keys(queries, keys):
    mask = parse("causal & document").bind(IDS)
    for make in (mask.dense, mask.block_mask):
        with pytest.raises(UserError, match=f"do not cover a batch of 2 with {queries} queries and {keys} keys"):
            make(2, queries, keys)
    assert mask.dense(2, 9, 8).shape == (2, 1, 9, 8)
    with pytest.raises(UserError, match="do not cover a batch of 1"):
        mask.dense(1, 9, 9)
