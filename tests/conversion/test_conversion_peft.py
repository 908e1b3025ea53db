"""Models with adapters of PEFT: what is converted, by which names rules know it, and that adapters train, merge and are saved as before."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowprec.conversion.convert import convert, make_plan, revert
from lowprec.errors import UserError
from lowprec.nn import LowPrecisionLinear
from tests.builders import tiny_llama

TARGETS = ["q_proj", "down_proj"]
TOKENS = torch.arange(24).view(2, 12)
PREFIX = "base_model.model.model.layers."


def llama() -> LlamaForCausalLM:
    return tiny_llama(hidden_size=32, intermediate_size=64, use_cache=True)


def with_adapters(model: nn.Module | None = None, **settings: Any) -> Any:
    """Return a model with LoRA adapters. B is not zero, as it is at the start, so that A has a gradient too."""
    settings = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings
    model = model or llama()
    torch.manual_seed(2)
    return randomised(peft.get_peft_model(model, peft.LoraConfig(**settings)))


def randomised(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def converted(model: nn.Module) -> dict[str, str]:
    """Return the recipe of each converted layer, by name."""
    return {name: module.recipe.name for name, module in model.named_modules() if isinstance(module, LowPrecisionLinear)}


def logits(model: Any) -> Tensor:
    model.eval()
    return model(input_ids=TOKENS).logits.detach()


def gradients(model: Any) -> dict[str, Tensor]:
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# Decisions


def test_base_layers_are_converted_and_adapters_are_not():
    model = with_adapters()
    plan = convert(model, "mxfp8")
    assert len(converted(model)) == 14
    assert not any("lora" in name for name in converted(model))
    assert f"{PREFIX}0.self_attn.q_proj.base_layer" in converted(model)
    reasons = {layer.name: layer.reason for layer in plan.layers if not layer.converted}
    assert reasons.pop("base_model.model.lm_head").startswith("the output head stays")
    assert len(reasons) == 8  # A and B of two targets in two blocks
    assert set(reasons.values()) == {"adapter: small, and trained in high precision"}


def test_strict_does_not_mind_adapters():
    plan = make_plan(with_adapters(), {"recipe": "fp32", "strict": True})
    assert sum(layer.converted for layer in plan.layers) == 14


@pytest.mark.parametrize(
    "rule, names",
    [
        (r".*\.q_proj", [f"{PREFIX}{i}.self_attn.q_proj.base_layer" for i in range(2)]),
        (r"model\.layers\.1\.mlp\.down_proj", [f"{PREFIX}1.mlp.down_proj.base_layer"]),
        (r"model\.layers\.1\.mlp\.up_proj", [f"{PREFIX}1.mlp.up_proj"]),
        (r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.base_layer", [f"{PREFIX}0.self_attn.q_proj.base_layer"]),
        (r"model\.layers\.0\.self_attn\.q_proj\.lora_A\.default", [f"{PREFIX}0.self_attn.q_proj.lora_A.default"]),
        (r".*\.lora_B\..*", [f"{PREFIX}{i}.{part}.lora_B.default" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]),
        (r"lm_head", ["base_model.model.lm_head"]),
    ],
)
def test_rules_match_the_names_of_layers_without_peft(rule: str, names: list[str]):
    model = with_adapters()
    convert(model, {"recipe": "none", "rules": [{"modules": rule, "recipe": "mxfp8"}]})
    assert converted(model) == dict.fromkeys(names, "mxfp8")


@pytest.mark.parametrize(
    "rules, message",
    [
        ([r"q_proj"], r"none of the 23 linear layers; it is a part of 'model\.layers\.0\.self_attn\.q_proj', but"),
        ([r".*\.q_prj"], r"none of the 23 linear layers.*'q_proj'"),
        ([r".*\.q_proj", r".*q_proj\.base_layer"], "never applies: earlier rules match all 2 of its layers"),
    ],
)
def test_rules_that_do_nothing_are_errors_in_those_names(rules: list[str], message: str):
    model = with_adapters()
    with pytest.raises(UserError, match=message):
        convert(model, {"rules": [{"modules": rule, "recipe": "mxfp8"} for rule in rules]})
    assert converted(model) == {}


def test_a_head_that_is_trained_as_a_whole_or_by_an_adapter_is_still_the_head():
    whole, adapted = with_adapters(modules_to_save=["lm_head"]), with_adapters(target_modules=["q_proj", "lm_head"])
    for model in (whole, adapted):
        convert(model, "mxfp8")
        assert len(converted(model)) == 14
        assert not any("lm_head" in name for name in converted(model))
    rule = {"recipe": "none", "rules": [{"modules": "lm_head", "recipe": "mxfp8"}]}
    convert(whole, rule)
    assert list(converted(whole)) == ["base_model.model.lm_head.original_module", "base_model.model.lm_head.modules_to_save.default"]
    convert(adapted, rule)
    assert list(converted(adapted)) == ["base_model.model.lm_head.base_layer"]


def test_adapters_that_are_no_low_rank_layers():
    """PEFT's prompt encoder stands beside the model, which keeps its own names."""
    config = peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    plan = convert(model, {"recipe": "mxfp8", "rules": [{"modules": r"model\.layers\.0\.mlp\.up_proj", "recipe": "bf16"}]})
    assert converted(model)["base_model.model.layers.0.mlp.up_proj"] == "bf16"
    encoder = [layer for layer in plan.layers if layer.name.startswith("prompt_encoder.")]
    assert encoder
    assert all(layer.reason.startswith("adapter") for layer in encoder)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
        peft.LoraConfig(r=4, target_modules=[*TARGETS, "embed_tokens"]),
        peft.VeraConfig(r=4, target_modules=["q_proj"]),
        peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=TARGETS),
        peft.LoHaConfig(r=4, target_modules=TARGETS),
        peft.OFTConfig(oft_block_size=8, target_modules=TARGETS),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["dora", "lora-embedding", "vera", "adalora", "loha", "oft", "ia3"],
)
def test_every_kind_of_adapter_trains_over_converted_layers(config: Any):
    model = randomised(peft.get_peft_model(llama(), config))
    plain = gradients(copy.deepcopy(model))
    convert(model, "fp32")
    assert len(converted(model)) == 14
    assert all(name.endswith((".base_layer", "_proj")) for name in converted(model))
    # The products are the same fp32 sums in another order; their gradients are of the order of 1e-3 to 1.
    torch.testing.assert_close(gradients(model), plain, rtol=1e-4, atol=1e-6)


