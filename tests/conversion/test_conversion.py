"""convert, revert and make_plan on models of transformers: what is decided, what is kept, and what is refused."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lowprec
from lowprec.conversion.config import ConversionConfig, RuleConfig, parse_conversion
from lowprec.conversion.convert import convert, make_plan, revert
from lowprec.errors import UserError
from lowprec.nn import LowPrecisionLinear
from lowprec.recipe import GEMMS, library
from lowprec.training.control.precision import parse_precision
from tests.builders import tiny_llama

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{i}.{part}" for i in range(12) for part in PARTS]


def deep_llama(*, tied: bool = False, layers: int = 12, device: str = "cpu") -> LlamaForCausalLM:
    """Return a Llama of twelve layers, so that layers.1 is a part of layers.10 and layers.11."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_key_value_heads": 1}
    with torch.device(device):
        return tiny_llama(**sizes, tie_word_embeddings=tied)


class Narrow(nn.Linear):
    """A subclass of nn.Linear with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


def converted(model: nn.Module) -> dict[str, str]:
    """Return the recipe of each converted layer, by name."""
    return {name: module.recipe.name for name, module in model.named_modules() if isinstance(module, LowPrecisionLinear)}


def linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def run(model: nn.Module) -> Tensor:
    return model(torch.arange(12).view(2, 6)).logits.detach()


# Decisions


def test_every_linear_but_the_head_takes_the_recipe():
    model = deep_llama()
    plan = convert(model, "fp8_blockwise")
    assert converted(model) == dict.fromkeys(LAYERS, "fp8_blockwise")
    assert [layer.name for layer in plan.layers] == [*LAYERS, "lm_head"]
    head = plan.layers[-1]
    assert (head.recipe, head.rule, head.blocked) == (None, "default", False)
    assert head.reason == "the output head stays in high precision unless a rule names it"
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding


def test_the_head_takes_the_recipe_of_a_rule_that_names_it():
    model = deep_llama(layers=1)
    convert(model, {"recipe": "fp8_blockwise", "rules": [{"modules": "lm_head", "recipe": "bf16"}]})
    assert converted(model)["lm_head"] == "bf16"


@pytest.mark.parametrize("rule", [".*", r".*head"])
def test_a_rule_may_name_the_head_by_an_expression(rule):
    model = deep_llama(layers=1)
    convert(model, {"recipe": "none", "rules": [{"modules": rule, "recipe": "mxfp8"}]})
    assert "lm_head" in converted(model)


def test_a_tied_head_stays_too():
    model = deep_llama(tied=True, layers=1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plan = convert(model, "fp8_blockwise")
    assert plan.layers[-1].name == "lm_head"
    assert not plan.layers[-1].converted
    assert len(plan.converted) == 7


def test_a_head_without_transformers_is_recognised_by_its_tie_or_its_name():
    tied = nn.ModuleDict({"embed": nn.Embedding(10, 8), "body": nn.Linear(8, 8), "out": nn.Linear(8, 10, bias=False)})
    tied["out"].weight = tied["embed"].weight
    convert(tied, "bf16")
    assert converted(tied) == {"body": "bf16"}
    for name in ("lm_head", "embed_out", "output_projection", "score", "classifier"):
        model = nn.ModuleDict({"body": nn.Linear(8, 8), name: nn.Linear(8, 8)})
        convert(model, "bf16")
        assert converted(model) == {"body": "bf16"}
    other = nn.ModuleDict({"lm_head_norm": nn.Linear(8, 8), "my_score": nn.Linear(8, 8)})  # whole names, not parts of them
    convert(other, "bf16")
    assert converted(other) == {"lm_head_norm": "bf16", "my_score": "bf16"}


def test_the_head_that_a_model_names_itself():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.readout = nn.Linear(8, 8), nn.Linear(8, 8)

        def get_output_embeddings(self):
            return self.readout

    model = Model()
    convert(model, "bf16")
    assert converted(model) == {"body": "bf16"}


def test_gpt2_runs_all_linear_weights_but_the_head():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)).eval()  # it has dropout
    before, keys, weight = run(model), list(model.state_dict()), model.transformer.h[0].attn.c_attn.weight
    plan = convert(model, "fp8_blockwise")
    names = [layer.name.removeprefix("transformer.h.0.") for layer in plan.converted]
    assert names == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert {layer.kind for layer in plan.converted} == {"Conv1D"}
    assert [layer.name for layer in plan.layers if not layer.converted] == ["lm_head"]
    assert plan.layers[0].shape == (96, 32)  # N x K, although its weight is K x N
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, Conv1D)
    assert not isinstance(layer, nn.Linear)  # others tell by that how its weight lies
    assert 0 < (run(model) - before).norm() / before.norm() < 0.1
    assert list(model.state_dict()) == keys
    assert model.transformer.h[0].attn.c_attn.weight is weight
    assert revert(model) == 4
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
    assert torch.equal(run(model), before)


def test_a_subclass_with_a_forward_of_its_own_stays_in_high_precision():
    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "narrow": Narrow(8, 8)})
    plan = convert(model, "bf16")
    assert converted(model) == {"plain": "bf16"}
    assert plan.layers[1].blocked
    assert plan.layers[1].reason == "Narrow is a subclass of nn.Linear with a forward of its own"
    assert type(model["narrow"]) is Narrow


def test_a_recipe_of_none_touches_nothing():
    model = deep_llama(layers=1)
    plan = convert(model, "none")
    assert converted(model) == {}
    assert {layer.reason for layer in plan.layers} == {"the recipe is 'none'"}
    assert not any(layer.blocked for layer in plan.layers)


def test_a_single_linear_is_a_model():
    model = nn.Linear(8, 8)
    plan = convert(model, "bf16")
    assert isinstance(model, LowPrecisionLinear)
    assert [layer.name for layer in plan.layers] == [""]
    assert revert(model) == 1


def test_a_module_in_two_places_is_one_layer():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert [layer.name for layer in convert(model, "bf16").layers] == ["a"]
    assert revert(model) == 1


# Rules


def test_the_first_rule_that_matches_decides():
    model = deep_llama()
    rules = [
        {"modules": r"model\.layers\.1\..*", "recipe": "none"},
        {"modules": r"model\.layers\.(1|2)\.mlp\..*", "recipe": "mxfp8"},
        {"modules": r".*down_proj", "recipe": {"base": "fp8_blockwise", "fprop": "bf16"}},
    ]
    plan = convert(model, {"recipe": "fp8_rowwise", "rules": rules})
    got = converted(model)
    assert not any(name.startswith("model.layers.1.") for name in got)
    assert got["model.layers.10.mlp.up_proj"] == "fp8_rowwise"  # the rule for layers.1 does not match layers.10
    assert got["model.layers.2.mlp.down_proj"] == "mxfp8"
    assert got["model.layers.3.mlp.down_proj"] == "fp8_blockwise(fprop=bf16)"
    by_name = {layer.name: layer.rule for layer in plan.layers}
    assert by_name["model.layers.1.mlp.down_proj"] == r"model\.layers\.1\..*"
    assert by_name["model.layers.2.mlp.down_proj"] == r"model\.layers\.(1|2)\.mlp\..*"
    assert by_name["model.layers.2.self_attn.q_proj"] == "default"


@pytest.mark.parametrize(
    "precision, message",
    [
        (
            {"rules": [{"modules": "lm_heed", "recipe": "bf16"}]},
            "rule 'lm_heed' matches none of the 85 linear layers; did you mean 'lm_head'?",
        ),
        (
            {"rules": [{"modules": "down_proj", "recipe": "bf16"}]},
            "rule 'down_proj' matches none of the 85 linear layers; it is a part of 'model.layers.0.mlp.down_proj', but a rule matches "
            "whole names: try '.*down_proj.*'",
        ),
        (
            {"rules": [{"modules": ".*proj", "recipe": "bf16"}, {"modules": ".*up_proj", "recipe": "none"}]},
            "rule '.*up_proj' never applies: earlier rules match all 12 of its layers",
        ),
        (
            {"rules": [{"modules": "(", "recipe": "bf16"}]},
            "precision.rules.0.modules: rule '(' is not a regular expression: missing ), unterminated subpattern at position 0",
        ),
        ({"rules": [{"modules": ".*", "recipe": "bf61"}]}, "precision.rules.0.recipe: unknown recipe 'bf61'; did you mean 'bf16'?"),
        ({"recipe": "fp8_blokwise"}, "precision.recipe: unknown recipe 'fp8_blokwise'; did you mean 'fp8_blockwise'?"),
        ({"recipies": "bf16"}, "precision.recipies: unknown key; did you mean 'recipe'?"),
        ({"backend": "tourch"}, "precision.backend: unknown backend 'tourch'; did you mean 'torch'?"),
        (
            {"recipe": "mxfp4", "backend": "torch"},
            "precision.backend: 'torch' can't multiply e2m1[1x32 e8m0:floor] by e2m1[1x32 e8m0:floor] on cpu: takes unscaled operands only",
        ),
    ],
)  # fmt: skip
def test_wrong_precision_is_one_line_and_changes_no_model(precision, message):
    model = deep_llama()
    for function in (convert, make_plan):
        with pytest.raises(UserError) as error:
            function(model, precision)
        assert str(error.value) == message
    assert converted(model) == {}


def test_nothing_is_converted_when_a_later_layer_can_not_be():
    """bf16 by the torch backend runs on an accelerator only: a plan for one can be made here, and a model converted for one."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    precision = {"recipe": "bf16", "backend": "torch", "rules": [{"modules": "0", "recipe": "fp32"}]}
    with pytest.raises(UserError, match="slow on a CPU"):
        convert(model, precision)
    assert converted(model) == {}
    plan = convert(model, precision, device="cuda")
    assert (plan.device, [layer.status for layer in plan.layers]) == ("cuda", ["native", "native"])
    assert converted(model) == {"0": "fp32", "1": "bf16"}


