"""The choice of Liger's kernels. No test here runs them: they need CUDA."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.models.llama import modeling_llama

from lowprec.errors import UserError
from lowprec.integrations import apply_liger, liger, plan_liger
from tests.builders import tiny_config, tiny_llama

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EAGER = {"device_type": "cuda", "compiled_blocks": False, "head_is_low_precision": False}
ALL = ("rope", "rms_norm", "swiglu", "fused_linear_cross_entropy")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger is not installed")


def llama(**config: Any) -> LlamaForCausalLM:
    return tiny_llama(**SIZES, use_cache=True, **config).eval()


def reasons(plan) -> dict[str, str]:
    return {kernel.name: kernel.reason for kernel in plan.kernels}


def test_all_apply_to_a_plain_llama():
    plan = plan_liger(llama(), "auto", **EAGER)
    assert plan.applied == ALL
    assert "for the whole process" in reasons(plan)["rope"]
    assert "this instance only" in reasons(plan)["rms_norm"]
    assert plan == plan_liger(llama(), "on", **EAGER)
    assert str(plan).count("\n") == 3


def test_off():
    plan = plan_liger(llama(), "off", **EAGER)
    assert plan.applied == ()
    assert set(reasons(plan).values()) == {"kernels.liger: off"}
    with pytest.raises(UserError, match="expected 'auto', 'on' or 'off', got True"):
        plan_liger(llama(), True, **EAGER)


def obstacle(model, match: str, **settings) -> None:
    """Assert that "auto" applies nothing and gives the reason, and that "on" raises an error with the same words."""
    plan = plan_liger(model, "auto", **(EAGER | settings))
    assert plan.applied == ()
    assert all(match in reason for reason in reasons(plan).values())
    with pytest.raises(UserError, match=r"kernels\.liger: on, but ") as error:
        plan_liger(model, "on", **(EAGER | settings))
    assert match in str(error.value)
    assert "\n" not in str(error.value)


def test_needs_cuda():
    obstacle(llama(), "Liger's kernels need CUDA, not cpu", device_type="cpu")


def test_needs_liger(monkeypatch):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    obstacle(llama(), "pip install 'lowprec[liger]'")


def test_needs_a_known_model():
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32)
    )
    obstacle(opt, "no kernels for the model type 'opt'")
    obstacle(nn.Linear(2, 2), "no kernels for the model type 'None'")

    class MyLlama(LlamaForCausalLM):
        pass

    obstacle(MyLlama(tiny_config(**SIZES)), "MyLlama is not one of them")


def test_compiled_blocks_leave_the_small_kernels_to_the_compiler(monkeypatch):
    settings = EAGER | {"compiled_blocks": True}
    for version, has_note in (("2.11.0+cu130", True), ("2.12.1", False)):
        monkeypatch.setattr(torch, "__version__", version)
        plan = plan_liger(llama(), "auto", **settings)
        assert plan.applied == ("fused_linear_cross_entropy",)
        assert all("left to the compiler" in reasons(plan)[name] for name in ("rope", "rms_norm", "swiglu"))
        assert ("'float' object has no attribute 'to'" in reasons(plan)["rms_norm"]) is has_note


def test_low_precision_head_is_not_bypassed():
    plan = plan_liger(llama(), "auto", **(EAGER | {"head_is_low_precision": True}))
    assert plan.applied == ("rope", "rms_norm", "swiglu")
    assert "bypassing the layer" in reasons(plan)["fused_linear_cross_entropy"]
    with pytest.raises(UserError, match="on, but no kernel applies"):
        plan_liger(llama(), "on", device_type="cuda", compiled_blocks=True, head_is_low_precision=True)


def test_heads_that_the_fused_loss_does_not_compute():
    class Head(nn.Linear):
        pass

    model = llama()
    model.lm_head = Head(32, 64, bias=False)
    assert "lm_head is a Head" in reasons(plan_liger(model, "auto", **EAGER))["fused_linear_cross_entropy"]
    model.lm_head = nn.Linear(32, 64)
    assert "has a bias" in reasons(plan_liger(model, "auto", **EAGER))["fused_linear_cross_entropy"]
    assert "has no lm_head" in reasons(plan_liger(LlamaModel(tiny_config(**SIZES)), "auto", **EAGER))["fused_linear_cross_entropy"]


def test_kernels_that_the_architecture_can_not_use():
    gelu = plan_liger(llama(hidden_act="gelu"), "auto", **EAGER)
    assert "swiglu" not in gelu.applied
    assert "is gelu, not silu" in reasons(gelu)["swiglu"]
    gemma = plan_liger(GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16)), "auto", **EAGER)
    assert "Liger has none for the model type 'gemma'" in reasons(gemma)["swiglu"]
    granite = plan_liger(GraniteForCausalLM(GraniteConfig(**SIZES)), "auto", **EAGER)
    assert "Liger leaves it off" in reasons(granite)["fused_linear_cross_entropy"]


def test_planning_and_off_change_nothing():
    model = llama()
    before = dict(vars(modeling_llama))
    plan_liger(model, "auto", **EAGER)
    apply_liger(model, "off", **EAGER)
    apply_liger(model, "auto", **(EAGER | {"device_type": "cpu"}))
    assert dict(vars(modeling_llama)) == before
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.model.norm)


def test_only_the_instance_is_patched(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)  # restored after the test
    before = dict(vars(modeling_llama))
    model, other = llama(), llama()
    assert apply_liger(model, "auto", **EAGER).applied == ALL
    layer = model.model.layers[1]
    for module in (model, model.model.norm, layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
        assert "forward" in vars(module)
    assert not any("forward" in vars(module) for module in other.modules())
    changed = {name for name, value in vars(modeling_llama).items() if before.get(name) is not value}
    assert changed == {"apply_rotary_pos_emb"}


def test_fused_loss_alone_keeps_the_logits_of_evaluation():
    ids = torch.arange(12).view(1, 12)
    model = llama()
    expected = model(ids, labels=ids)
    plan = apply_liger(model, "auto", **(EAGER | {"compiled_blocks": True}))
    assert plan.applied == ("fused_linear_cross_entropy",)
    out = model(ids, labels=ids)  # outside training, Liger's forward calls lm_head, on any device
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss)
