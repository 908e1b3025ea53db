"""Each expert of a mixture is a low-precision linear layer, for every layout of their weights."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import lowprec
from lowprec.conversion.convert import make_plan
from lowprec.conversion.discover import recipes_of
from lowprec.errors import UserError
from lowprec.nn import LowPrecisionLinear
from lowprec.nn.experts import stacks
from lowprec.recipe import library
from lowprec.testing import sqnr_db

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
BATCH = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3))


def mixtral(**more: Any) -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, **more)).train()


def qwen() -> Any:
    torch.manual_seed(0)
    more = {"moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 32, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, intermediate_size=96, **more)).train()


def gpt_oss() -> Any:
    torch.manual_seed(0)
    more = {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    return GptOssForCausalLM(GptOssConfig(**SIZES, **more)).train()


def experts(kind: str) -> Any:
    """Make a module of one of three layouts: [E, N, K]; [E, K, N] with biases and a gate of its own; no gate."""
    torch.manual_seed(0)
    if kind == "mixtral":
        module: Any = MixtralExperts(MixtralConfig(**SIZES, intermediate_size=96, num_local_experts=4))
    elif kind == "gpt_oss":
        module = GptOssExperts(GptOssConfig(**SIZES, intermediate_size=96, num_local_experts=4))
    else:
        module = NemotronHExperts(NemotronHConfig(hidden_size=64, moe_intermediate_size=96, n_routed_experts=4, num_experts_per_tok=2))
    module.config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 2 else parameter.shape[-1] ** -0.5))
    return module.train()


def tokens(count: int = 50, k: int = 2, unused: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Make x, the chosen experts and the routing weights; of four experts, number `unused` gets no token."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:k] for _ in range(count)])
    chosen = torch.where(chosen >= unused, chosen + 1, chosen)
    weights = torch.rand(count, k, generator=generator)
    return torch.randn(count, 64, generator=generator, requires_grad=True), chosen, weights.requires_grad_()


def gradients(module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Return y and the gradients of x, the routing weights and all parameters."""
    y = module(x, chosen, weights)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return y, *torch.autograd.grad(y, [x, weights, *module.parameters()], g)


class Reference(nn.Module):
    """The same mixture, computed by loops over one LowPrecisionLinear for each expert and weight."""

    def __init__(self, module: Any, recipe: str) -> None:
        super().__init__()
        self.experts, self.layers = module, {}
        for name in stacks(module):
            for number in range(module.num_experts):
                weight = getattr(module, name)[number]
                weight = weight.t() if module.is_transposed else weight
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=module.has_bias)
                layer.weight = nn.Parameter(weight.detach().clone())
                if module.has_bias:
                    layer.bias = nn.Parameter(getattr(module, f"{name}_bias")[number].detach().clone())
                self.layers[name, number] = LowPrecisionLinear.from_linear(layer, library.get(recipe))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        up, down = stacks(self.experts)
        y = torch.zeros_like(x)
        for number in range(self.experts.num_experts):
            rows, places = torch.where(chosen == number)
            if len(rows):
                made = self.layers[up, number](x[rows])
                made = self.experts._apply_gate(made) if self.experts.has_gate else self.experts.act_fn(made)
                y = y.index_add(0, rows, self.layers[down, number](made) * weights[rows, places, None])
        return y

    def stacked(self, name: str) -> Tensor:
        """Return the gradients of one of the experts' parameters."""
        attribute = "bias" if name.endswith("_bias") else "weight"
        stack = name.removesuffix("_bias")
        grads = []
        for number in range(self.experts.num_experts):
            parameter = getattr(self.layers[stack, number], attribute)
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            grads.append(grad.t() if attribute == "weight" and self.experts.is_transposed else grad)
        return torch.stack(grads)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron"])
