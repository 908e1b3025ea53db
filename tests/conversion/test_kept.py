"""Weights that stay in high precision by what they are: heads, gates, what a model keeps in fp32; matrices that are no linear layers."""

import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lowprec.conversion.convert import convert, make_plan
from lowprec.conversion.plan import LayerPlan
from lowprec.errors import UserError

SIZES: dict[str, Any] = {"vocab_size": 640, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
MIXTURE = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4}
T5 = {"vocab_size": 640, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 16}
SWITCH = {**T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
JETMOE = {
    "vocab_size": 640,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 96,
}
HEAD = "the output head stays in high precision unless a rule names it"
GATE = "a gate of experts stays in high precision unless a rule names it"


def meta(kind: str, **settings: Any) -> nn.Module:
    """Return a model of transformers without memory, by the first part of its class's name and the rest."""
    family = kind.partition("For")[0].removesuffix("Model")
    with torch.device("meta"):
        return getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**settings))


def kept(model: nn.Module, precision: Any = "mxfp8") -> dict[str, LayerPlan]:
    """Return the plans of the layers that stay, with # for the numbers in their names."""
    plan = make_plan(model, precision, device="cpu")
    return {re.sub(r"\d+", "#", layer.name): layer for layer in plan.layers if not layer.converted}


@pytest.mark.parametrize(
    ("kind", "settings", "heads"),
    [
        ("BertForQuestionAnswering", SIZES, {"qa_outputs"}),
        ("BertForPreTraining", SIZES, {"cls.predictions.decoder", "cls.seq_relationship"}),
        ("RobertaForSequenceClassification", SIZES, {"classifier.out_proj"}),
        (
            "DistilBertForSequenceClassification",
            {"vocab_size": 640, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
            {"classifier"},
        ),
        ("ElectraForSequenceClassification", SIZES, {"classifier.out_proj"}),
        ("GPT2ForTokenClassification", {"n_embd": 64, "n_layer": 2, "n_head": 4}, {"classifier"}),
        ("RwkvForCausalLM", {"vocab_size": 640, "hidden_size": 64, "num_hidden_layers": 2}, {"head"}),
        ("ViTForImageClassification", SIZES, {"classifier"}),
        ("LlamaForQuestionAnswering", SIZES, {"qa_outputs"}),
        ("LlamaModel", {**SIZES, "vocab_size": 64}, set()),  # its last layer has as many outputs as the vocabulary
    ],
)
def test_heads_of_transformers(kind: str, settings: dict[str, Any], heads: set[str]):
    found = kept(meta(kind, **settings))
    assert found.keys() == heads
    assert {layer.reason for layer in found.values()} <= {HEAD}
    assert not any(layer.blocked for layer in found.values())


@pytest.mark.parametrize(
    ("kind", "settings", "gates"),
    [
        ("JetMoeForCausalLM", {**JETMOE, "num_local_experts": 4}, {"mlp.router.layer", "self_attention.experts.router.layer"}),
        ("GraniteMoeForCausalLM", MIXTURE, {"block_sparse_moe.router.weight"}),
        ("MixtralForCausalLM", MIXTURE, {"mlp.gate.weight"}),
        ("Qwen2MoeForCausalLM", {**SIZES, "num_key_value_heads": 2, "num_experts": 4}, {"mlp.gate.weight", "mlp.shared_expert_gate"}),
        ("SwitchTransformersForConditionalGeneration", SWITCH, {"mlp.router.classifier"}),
    ],
)
def test_gates_of_transformers(kind: str, settings: dict[str, Any], gates: set[str]):
    found = {name: layer for name, layer in kept(meta(kind, **settings)).items() if layer.reason == GATE}
    assert {re.sub(r".*(layer|layers)\.#\.", "", name) for name in found} == gates
    assert all(layer.experts == 1 for layer in found.values())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"q": nn.Linear(64, 64), "o": nn.Linear(64, 64)})
        self.mlp = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))


class Stacked(nn.Module):
    """Experts as torchtitan holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.zeros(4, 32, 64)), nn.Parameter(torch.zeros(4, 64, 32))


def titan() -> nn.Module:
    """Return a model that is built as torchtitan's: a ModuleDict of blocks, and a head that is called `output`."""
    block = nn.ModuleDict(
        {"attention": Block(), "moe": nn.ModuleDict({"experts": Stacked(), "pick": nn.Linear(64, 4), "up": nn.Linear(64, 8)})}
    )
    return nn.ModuleDict(
        {
            "tok_embeddings": nn.Embedding(640, 64),
            "layers": nn.ModuleDict({"0": block}),
            "norm": nn.RMSNorm(64),
            "output": nn.Linear(64, 640),
        }
    )


