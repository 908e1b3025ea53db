"""Shares of weights and operations in a plan, and its warning where little runs in the recipe."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import lowprec
from lowprec.conversion.convert import make_plan
from lowprec.conversion.shares import format_shares
from lowprec.nn.experts import per_token
from tests.nn.native import on_cpu


def layers(**sizes: int) -> nn.ModuleDict:
    with torch.device("meta"):
        return nn.ModuleDict({name: nn.Linear(size, size) for name, size in sizes.items()})


def test_shares_of_weights_and_operations_count_the_experts_of_a_token():
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=8, num_experts_per_tok=2, num_key_value_heads=2, **sizes))
    totals = make_plan(model, "mxfp4").totals()
    attention, kept = 4 * 32 * 32, 64 * 32 + 8 * 32  # the output head and the router
    expert = 3 * 32 * 64
    low = attention + 8 * expert
    assert totals["weights"] == pytest.approx({"mxfp4": low / (low + kept), "high precision": kept / (low + kept)})
    low = attention + 2 * expert
    assert totals["flops"] == pytest.approx({"mxfp4": low / (low + kept), "high precision": kept / (low + kept)})
    assert totals["weights"]["mxfp4"] == pytest.approx(totals["converted_weights"])


def test_a_stack_of_unknown_use_counts_whole():
    assert per_token(nn.Module(), 6) == 6
    assert make_plan(nn.MultiheadAttention(8, 2), "mxfp4").totals()["flops"] == {"high precision": 1.0}


def test_shares_as_text():
    assert format_shares({"high precision": 0.25, "mxfp4": 0.75}) == "75.0% mxfp4, 25.0% high precision"
    assert make_plan(nn.ReLU(), "mxfp4").totals()["weights"] == {}


def test_a_recipe_that_pays_nowhere_says_so_and_how_to_force_it(monkeypatch: pytest.MonkeyPatch):
    on_cpu(monkeypatch)
    model = layers(small=1024, lm_head=4096)  # the head outweighs all
    (warning,) = make_plan(model, "fp8_blockwise", device="cuda").warnings
    assert warning.startswith("fp8_blockwise runs in none of the 2 linear layers: it does not pay (small: fp8_blockwise would run at 0.")
    assert warning.endswith("precision.skip_slow: false runs all layers in it nevertheless")
    forced = make_plan(model, {"recipe": "fp8_blockwise", "skip_slow": False}, device="cuda")
    assert [layer.name for layer in forced.converted] == ["small"]
    assert forced.warnings[0].endswith("the output head stays in high precision unless a rule names it (lm_head)")


def test_half_of_the_weights_is_enough(monkeypatch: pytest.MonkeyPatch):
    on_cpu(monkeypatch)
    assert not make_plan(layers(large=8192, small=2048), "fp8_blockwise", device="cuda").warnings
    (warning,) = make_plan(layers(large=8192, **{f"small{n}": 2048 for n in range(17)}), "fp8_blockwise", device="cuda").warnings
    assert warning.startswith("fp8_blockwise runs in 48.5% of the linear weights only: it does not pay (small0: ")


@pytest.mark.parametrize("precision", ["bf16", "fp32", "none", {"recipe": "mxfp4", "rules": [{"modules": "a|b", "recipe": "none"}]}])
def test_no_warning_where_high_precision_was_asked_for(precision: Any):
    assert not make_plan(layers(a=32, b=32), precision).warnings


def test_the_asked_recipe_and_the_warnings_are_in_the_plan(monkeypatch: pytest.MonkeyPatch):
    on_cpu(monkeypatch)
    data = make_plan(layers(small=1024), "fp8_blockwise", device="cuda").to_dict()
    assert data["recipe"] == "fp8_blockwise"
    assert len(data["warnings"]) == 1
    assert lowprec.convert(nn.Linear(4, 4), "none").recipe is None
