"""Masks on CUDA: FlexAttention is compared with the dense matrix, and inside a Llama, eager and compiled.

No kernel is exact in bf16, so FlexAttention is not compared with another bf16 kernel: both are compared with softmax written out in
fp64 on the same bf16 inputs. The error of FlexAttention must not exceed twice that of SDPA with the dense matrix, or one rounding unit
of bf16 (2^-8), whichever is larger. Errors are relative, in the Frobenius norm.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from lowprec.attention import attach, attention, choose, hf, parse
from lowprec.integrations import compile_blocks
from tests.builders import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    # All are the compiler's warnings about itself (TF32 is off, .grad of a non-leaf, deprecated torch.jit, ...).
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:triton"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]

BF16_UNIT = 2.0**-8

MASKS = [
    "causal & sliding_window(70)",
    "causal & document",
    "causal & sliding_window(50) & document",
    "causal | prefix(40)",
    "(causal | prefix(40)) & document",
    "document",
    "~(causal & sliding_window(30)) | prefix(1)",
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    # Every mask, shape and model is one more variant of the same compiled functions, and the number of variants is limited.
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def document_ids(batch: int, length: int) -> torch.Tensor:
    """Return ids of documents whose borders lie neither on tiles nor at the same place in two rows, [B, S]."""
    rows = [(torch.arange(length) + 17 * row) // (60 + 31 * row) for row in range(batch)]
    return torch.stack(rows).cuda()


def inputs(batch: int, heads: int, kv_heads: int, length: int, head_dim: int, dtype=torch.bfloat16) -> list[torch.Tensor]:
    shapes = [(batch, heads, length, head_dim)] + [(batch, kv_heads, length, head_dim)] * 2
    return [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]


def written_out(q, k, v, visible):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ v


def dense_sdpa(q, k, v, visible):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def with_gradients(function, tensors, weight) -> list[torch.Tensor]:
    """Return [out, dq, dk, dv] in fp64."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(weight.to(out.dtype))
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]


def error(got: torch.Tensor, reference: torch.Tensor) -> float:
    return ((got - reference).norm() / reference.norm()).item()


def assert_as_good_as_dense(mask, tensors):
    batch, _, length, _ = tensors[0].shape
    visible = mask.dense(batch, length, length, "cuda")
    weight = torch.randn_like(tensors[0])
    reference = with_gradients(lambda *t: written_out(*t, visible), [t.double() for t in tensors], weight)
    dense = with_gradients(lambda *t: dense_sdpa(*t, visible), tensors, weight)
    flex = with_gradients(lambda *t: attention(*t, mask), tensors, weight)
    for name, got, other, exact in zip(("out", "dq", "dk", "dv"), flex, dense, reference, strict=True):
        limit = max(2 * error(other, exact), BF16_UNIT)
        assert error(got, exact) <= limit, f"{name}: {error(got, exact):.2e} > {limit:.2e}"


@pytest.mark.parametrize("length", [256, 200])
@pytest.mark.parametrize("expression", MASKS)
def test_flex_is_as_good_as_dense(expression, length):
    mask = parse(expression).bind(document_ids(2, length))
    assert choose(mask, "cuda", head_dim=64).kernel == "flex"
    assert_as_good_as_dense(mask, inputs(2, 4, 2, length, 64))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "head_dim"),
    [(4, 4, 130, 64), (6, 2, 130, 64), (4, 1, 77, 32), (2, 2, 129, 128)],
    ids=["mha", "group-of-3", "short", "wide"],
)
def test_shapes(heads, kv_heads, length, head_dim):
    mask = parse("causal & document").bind(document_ids(1, length))
    assert_as_good_as_dense(mask, inputs(1, heads, kv_heads, length, head_dim))


