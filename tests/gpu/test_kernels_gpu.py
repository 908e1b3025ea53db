"""Liger's kernels and compiled blocks in a tiny Llama on CUDA train as the model without them does."""

import copy

import pytest
import torch

from lowprec.integrations import apply_liger, compile_blocks, plan_liger
from tests.builders import tiny_llama

pytest.importorskip("liger_kernel")

pytestmark = [
    pytest.mark.gpu,
    # All are the compiler's warnings about itself (TF32 is off, .grad of a non-leaf, deprecated torch.jit, ...).
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:triton"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::Warning:liger_kernel"),
]

VOCAB = 256


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    from transformers.models.llama import modeling_llama

    # Liger's rotary embedding replaces the model's for the whole process; monkeypatch restores it.
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def llama():
    sizes = {"vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_llama(seed=None, **sizes, max_position_embeddings=256).cuda().train()


def step(model, ids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach().float(), {name: p.grad.double() for name, p in model.named_parameters()}


def assert_same_step(got, expected, *, limit: float):
    """Assert that the loss and every gradient agree within the relative error `limit` (Frobenius norm)."""
    torch.testing.assert_close(got[0], expected[0], rtol=limit, atol=0)
    for name, grad in expected[1].items():
        relative = ((got[1][name] - grad).norm() / grad.norm()).item()
        assert relative < limit, f"{name}: {relative:.2e}"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 100), device="cuda")


@pytest.fixture
def head_calls():
    """Return a function that counts the calls of a model's lm_head."""
    calls = []

    def count(model):
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        return calls

    return count


def test_all_kernels_train_as_without(ids, head_calls):
    model = llama()
    expected = step(model, ids)
    patched = copy.deepcopy(model)
    plan = apply_liger(patched, "on", device_type="cuda", compiled_blocks=False, head_is_low_precision=False)
    assert plan.applied == ("rope", "rms_norm", "swiglu", "fused_linear_cross_entropy")
    calls = head_calls(patched)
    assert_same_step(step(patched, ids), expected, limit=1e-3)
    assert not calls  # the fused loss reads lm_head.weight itself


def test_all_kernels_in_bf16(ids):
    # Neither is exact in bf16: both are compared with the same weights in fp32. Liger's error may be twice that of transformers, or two
    # rounding units of bf16 (2^-8 each), whichever is larger.
    model = llama().bfloat16()
    exact = step(copy.deepcopy(model).float(), ids)
    plain = step(model, ids)
    patched = copy.deepcopy(model)
    apply_liger(patched, "on", device_type="cuda", compiled_blocks=False, head_is_low_precision=False)
    liger = step(patched, ids)
    torch.testing.assert_close(liger[0], exact[0], rtol=2**-7, atol=0)
    for name, grad in exact[1].items():
        errors = [((other[1][name] - grad).norm() / grad.norm()).item() for other in (liger, plain)]
        assert errors[0] <= max(2 * errors[1], 2**-7), f"{name}: {errors}"


def test_compiled_blocks_train_as_without(ids):
    model = llama()
    expected = step(model, ids)
    compiled = copy.deepcopy(model)
    assert compile_blocks(compiled, "blocks", "cuda").compiled == 2
    assert_same_step(step(compiled, ids), expected, limit=1e-3)
    assert list(compiled.state_dict()) == list(model.state_dict())


def test_liger_with_compiled_blocks(ids, head_calls):
    model = llama()
    expected = step(model, ids)
    both = copy.deepcopy(model)
    plan = apply_liger(both, "auto", device_type="cuda", compiled_blocks=True, head_is_low_precision=False)
    assert plan.applied == ("fused_linear_cross_entropy",)
    compile_blocks(both, "blocks", "cuda")
    calls = head_calls(both)
    for _ in range(2):
        assert_same_step(step(both, ids), expected, limit=1e-3)
    assert not calls


def test_low_precision_head_is_called(ids, head_calls):
    model = llama()
    expected = step(model, ids)
    patched = copy.deepcopy(model)
    plan = apply_liger(patched, "auto", device_type="cuda", compiled_blocks=False, head_is_low_precision=True)
    assert plan.applied == ("rope", "rms_norm", "swiglu")
    calls = head_calls(patched)
    assert_same_step(step(patched, ids), expected, limit=1e-3)
    assert len(calls) == 1


def test_other_models_of_the_architecture_are_not_patched(ids):
    model, other = llama(), llama()
    plan = plan_liger(model, "auto", device_type="cuda", compiled_blocks=True, head_is_low_precision=False)
    assert apply_liger(model, "auto", device_type="cuda", compiled_blocks=True, head_is_low_precision=False) == plan
    expected = step(other, ids)
    assert "forward" not in vars(other)
    assert other(input_ids=ids, labels=ids).logits is not None
    assert model(input_ids=ids, labels=ids).logits is None
    assert step(model, ids)[0].isfinite()
    assert expected[0].isfinite()
