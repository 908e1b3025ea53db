"""The masks inside a tiny Llama agree with transformers' own implementations and with running each document alone."""

import re
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lowprec.attention import attach, causal, describe, document, parse, register
from lowprec.errors import UserError
from tests.builders import tiny_llama

VOCAB, LENGTH = 64, 24
LENGTHS = [7, 1, 16]  # lengths of the packed documents


def llama(**config: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCAB, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "use_cache": True}
    return tiny_llama(**(sizes | settings | config)).eval()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
DOCUMENTS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]


def eager_logits(model, ids, visible, **inputs) -> torch.Tensor:
    """Return the logits by transformers' eager attention under the boolean matrix `visible` [1, 1, Q, K]."""
    model.set_attn_implementation("eager")
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return model(ids, attention_mask=additive.expand(len(ids), -1, -1, -1), **inputs).logits


@torch.no_grad()
def test_packed_documents_equal_documents_alone(model, ids):
    attach(model, "causal & document")
    packed = model(ids, position_ids=POSITIONS.expand(2, -1)).logits
    start = 0
    for n in LENGTHS:
        torch.testing.assert_close(packed[:, start : start + n], model(ids[:, start : start + n]).logits)
        start += n


@torch.no_grad()
@pytest.mark.parametrize(
    "expression",
    [
        "causal & sliding_window(5)",
        "causal & (sliding_window(3) | prefix(2))",
        "causal & ~(sliding_window(9) & ~sliding_window(4))",
        "causal | prefix(6)",
    ],
)
def test_any_mask_equals_its_matrix_through_eager(model, ids, expression):
    expected = eager_logits(model, ids, parse(expression).dense(2, LENGTH, LENGTH))
    attach(model, expression)
    torch.testing.assert_close(model(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("expression", ["causal & sliding_window(5) & document", "(causal | prefix(3)) & document"])
def test_documents_in_any_mask_equal_the_matrix_through_eager(model, ids, expression):
    visible = parse(expression).bind(DOCUMENTS).dense(1, LENGTH, LENGTH)
    expected = eager_logits(model, ids, visible, position_ids=POSITIONS)
    attach(model, expression)
    torch.testing.assert_close(model(ids, position_ids=POSITIONS).logits, expected)


@torch.no_grad()
def test_packed_prefixes_equal_documents_alone(model, ids):
    attach(model, "(causal | prefix(4)) & document")
    packed = model(ids, position_ids=POSITIONS.expand(2, -1)).logits
    start = 0
    for n in LENGTHS:
        torch.testing.assert_close(packed[:, start : start + n], model(ids[:, start : start + n]).logits)
        start += n
    model.config.attention_chunk_size = 8
    with pytest.raises(UserError, match="can't be told from the chunks of a model with attention_chunk_size 8"):
        model(ids, position_ids=POSITIONS.expand(2, -1))


@torch.no_grad()
def test_causal_equals_sdpa_in_every_batch(model, ids):
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    batches = ({}, {"attention_mask": padding}, {"position_ids": POSITIONS, "use_cache": False})
    model.set_attn_implementation("sdpa")
    expected = [model(ids, **batch).logits for batch in batches]
    model.set_attn_implementation(register("causal"))
    for batch, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(model(ids, **batch).logits, logits, rtol=0, atol=0)


@torch.no_grad()
def test_padding_is_kept(model, ids):
    attach(model, "causal & sliding_window(5)")
    padding = torch.ones_like(ids)
    padding[0, LENGTH - 4 :] = 0
    padded = model(ids, attention_mask=padding).logits
    torch.testing.assert_close(padded[0, : LENGTH - 4], model(ids[:1, : LENGTH - 4]).logits[0])
    torch.testing.assert_close(padded[1], model(ids[1:]).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("expression", ["causal", "causal & sliding_window(4)", "causal & document", "causal | prefix(3)"])
def test_generation_with_a_cache_equals_without(model, ids, expression):
    attach(model, expression)
    prompt = ids[:, :10]
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached = model.generate(prompt, use_cache=True, **settings)
    assert cached.shape == (2, 15)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))


@torch.no_grad()
def test_the_window_of_the_model_itself_is_kept(ids):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
    )
    model = MistralForCausalLM(config).eval()
    expected = eager_logits(model, ids, parse("causal & sliding_window(6)").dense(2, LENGTH, LENGTH))
    for mask in ("causal", "causal & sliding_window(9)"):
        attach(model, mask)
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("expression", ["causal & sliding_window(5) & document", "causal & document"])
def test_training_batches(model, ids, expression):
    attach(model, expression)
    model.train()
    assert model.config.use_cache  # with this default, transformers alone would not detect documents
    out = model(input_ids=ids, position_ids=POSITIONS, labels=ids)
    assert out.past_key_values is None
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
    # The loss of the last document has no gradient for the tokens of the others.
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, position_ids=POSITIONS).logits
    logits[:, -1].sum().backward()
    assert not embeddings.grad[:, : -LENGTHS[-1]].any()
    assert embeddings.grad[:, -1].any()