def test_plain_causal_is_sdpa():
    q, k, v = inputs(1, 4, 2, 200, 64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(attention(q, k, v, "causal"), expected)


def test_small_head_dimension_takes_the_dense_matrix():
    mask = parse("causal & sliding_window(20)")
    assert choose(mask, "cuda", head_dim=8).kernel == "dense"
    assert_as_good_as_dense(mask, inputs(1, 2, 2, 100, 8))


def test_queries_that_see_nothing_get_zeros():
    tensors = inputs(1, 2, 2, 200, 64)
    out = attention(*tensors, "~causal")  # the last query has no later key
    out.sum().backward()
    assert not out[:, :, -1].any()
    assert all(torch.isfinite(t).all() for t in [out, *(t.grad for t in tensors)])


def test_lengths_change_within_one_process():
    mask = parse("causal & sliding_window(33)")
    for length in (256, 200, 300, 135):
        assert_as_good_as_dense(mask, inputs(1, 2, 2, length, 64))


# ---- inside a model ----------------------------------------------------------------------------------------------------------

VOCAB = 256
PACKINGS = [[130, 1, 169], [300], [20] * 15, [299, 1]]


def positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def llama():
    sizes = {"vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {"max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "use_cache": True}
    return tiny_llama(**sizes, **settings).train()


def step(model, ids, lengths) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return (loss, gradients) of one training step, on the CPU."""
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    batch = {"input_ids": ids.to(device), "labels": ids.to(device), "position_ids": positions(lengths).to(device)}
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach().cpu(), {name: p.grad.cpu().clone() for name, p in model.named_parameters()}


def assert_same_step(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    for name, grad in expected[1].items():
        assert error(got[1][name].double(), grad.double()) < 1e-3, name


@pytest.fixture
def block_masks(monkeypatch) -> list:
    """Return a list to which each BlockMask that the model's mask function makes is added."""
    made = []
    build = hf.build_block_mask

    def spy(*args):
        made.append(build(*args))
        return made[-1]

    monkeypatch.setattr(hf, "build_block_mask", spy)
    return made


@pytest.mark.parametrize("expression", ["causal & document", "causal & sliding_window(40) & document", "(causal | prefix(9)) & document"])
def test_llama_trains_as_on_the_cpu(expression, block_masks):
    reference = llama()
    model = copy.deepcopy(reference).cuda()
    ids = torch.randint(2, VOCAB, (1, 300))
    attach(reference, expression)
    expected = step(reference, ids, PACKINGS[0])
    assert not block_masks
    attach(model, expression)
    assert_same_step(step(model, ids, PACKINGS[0]), expected)
    assert len(block_masks) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("expression", ["causal & document", "causal & sliding_window(40) & document"])
def test_llama_with_compiled_blocks(expression, checkpointing, block_masks):
    reference = llama()
    model = copy.deepcopy(reference).cuda()
    attach(reference, expression)
    attach(model, expression)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert compile_blocks(model, "blocks", "cuda").compiled == 2
    graphs = []
    for lengths in PACKINGS[:1] + PACKINGS[2:]:  # all rows are packed, so the kind of mask and the graph are the same
        ids = torch.randint(2, VOCAB, (1, 300))
        assert_same_step(step(model, ids, lengths), step(reference, ids, lengths))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(block_masks) == 3
    assert graphs[1] == graphs[2], "a new packing must not compile anything"


def test_plain_causal_batches_never_pay_for_flex(block_masks):
    model = llama().cuda()
    ids = torch.randint(2, VOCAB, (1, 300))
    attach(model, "causal & document")
    with_documents = step(model, ids, [300])  # one document fills the row
    attach(model, "causal")
    padding = torch.ones_like(ids).cuda()
    model(input_ids=ids.cuda(), attention_mask=padding).loss  # noqa: B018
    assert_same_step(step(model, ids, [300]), with_documents)
    assert not block_masks


@torch.no_grad()
def test_padding(block_masks):
    reference = llama().eval()
    model = copy.deepcopy(reference).cuda()
    ids = torch.randint(2, VOCAB, (2, 150))
    padding = torch.ones_like(ids)
    padding[0, 140:] = 0
    for each in (reference, model):
        attach(each, "causal & sliding_window(40)")
    expected = reference(ids, attention_mask=padding).logits
    got = model(ids.cuda(), attention_mask=padding.cuda()).logits.cpu()
    torch.testing.assert_close(got[padding.bool()], expected[padding.bool()], rtol=1e-3, atol=1e-4)
    assert len(block_masks) == 1


@torch.no_grad()
@pytest.mark.parametrize("expression", ["causal & sliding_window(20)", "causal & document", "causal | prefix(9)"])
def test_generation_as_on_the_cpu(expression):
    reference = llama().eval()
    model = copy.deepcopy(reference).cuda()
    prompt = torch.randint(2, VOCAB, (2, 140))
    settings = {"max_new_tokens": 6, "do_sample": False}
    for each in (reference, model):
        attach(each, expression)
    expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    got = model.generate(prompt.cuda(), attention_mask=torch.ones_like(prompt).cuda(), **settings)
    assert torch.equal(got.cpu(), expected)
