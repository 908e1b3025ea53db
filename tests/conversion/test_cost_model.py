"""The model of where FP8 pays, and the plan where it does not."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import lowprec
from lowprec.conversion.convert import make_plan
from lowprec.conversion.cost_model import payoff
from lowprec.gemm import BACKENDS
from tests.nn.native import on_cpu

MEASURED = {
    (2048, 1024, 1024): 0.59,
    (2048, 1024, 2048): 0.65,
    (2048, 1024, 4096): 0.81,
    (2048, 2048, 1024): 0.65,
    (2048, 2048, 2048): 0.82,
    (2048, 2048, 4096): 0.96,
    (2048, 4096, 1024): 0.8,
    (2048, 4096, 2048): 0.95,
    (2048, 4096, 4096): 1.11,
    (4096, 1024, 1024): 0.64,
    (4096, 1024, 2048): 0.79,
    (4096, 1024, 4096): 0.94,
    (4096, 2048, 1024): 0.78,
    (4096, 2048, 2048): 0.97,
    (4096, 2048, 4096): 1.11,
    (4096, 4096, 1024): 0.92,
    (4096, 4096, 2048): 1.1,
    (4096, 4096, 4096): 1.22,
    (8192, 1024, 1024): 0.72,
    (8192, 1024, 2048): 0.92,
    (8192, 1024, 4096): 1.04,
    (8192, 2048, 1024): 0.91,
    (8192, 2048, 2048): 1.1,
    (8192, 2048, 4096): 1.19,
    (8192, 4096, 1024): 1.02,
    (8192, 4096, 2048): 1.18,
    (8192, 4096, 4096): 1.29,
    (16384, 1024, 1024): 0.8,
    (16384, 1024, 2048): 1.01,
    (16384, 1024, 4096): 1.08,
    (16384, 2048, 1024): 0.99,
    (16384, 2048, 2048): 1.13,
    (16384, 2048, 4096): 1.24,
    (16384, 4096, 1024): 1.07,
    (16384, 4096, 2048): 1.23,
    (16384, 4096, 4096): 1.35,
}
"""M, N, K: fp8_blockwise over bf16, the host ahead; benchmarks/payoff_grid.py on an H100 (docs/experiments.md)."""


@pytest.mark.parametrize("shape", MEASURED)
def test_the_model_is_near_the_measurement(shape: tuple[int, int, int]):
    M, N, K = shape
    modelled = payoff(N, K, "1x128", M, compiled=True)
    assert modelled.speedup == pytest.approx(MEASURED[shape], rel=0.14)
    assert not modelled.pays or MEASURED[shape] >= 0.97


def test_more_tokens_and_larger_layers_pay_more():
    sizes = [payoff(n, n, "1x128", 2**20).speedup for n in (256, 1024, 4096, 16384)]
    assert sizes == sorted(sizes)
    tokens = [payoff(4096, 4096, "1x128", 2**i, compiled=True).speedup for i in range(8, 20)]
    assert tokens == sorted(tokens)
    assert payoff(4096, 4096, "128x128", 8192).speedup > payoff(4096, 4096, "1x128", 8192).speedup
    assert payoff(4096, 4096, "1x128", 2048, compiled=True).speedup > payoff(4096, 4096, "1x128", 2048).speedup


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(1024, 1024, bias=False)
        self.large = nn.Linear(8192, 8192, bias=False)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Layers:
    on_cpu(monkeypatch)
    with torch.device("meta"):
        return Layers()


def statuses(plan: lowprec.Plan) -> dict[str, str]:
    return {layer.name: layer.status for layer in plan.layers}


def test_the_plan_keeps_a_layer_in_high_precision_that_fp8_would_slow_down(model: Layers):
    plan = make_plan(model, "fp8_blockwise", device="cuda")
    assert statuses(plan) == {"small": "kept in high precision", "large": "native"}
    small = plan.layers[0]
    assert not small.blocked
    assert small.reason.startswith("fp8_blockwise would run at 0.")
    assert "of bf16's speed with 2048 tokens a pass: the host can't ask for its kernels as fast" in small.reason
    make_plan(model, {"recipe": "fp8_blockwise", "strict": True}, device="cuda")  # it is no failure


def test_converting_does_what_the_plan_says(monkeypatch: pytest.MonkeyPatch):
    on_cpu(monkeypatch)
    model = nn.ModuleDict({"small": nn.Linear(256, 256)})
    assert statuses(lowprec.convert(model, "fp8_blockwise", device="cuda")) == {"small": "kept in high precision"}
    assert type(model["small"]) is nn.Linear
    assert statuses(lowprec.convert(model, {"recipe": "fp8_blockwise", "skip_slow": False}, device="cuda")) == {"small": "native"}


@pytest.mark.parametrize(
    "precision",
    [
        {"recipe": "fp8_blockwise", "skip_slow": False},
        {"recipe": "fp8_blockwise", "backend": "hopper"},
        {"recipe": "bf16", "rules": [{"modules": "small|large", "recipe": "fp8_blockwise"}]},
    ],
)
def test_layers_requested_by_name_are_converted(model: Layers, precision: dict):
    assert statuses(make_plan(model, precision, device="cuda")) == {"small": "native", "large": "native"}


def test_the_tokens_of_a_pass_and_compiling_decide(model: Layers):
    with torch.device("meta"):
        model.small = nn.Linear(4096, 4096, bias=False)
    assert statuses(make_plan(model, "fp8_blockwise", device="cuda"))["small"] == "kept in high precision"
    assert statuses(make_plan(model, "fp8_blockwise", device="cuda", tokens=16384))["small"] == "native"
    assert statuses(make_plan(model, "fp8_blockwise", device="cuda", compiled=True))["small"] == "native"


def test_speed_does_not_decide_about_emulation(model: Layers):
    assert set(statuses(make_plan(model, "mxfp4", device="cuda")).values()) == {"emulated"}
    assert set(statuses(make_plan(model, "fp8_blockwise", device="cpu")).values()) == {"native"}


def test_experts_stay_in_high_precision_on_a_gpu_unless_requested(monkeypatch: pytest.MonkeyPatch):
    on_cpu(monkeypatch)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1, "num_attention_heads": 32, "vocab_size": 64}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**sizes))

    def experts(precision: Any) -> set[str]:
        plan = make_plan(model, precision, device="cuda", tokens=16384)
        return {layer.status for layer in plan.layers if layer.experts > 1}

    assert experts("fp8_blockwise") == {"kept in high precision"}
    assert experts({"recipe": "fp8_blockwise", "skip_slow": False}) == {"native"}
    assert experts({"recipe": "bf16", "rules": [{"modules": r".*\.experts\..*", "recipe": "fp8_blockwise"}]}) == {"native"}
    assert experts("mxfp4") == {"emulated"}


@pytest.mark.parametrize("silent", ["hopper", "scaled_mm"])
def test_a_layer_stays_converted_if_a_backend_of_fprop_or_dgrad_states_no_cost(model: Layers, silent: str, monkeypatch: pytest.MonkeyPatch):
    """fprop and dgrad of fp8_blockwise go to `hopper`; `scaled_mm` is not asked."""
    monkeypatch.setattr(type(BACKENDS[silent]), "cost", lambda self, layer: None)
    assert (statuses(make_plan(model, "fp8_blockwise", device="cuda"))["small"] == "native") is (silent == "hopper")


def test_a_wgrad_in_bf16_leaves_the_other_products_blocks():
    """{base: fp8_blockwise, wgrad: bf16} quantises as blocks do, not as scales per row."""
    blocks = payoff(11008, 4096, "", 2048, compiled=True, fprop_kind="1x128")
    rows = payoff(11008, 4096, "", 2048, compiled=True, fprop_kind="row")
    assert rows.speedup < 1 < blocks.speedup < payoff(11008, 4096, "1x128", 2048, compiled=True).speedup
    assert payoff(11008, 4096, "", 2048, compiled=True) == rows