def test_training_without_documents_is_refused(model, ids):
    attach(model, "causal & document")
    model.train()
    with pytest.raises(UserError, match="a training batch needs position_ids that restart at 0"):
        model(input_ids=ids)
    with pytest.raises(UserError, match="in a batch with attention_mask; leave it out"):
        model(input_ids=ids, position_ids=POSITIONS, attention_mask=torch.ones_like(ids))
    with pytest.raises(UserError, match="in a batch with attention_mask"):
        model(ids, torch.ones_like(ids), POSITIONS)  # attention_mask and position_ids are passed by position
    with pytest.raises(UserError, match="in a batch with use_cache"):
        model(input_ids=ids, position_ids=POSITIONS, use_cache=True)
    attach(model, "causal")  # this removes the check again
    model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_register_alone_refuses_attention_mask_with_gradients(model, ids):
    model.set_attn_implementation(register(causal() & document()))
    with pytest.raises(UserError, match="transformers ignores document boundaries in a batch with an attention_mask"):
        model(ids, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        model(ids, attention_mask=torch.ones_like(ids))


def test_names():
    assert register("causal & document") == "lowprec_causal_document" == register(causal() & document())
    assert register("causal & sliding_window(1024) & document") == "lowprec_causal_sliding_window_1024_document"
    others = [register(text) for text in ("causal | prefix(8)", "causal & (document & prefix(8))", "causal & ~prefix(8)")]
    assert len(set(others)) == 3
    for name in others:
        assert not any(word in name for word in ("flash", "flex_attention", "sdpa", "|", "&", "~", "("))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("sliding_window(8)", "cannot see the future; write 'causal & sliding_window(8)'"),
        ("prefix(8)", "write 'causal & prefix(8)'"),
        ("causal | document", "write '(...) & document'"),
        ("causal | sliding_window(2)", "write 'causal & (causal | sliding_window(2))'"),
        ("~causal", "cannot see the future"),
        ("causal & ~document", "write '(...) & document'"),
        ("causal & document | prefix(2)", "write '(...) & document'"),
        ("causl", "did you mean 'causal'"),
    ],
)
def test_masks_that_no_model_can_have(expression, message):
    for function in (register, lambda mask: describe(mask, "cuda")):
        with pytest.raises(UserError, match=re.escape(message)):
            function(expression)


def test_other_refusals(model, ids):
    with pytest.raises(UserError, match="leave the document ids out"):
        register(causal() & document(DOCUMENTS))
    attach(model, "causal & sliding_window(4)")
    with pytest.raises(UserError, match="asks for a bidirectional mask"):
        model(ids, is_causal=False)


def test_describe():
    assert describe("causal", "cuda")[0] == "sdpa"
    kernel, reason = describe("causal & document", "cuda")
    assert kernel == "flex"
    assert "'causal & document' on CUDA" in reason
    assert describe("causal & document", "cpu")[0] == "dense"


def test_a_mask_negated_twice_shows_what_it_shows():
    assert describe("~~causal & document", "cpu")[0] == "dense"
    with pytest.raises(UserError, match="cannot see the future"):
        describe("~causal", "cpu")