# Strict


def test_strict_refuses_emulation():
    model = deep_llama(layers=1)
    with pytest.raises(UserError) as error:
        convert(model, {"recipe": "fp8_blockwise", "strict": True})
    assert str(error.value).startswith(
        "precision.strict: model.layers.0.self_attn.q_proj would run fp8_blockwise emulated on cpu: dequantised and multiplied in fp32; "
    )
    assert converted(model) == {}


def test_strict_refuses_a_layer_that_can_not_be_converted():
    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "narrow": Narrow(8, 8)})
    with pytest.raises(UserError) as error:
        convert(model, {"recipe": "fp32", "strict": True})
    assert str(error.value) == "precision.strict: narrow can't be converted: Narrow is a subclass of nn.Linear with a forward of its own"
    assert converted(model) == {}


def test_strict_accepts_what_is_native_or_meant_to_stay_in_high_precision():
    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "narrow": Narrow(8, 8), "lm_head": nn.Linear(8, 8)})
    plan = convert(model, {"recipe": "fp32", "strict": True, "rules": [{"modules": "narrow", "recipe": "none"}]})
    assert [layer.status for layer in plan.layers] == ["native", "kept in high precision", "kept in high precision"]


# Names, weights and checkpoints stay


def test_parameters_names_and_hooks_survive():
    model = deep_llama(layers=2)
    parameters, modules, keys = dict(model.named_parameters()), dict(model.named_modules()), list(model.state_dict())
    q_proj, seen = linear(model, "model.layers.0.self_attn.q_proj"), []
    q_proj.register_forward_hook(lambda module, args, out: seen.append(module))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, "fp8_blockwise")
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(modules[name] is module for name, module in model.named_modules())
    assert list(model.state_dict()) == keys
    run(model)
    assert seen == [q_proj]
    before = q_proj.weight.detach().clone()
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()  # built before the conversion
    assert not torch.equal(q_proj.weight, before)