def test_in_fp32_it_computes_what_the_module_did(kind: str):
    module = experts(kind)
    before = gradients(module, *tokens())
    lowprec.convert(module, {"recipe": "fp32"})
    after = gradients(module, *tokens())
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["fp8_blockwise", "fp8_rowwise", "mxfp8", "qat_int8dyn_int4"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron"])
def test_each_expert_is_a_low_precision_linear_layer(kind: str, recipe: str):
    module = experts(kind)
    reference = Reference(module, recipe)
    x, chosen, weights = tokens()
    y = reference(x, chosen, weights)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(g)
    expected = [y, x.grad, weights.grad, *(reference.stacked(name) for name, _ in module.named_parameters())]
    lowprec.convert(module, recipe)
    found = gradients(module, *tokens())
    # The results differ only in the order in which a token's experts are summed, which a later rounding may make visible.
    for a, b in zip(found, expected, strict=True):
        assert b is not None
        assert sqnr_db(b.double(), a.double()) > 45


def test_an_index_beyond_the_experts_is_ignored():
    module = experts("mixtral")
    lowprec.convert(module, "fp8_blockwise")
    x, chosen, weights = tokens()
    marked = chosen.clone()
    marked[::3, 1] = 4
    without = weights * (marked < 4)
    torch.testing.assert_close(module(x, marked, weights), module(x, chosen, without), rtol=1e-3, atol=1e-3)
    assert module(x, torch.full_like(chosen, 4), weights).abs().max() == 0
    empty = module(x[:0], chosen[:0], weights[:0])
    assert empty.shape == (0, 64)


@pytest.mark.parametrize("model", [mixtral, qwen, gpt_oss])
@pytest.mark.parametrize("recipe", ["fp8_blockwise", "mxfp4_aws", "nvfp4"])
def test_a_model_trains_and_is_saved_as_before(model: Any, recipe: str):
    net = model()
    names = list(net.state_dict())
    plan = lowprec.convert(net, recipe)
    stacked = [layer for layer in plan.layers if layer.experts > 1]
    assert [layer.name for layer in stacked] == [
        f"model.layers.{number}.mlp.experts.{name}" for number in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]
    assert all(layer.converted for layer in stacked)
    assert plan.totals()["converted_weights"] > 0.9
    assert set(names) <= set(net.state_dict())
    if recipe == "fp8_blockwise":
        assert list(net.state_dict()) == names
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=3e-3), []
    for _ in range(6):
        losses.append(net(input_ids=BATCH, labels=BATCH, use_cache=False).loss)
        losses[-1].backward()
        assert all(
            parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters() if parameter.requires_grad
        )
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    again = model()
    lowprec.convert(again, recipe)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(input_ids=BATCH).logits, net(input_ids=BATCH).logits)


def test_reverting_gives_the_module_back():
    net = mixtral()
    expected, kinds = net(input_ids=BATCH).logits, [type(module) for module in net.modules()]
    lowprec.convert(net, "mxfp4_aws")
    low = net(input_ids=BATCH).logits
    assert not torch.equal(low, expected)
    assert lowprec.revert(net) == 12
    assert [type(module) for module in net.modules()] == kinds
    assert torch.equal(net(input_ids=BATCH).logits, expected)


def test_rules_choose_single_weights():
    net = mixtral()
    rules = [{"modules": r".*\.experts\.down_proj", "recipe": "mxfp8"}, {"modules": r"model\.layers\.1\..*", "recipe": "none"}]
    plan = lowprec.convert(net, {"recipe": "fp8_blockwise", "rules": rules})
    found = {layer.name: layer.recipe for layer in plan.layers if layer.experts > 1}
    prefix = "model.layers.{}.mlp.experts.{}"
    assert found == {
        prefix.format(0, "gate_up_proj"): "fp8_blockwise",
        prefix.format(0, "down_proj"): "mxfp8",
        prefix.format(1, "gate_up_proj"): None,
        prefix.format(1, "down_proj"): "mxfp8",
    }
    recipes = {name: recipe.name for name, recipe in recipes_of(net).items()}
    assert recipes[prefix.format(1, "gate_up_proj")] == "as it is"
    assert recipes[prefix.format(0, "down_proj")] == "mxfp8"


def test_gates_stay_in_high_precision_unless_a_rule_names_them():
    more = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64}
    with torch.device("meta"):
        net = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, intermediate_size=96, **more))
    gate = "model.layers.0.mlp.shared_expert_gate"

    def found(precision: Any) -> Any:
        return next(layer for layer in make_plan(net, precision).layers if layer.name == gate)

    assert not found("fp8_blockwise").converted
    assert found("fp8_blockwise").reason == "a gate of experts stays in high precision unless a rule names it"
    assert found({"recipe": "bf16", "rules": [{"modules": r".*_gate", "recipe": "mxfp8"}]}).recipe == "mxfp8"

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(8, 8), nn.Linear(8, 8)

    assert all(layer.converted for layer in lowprec.convert(nn.Sequential(Dense()), "fp8_blockwise").layers)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Sequential(nn.Linear(8, 2)), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    plan = lowprec.convert(nn.Sequential(Mixture()), "fp8_blockwise")
    assert {layer.name: layer.converted for layer in plan.layers} == {"0.router.0": False, "0.experts.0": True, "0.experts.1": True}


def test_the_plan_names_experts_kept_in_high_precision():
    for recipe, why in (("fp8_delayed", "keeps histories of amaxes"), ("none", "the recipe is 'none'")):
        plan = lowprec.convert(mixtral(), recipe)
        alone = [layer for layer in plan.layers if layer.experts > 1]
        assert len(alone) == 4
        assert not any(layer.converted for layer in alone)
        assert all(why in layer.reason for layer in alone)
        assert plan.totals()["converted_weights"] < 0.2
    rules = [{"modules": r".*\.experts\..*", "recipe": "fp8_delayed"}]
    with pytest.raises(UserError, match=r"precision\.strict: model\.layers\.0\.mlp\.experts\.gate_up_proj can't be converted"):
        lowprec.convert(mixtral(), {"recipe": "none", "rules": rules, "strict": True})