# Training, merging, saving


def test_gradients_flow_to_the_adapters_alone():
    model = with_adapters()
    plain = gradients(copy.deepcopy(model))
    exact, low = copy.deepcopy(model), copy.deepcopy(model)
    convert(exact, "fp32")
    convert(low, "mxfp8")
    found = gradients(exact)
    assert found.keys() == {name for name, _ in model.named_parameters() if "lora" in name}
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    # mxfp8 rounds to a relative 2^-4 at most, about 2^-5.5 (2 %) on average, in each product of two blocks: far from a change of direction.
    for name, grad in gradients(low).items():
        assert not torch.equal(grad, plain[name])
        assert nn.functional.cosine_similarity(grad.flatten(), plain[name].flatten(), dim=0) > 0.97


def test_adapters_merge_into_converted_layers_and_out_of_them():
    model = with_adapters()
    before = logits(model)
    convert(model, "fp32")
    torch.testing.assert_close(logits(model), before)
    layer = model.get_submodule(f"{PREFIX}0.self_attn.q_proj")
    weight, delta = layer.base_layer.weight.clone(), layer.get_delta_weight("default")
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight + delta)
    torch.testing.assert_close(logits(model), before)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), before)
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert len(converted(merged)) == 14
    torch.testing.assert_close(logits(merged), before)


def test_merged_weights_are_quantised_anew():
    model = with_adapters()
    convert(model, "mxfp8")
    gradients(model)
    merged = model.merge_and_unload()
    fresh = llama()
    fresh.load_state_dict(merged.state_dict())
    convert(fresh, "mxfp8")
    assert torch.equal(logits(merged), logits(fresh))


def test_revert_restores_the_model_that_was_there():
    model = with_adapters()
    names, before = [*model.state_dict()], logits(model)
    convert(model, {"recipe": "nvfp4", "rules": [{"modules": r".*\.lora_A\..*", "recipe": "mxfp8"}]})
    assert not torch.equal(logits(model), before)
    assert revert(model) == 14 + 4
    assert [*model.state_dict()] == names
    assert torch.equal(logits(model), before)


def test_adapters_may_be_added_to_a_converted_model():
    first, second = llama(), with_adapters()
    convert(first, "mxfp8")
    first = with_adapters(first)
    convert(second, "mxfp8")
    assert converted(first) == converted(second)
    assert torch.equal(logits(first), logits(second))


def test_a_saved_adapter_holds_no_recipe_state(tmp_path: Path):
    """A recipe that keeps state adds buffers to base layers: they are no part of an adapter."""
    model = with_adapters()
    model.save_pretrained(tmp_path / "plain")
    convert(model, "nvfp4")
    model.save_pretrained(tmp_path / "low")
    plain, low = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "low"))
    assert plain.keys() == low.keys()
    assert all(torch.equal(low[name], value) for name, value in plain.items())
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "low")
    revert(model)
    assert torch.equal(logits(loaded), logits(model))