def test_revert_restores_the_model_bit_for_bit():
    model = deep_llama(layers=2)
    expected = run(model)
    convert(model, "mxfp4")
    assert not torch.equal(run(model), expected)
    assert revert(model) == 14
    assert converted(model) == {}
    assert torch.equal(run(model), expected)
    assert revert(model) == 0


def test_converting_again_replaces_the_precision():
    model, fresh = deep_llama(layers=2), deep_llama(layers=2)
    convert(model, "mxfp4")
    precision = {"recipe": "fp8_blockwise", "rules": [{"modules": r"model\.layers\.0\..*", "recipe": "none"}]}
    plan, expected = convert(model, precision), convert(fresh, precision)
    assert plan == expected
    assert converted(model) == converted(fresh) == dict.fromkeys(LAYERS[7:14], "fp8_blockwise")
    assert torch.equal(run(model), run(fresh))


def test_state_dicts_cross_between_converted_and_plain_models():
    plain, model = deep_llama(layers=1), deep_llama(layers=1)
    convert(model, "fp8_blockwise")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    model.load_state_dict(plain.state_dict())
    other = deep_llama(layers=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), run(plain))


def test_save_pretrained_writes_a_plain_checkpoint(tmp_path):
    model = deep_llama(layers=1)
    convert(model, "fp8_blockwise")
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    revert(model)
    assert torch.equal(run(loaded), run(model))


def test_a_converted_model_can_be_copied():
    model = deep_llama(layers=1)
    convert(model, "fp8_blockwise")
    twin = copy.deepcopy(model)
    assert converted(twin) == converted(model)
    assert torch.equal(run(twin), run(model))


# Plans