def test_stacks_of_unknown_modules_are_named_too():
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 8, 16))
            self.position = nn.Parameter(torch.randn(1, 8, 16))
            self.conv = nn.Conv1d(8, 8, 3)
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.einsum("tk,enk->tn", x, self.w))

    plan = lowprec.convert(nn.Sequential(Mixture()), "fp8_blockwise")
    assert [(layer.name, layer.converted) for layer in plan.layers] == [("0.w", False), ("0.out", True)]
    assert plan.layers[0].reason == "a stack of matrices of Mixture, which does not say how it multiplies by them"
    assert plan.totals()["converted_weights"] == pytest.approx(64 / (64 + 4 * 8 * 16))
    assert "4 x 8 x 16" in str(plan)


def test_rounding_differs_between_experts_weights_and_passes():
    module = experts("mixtral")
    with torch.no_grad():
        for weight in (module.gate_up_proj, module.down_proj):
            weight.copy_(weight[:1].expand_as(weight))  # the same expert four times
    lowprec.convert(module, "mxfp4_aws")
    x, _, weights = tokens()
    x.data.copy_(x.data[:1].expand_as(x))
    chosen = torch.arange(4).repeat(25).view(50, 2)

    def weight_gradients() -> tuple[Tensor, ...]:
        y = module(x, chosen, torch.ones_like(weights))
        return torch.autograd.grad(y.square().sum(), [module.gate_up_proj, module.down_proj])

    first, second = weight_gradients(), weight_gradients()
    for a, b in zip(first, second, strict=True):
        assert not torch.equal(a, b)
        assert all(not torch.equal(a[0], a[number]) for number in (1, 2, 3))
    state = module.low_precision["gate_up_proj"].rounding_state
    assert state[2] == 2
    module.eval()
    module(x, chosen, weights)
    assert state[2] == 2


def test_state_stays_through_later_phases():
    net = mixtral()
    phases = ["bf16", "mxfp4_aws"]
    lowprec.convert(net, "bf16", later=phases)
    names = list(net.state_dict())
    assert any("low_precision.down_proj.rounding_state" in name for name in names)
    lowprec.convert(net, "mxfp4_aws", later=phases)
    net(input_ids=BATCH)
    counts = [buffer[2].item() for name, buffer in net.named_buffers() if name.endswith("rounding_state")]
    lowprec.convert(net, "bf16", later=phases)
    assert list(net.state_dict()) == names
    assert [buffer[2].item() for name, buffer in net.named_buffers() if name.endswith("rounding_state")] == counts == [1] * 12


def test_evaluation_has_a_recipe_of_its_own():
    net = mixtral()
    exact = copy.deepcopy(net).eval()(input_ids=BATCH).logits
    lowprec.convert(net, {"recipe": "mxfp4", "evaluation": "fp32"})
    torch.testing.assert_close(net.eval()(input_ids=BATCH).logits, exact)
    assert sqnr_db(exact, net.train()(input_ids=BATCH).logits) < 30


def test_autocast_casts_tokens_and_not_weights():
    module = experts("mixtral")
    lowprec.convert(module, "fp8_blockwise")
    x, chosen, weights = tokens()
    plain = module(x, chosen, weights)
    with torch.autocast("cpu", torch.bfloat16):
        cast = module(x, chosen, weights)
    assert cast.dtype == x.dtype
    assert 25 < sqnr_db(plain, cast) < math.inf  # a value rounded to bf16 may take the next code


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings(r"ignore:.*torch\.autograd\.function\.Function.* should not be instantiated:DeprecationWarning")
def test_compiled_code_calls_them_between_its_graphs():
    net = mixtral()
    lowprec.convert(net, "fp8_blockwise")
    expected = net(input_ids=BATCH, labels=BATCH, use_cache=False).loss
    torch._dynamo.reset()
    for layer in net.model.layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(net(input_ids=BATCH, labels=BATCH, use_cache=False).loss, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool):
    net = mixtral()
    lowprec.convert(net, "fp8_blockwise")

    def gradients() -> list[Tensor]:
        net.zero_grad()
        net(input_ids=BATCH, labels=BATCH, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in net.parameters()]

    plain = gradients()
    net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


class WithItsOwnForward(MixtralExperts):
    def forward(self, *given: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * super().forward(*given)


def test_experts_whose_forward_is_another_stay():
    module = WithItsOwnForward(MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=2))
    plan = lowprec.convert(module, "mxfp8")
    assert {layer.reason for layer in plan.layers} == {"WithItsOwnForward has a forward of its own, which transformers has not marked"}
    assert all(layer.blocked for layer in plan.layers)
    assert type(module) is WithItsOwnForward
