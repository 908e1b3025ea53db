"""Experts of mixtures give the same results in native FP8 as emulated on a CPU."""

import copy
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import lowprec
from lowprec.integrations.compile import compile_blocks
from lowprec.testing import sqnr_db

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_local_experts": 4}


@pytest.mark.parametrize("recipe", ["fp8_blockwise", "fp8_rowwise", "mxfp4"])
@pytest.mark.parametrize("kind", [MixtralExperts, GptOssExperts])
def test_products_are_the_cpus(kind: Any, recipe: str):
    torch.manual_seed(0)
    module = kind(MixtralConfig(**SIZES) if kind is MixtralExperts else GptOssConfig(**SIZES)).bfloat16().train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 2 else parameter.shape[-1] ** -0.5))
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(333)])
    chosen[chosen == 2] = 4  # one expert has no tokens, some tokens belong to another rank's expert
    x, weights, g = torch.randn(333, 256).bfloat16(), torch.rand(333, 2), torch.randn(333, 256).bfloat16()
    found = []
    for device in ("cpu", "cuda"):
        here = copy.deepcopy(module).to(device)
        plan = lowprec.convert(here, {"recipe": recipe, "skip_slow": False})
        assert {layer.status for layer in plan.layers} == {"native" if device == "cuda" and recipe != "mxfp4" else "emulated"}
        tokens = x.to(device).detach().requires_grad_()
        y = here(tokens, chosen.to(device), weights.to(device))
        y.backward(g.to(device))
        found.append([t.detach().double().cpu() for t in (y, tokens.grad, *(parameter.grad for parameter in here.parameters()))])
    for cpu, gpu in zip(*found, strict=True):
        assert sqnr_db(cpu, gpu) > 35  # bf16 rounds the up projection's result, which may change a code of the down projection


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mixture_trains(compiled: bool):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = MixtralForCausalLM(MixtralConfig(**SIZES, **sizes)).to("cuda", torch.bfloat16).train()
    lowprec.convert(model, {"recipe": "fp8_blockwise", "skip_slow": False}, compiled=compiled)
    torch._dynamo.reset()
    compile_blocks(model, "blocks" if compiled else "off", "cuda")
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    batch = torch.arange(128, device="cuda").repeat(4, 2)
    for _ in range(12):
        losses.append(model(input_ids=batch, labels=batch, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1