def test_a_plan_on_the_meta_device_equals_the_real_one():
    meta = deep_llama(device="meta")
    plan = make_plan(meta, "fp8_blockwise", device="cpu")
    assert plan == make_plan(deep_llama(), "fp8_blockwise")
    assert converted(meta) == {}
    assert convert(meta, "fp8_blockwise", device="cpu") == plan  # a model may be converted before it has any memory
    assert len(converted(meta)) == len(LAYERS)


def test_the_plan_is_what_convert_does():
    model = deep_llama()
    precision = {"recipe": "fp8_blockwise", "rules": [{"modules": ".*down_proj", "recipe": "mxfp8"}]}
    plan = make_plan(model, precision)
    assert converted(model) == {}
    assert convert(model, precision) == plan
    assert converted(model) == {layer.name: layer.recipe for layer in plan.converted}
    for layer in plan.layers:
        module = linear(model, layer.name)
        assert layer.shape == tuple(module.weight.shape)
        if isinstance(module, LowPrecisionLinear):
            chosen = module.gemms["cpu"]
            assert [gemm.backend for gemm in layer.gemms] == [chosen.backend_of(gemm).name for gemm in GEMMS]
            assert [gemm.equation for gemm in layer.gemms] == [module.recipe.equation(gemm) for gemm in GEMMS]


def test_the_repr_of_a_precision_shows_what_differs_from_the_defaults():
    assert repr(ConversionConfig()) == "ConversionConfig()"
    assert repr(ConversionConfig(recipe=library.get("bf16"), backend="auto")) == "ConversionConfig()"
    given = {"recipe": "mxfp8", "rules": [{"modules": "lm_head", "recipe": "bf16"}, {"modules": "a.*", "recipe": "none"}], "strict": True}
    config = parse_conversion(given)
    rules = "[RuleConfig(modules='lm_head', recipe='bf16'), RuleConfig(modules='a.*', recipe=None)]"
    assert repr(config) == str(config) == f"ConversionConfig(recipe='mxfp8', rules={rules}, strict=True)"
    assert repr(parse_conversion({"recipe": {"base": "mxfp8", "fprop": "bf16"}})) == "ConversionConfig(recipe='mxfp8(fprop=bf16)')"
    assert repr(ConversionConfig(recipe=None)) == "ConversionConfig(recipe=None)"
    assert eval(repr(config), {"ConversionConfig": ConversionConfig, "RuleConfig": RuleConfig}) == config


def test_the_repr_of_a_runs_precision():
    """Sections of a PrecisionConfig are shown in the same way; a moment of the run is shown as the user writes it."""
    assert repr(lowprec.PrecisionConfig()) == "PrecisionConfig()"
    phases = [{"until": "5%", "recipe": "bf16"}, {"until": "100%"}]
    config = parse_precision({"recipe": "mxfp8", "schedule": phases, "guard": True, "loss_scaling": {"init_scale": 1024}, "probe_every": 5})
    assert repr(config) == (
        "PrecisionConfig(recipe='mxfp8', schedule=[PhaseConfig(until='5%', recipe='bf16'), PhaseConfig()], "
        "loss_scaling=LossScalingConfig(init_scale=1024.0), guard=GuardConfig(), probe_every=5)"
    )


def test_forms_of_precision(tmp_path):
    """A precision is a name, a Recipe, a mapping, a PrecisionConfig, or a YAML file of either form."""
    model = nn.Sequential(nn.Linear(8, 8))
    expected = make_plan(model, "mxfp8")
    inner, whole = tmp_path / "inner.yaml", tmp_path / "whole.yml"
    inner.write_text("recipe: mxfp8\n")
    whole.write_text("precision: {recipe: mxfp8}\nmodel: ignored here\n")
    mxfp8 = library.get("mxfp8")
    for form in (mxfp8, {"recipe": "mxfp8"}, {"recipe": {"base": "mxfp8"}}, lowprec.PrecisionConfig(recipe=mxfp8), inner, str(whole)):
        assert make_plan(model, form) == expected
    assert make_plan(model, {}) == make_plan(model, "bf16")  # the default
    inner.write_text("recipe: mxfp9\n")
    with pytest.raises(UserError) as error:
        make_plan(model, inner)
    assert str(error.value) == f"{inner}: precision.recipe: unknown recipe 'mxfp9'; did you mean 'mxfp8'?"
    with pytest.raises(UserError, match=r"missing\.yaml: no such file"):
        make_plan(model, tmp_path / "missing.yaml")
    with pytest.raises(UserError, match=r"precision\.recipe: a recipe is a name or a mapping with 'base', got 3"):
        make_plan(model, 3)