def several_heads() -> nn.Module:
    policy = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 7))
    blocks = nn.Sequential(*[Block() for _ in range(2)])
    later = nn.ModuleList([nn.Linear(64, 9) for _ in range(2)])
    return nn.ModuleDict({"inputs": nn.Linear(10, 64), "blocks": blocks, "policy": policy, "value": nn.Linear(64, 1), "later": later})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (titan(), {"output": HEAD, "layers.#.moe.pick": GATE}),
        (several_heads(), {"policy.#": HEAD, "value": HEAD, "later.#": HEAD}),
        (nn.Sequential(nn.Embedding(640, 64), Block(), Block(), nn.Linear(64, 5)), {"#": HEAD}),
        (nn.ModuleDict({"embed": nn.Embedding(10, 8), "body": nn.Linear(8, 8), "out": nn.Linear(8, 10)}), {"out": HEAD}),
        (nn.ModuleDict({"experts": nn.ModuleList([Block() for _ in range(4)]), "choose": nn.Linear(64, 4)}), {"choose": GATE}),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), {}),
        (Block(), {}),
    ],
)
def test_heads_and_gates_of_other_models(model: nn.Module, expected: dict[str, str]):
    found = {name: layer.reason for name, layer in kept(model).items() if not layer.blocked}
    assert found == expected


def test_what_a_model_keeps_in_fp32_stays_unless_a_rule_names_it():
    model = meta("T5ForConditionalGeneration", **T5)
    reason = "the model keeps it in fp32 ('wo' of _keep_in_fp32_modules) unless a rule names it"
    assert {name for name, layer in kept(model).items() if layer.reason == reason} == {
        f"{part}.block.#.layer.#.DenseReluDense.wo" for part in ("encoder", "decoder")
    }
    rules = [{"modules": r".*\.wo", "recipe": "mxfp8"}]
    assert kept(model, {"recipe": "mxfp8", "rules": rules}).keys() == {"lm_head"}
    part = nn.ModuleDict({"exact": nn.Linear(8, 8), "inexact": nn.Linear(8, 8)})
    part._keep_in_fp32_modules_strict = ["exact"]  # pyright: ignore[reportArgumentType]
    assert kept(nn.Sequential(part)).keys() == {"#.exact"}


class Flat(nn.Module):
    """Experts in one matrix, as DBRX holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(4 * 16, 8))
        self.grid = nn.Parameter(torch.zeros(2, 3, 16, 8))
        self.pos_embed = nn.Parameter(torch.zeros(10, 8))
        self.scale = nn.Parameter(torch.zeros(8, 8))
        self.row = nn.Parameter(torch.zeros(1, 8))


class Packed(nn.Module):
    """A layer as GPTQ and AWQ make it: eight weights of four bits in each int32."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 64, 32
        self.register_buffer("qweight", torch.zeros(8, 32, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(1, 4, dtype=torch.int32))


class TakenAway(nn.Linear):
    """A linear layer as compressed-tensors makes it: a packed weight in the place of the weight."""

    def __init__(self) -> None:
        super().__init__(64, 32, bias=False)
        del self.weight
        self.weight_packed = nn.Parameter(torch.zeros(32, 8, dtype=torch.int32), requires_grad=False)


def test_matrices_that_are_no_linear_layers_are_listed_and_counted():
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "apart": nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
            "lstm": nn.LSTM(8, 8, bidirectional=True),
            "cell": nn.GRUCell(8, 8),
            "both": nn.Bilinear(8, 8, 4),
            "flat": Flat(),
            "packed": Packed(),
            "taken": TakenAway(),
            "embedding": nn.Embedding(10, 8),
            "norm": nn.LayerNorm((8, 8)),
            "conv": nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
        }
    )
    plan = convert(model, "mxfp8")
    assert [layer.name for layer in plan.converted] == ["plain"]
    found = {layer.name: (layer.experts, *layer.shape) for layer in plan.layers}
    assert found == {
        "plain": (1, 8, 8),
        "attention.in_proj_weight": (1, 24, 8),
        "attention.out_proj": (1, 8, 8),
        "apart.q_proj_weight": (1, 8, 8),
        "apart.k_proj_weight": (1, 8, 4),
        "apart.v_proj_weight": (1, 8, 6),
        "apart.out_proj": (1, 8, 8),
        **{f"lstm.weight_{way}_l0{back}": (1, 32, 8) for way in ("ih", "hh") for back in ("", "_reverse")},
        **{f"cell.weight_{way}": (1, 24, 8) for way in ("ih", "hh")},
        "both.weight": (4, 8, 8),
        "flat.w1": (1, 64, 8),
        "flat.grid": (6, 16, 8),
        "packed.qweight": (1, 32, 64),
        "taken.weight_packed": (1, 32, 64),
    }
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert reasons["lstm.weight_ih_l0"] == "LSTM multiplies by it itself, and is no linear layer"
    assert reasons["flat.w1"] == "a matrix of Flat, which does not say how it multiplies by it"
    assert reasons["packed.qweight"] == "Packed is already quantised: its 'qweight' is int32"
    weights = sum(experts * N * K for experts, N, K in found.values())
    assert plan.totals()["converted_weights"] == 64 / weights


def test_strict_refuses_matrices_that_are_known_to_be_multiplied():
    with pytest.raises(UserError, match=r"precision\.strict: weight_ih_l0 can't be converted: LSTM multiplies by it itself"):
        convert(nn.LSTM(8, 8), {"recipe": "fp32", "strict": True})
    model = nn.Sequential(nn.Linear(8, 8), Flat())
    assert [layer.name for layer in convert(model, {"recipe": "fp32", "strict": True}).converted] == ["0"]
    with pytest.raises(UserError, match=r"precision\.strict: 1\.w1 can't be converted: a matrix of Flat"):
        convert(model, {"recipe": "fp32", "strict": True, "rules": [{"modules": r"1\.w1", "recipe": "fp32"}]})
