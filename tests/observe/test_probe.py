"""The figures of a Probe agree with a computation by hand, and a probed step trains like any other."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lowprec.conversion.convert import convert
from lowprec.nn import LowPrecisionLinear
from lowprec.observe import LayerProbe, Probe, probe
from lowprec.quant import quantize
from lowprec.recipe import library
from lowprec.testing import sqnr_db
from tests.builders import tiny_llama

RECIPES = ["bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise", "mxfp4", "nvfp4", "mxfp4_quartet", "int8", "qat_int8dyn_int4"]
BATCH = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(3))


def llama(recipe: str, layers: int = 2) -> LlamaForCausalLM:
    model = tiny_llama(num_hidden_layers=layers, use_cache=True).train()
    convert(model, recipe)
    return model


def layer(recipe: str, inputs: int = 128, outputs: int = 256) -> LowPrecisionLinear:
    torch.manual_seed(0)
    module = nn.Linear(inputs, outputs, bias=False)
    return LowPrecisionLinear.from_linear(module, library.get(recipe))


def step(model: Any, batch: Tensor = BATCH) -> float:
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    return loss.item()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules())


def outliers(rows: int, columns: int, seed: int) -> Tensor:
    """Return values over many binades, with zeros, and one value far above the rest in the last row."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(rows, columns, generator=generator) * torch.exp2(torch.randint(-24, 1, (rows, columns), generator=generator))
    t[:, ::7] = 0
    t[-1, -1] = 1e3
    return t


# The figures


def direct(t: Tensor, spec: Any, key: Tensor | None = None) -> tuple[float, float, float]:
    """Return SQNR [dB], underflow and saturation of a whole matrix."""
    if spec is None:
        return math.inf, 0.0, 0.0
    q = quantize(t, spec, key=key, saturation=True)
    value = q.dequantize()
    lost = ((value == 0) & (t != 0)).double().mean().item()
    return sqnr_db(t, value), lost, 0.0 if q.saturated is None else q.saturated.double().mean().item()


@pytest.mark.parametrize("recipe", RECIPES)
def test_figures_are_those_of_a_direct_computation(recipe: str):
    module, x, g = layer(recipe), outliers(192, 128, 1).requires_grad_(), outliers(192, 256, 2)
    watched = Probe(module)
    with watched.sampling():
        module(x.view(2, 96, 128)).backward(g.view(2, 96, 256))
    found = watched.layers[""]
    for name, t, (gemm, side) in (
        ("x", x.detach(), ("fprop", "a")),
        ("w", module.weight.detach(), ("fprop", "b")),
        ("g", g, ("dgrad", "a")),
    ):
        spec = module.recipe.gemm(gemm)
        if spec.hadamard is not None:
            t = spec.hadamard.apply(t)
        # The probe draws its own numbers, from the key zero.
        sqnr, underflow, saturated = direct(t, getattr(spec, side), torch.zeros(2, dtype=torch.int64))
        assert getattr(found, f"sqnr_{name}") == pytest.approx(sqnr, rel=1e-9)
        assert getattr(found, f"underflow_{name}") == pytest.approx(underflow, rel=1e-12)
        assert getattr(found, f"saturated_{name}") == pytest.approx(saturated, rel=1e-12)


def test_figures_of_known_operands():
    module = layer("fp8_blockwise")
    x = torch.zeros(128, 128)
    x[:, 0], x[:, 1], x[:, 2] = (
        448.0,
        2.0**-12,
        0.03125,
    )  # scale 1: e4m3's largest value, a quarter of its smallest, one that it holds
    watched = Probe(module)
    with watched.sampling():
        module(x)
    found = watched.layers[""]
    assert found.underflow_x == 1 / 128
    assert found.sqnr_x == pytest.approx(20 * math.log10(math.hypot(448, 2.0**-12, 0.03125) / 2.0**-12))
    assert found.saturated_x == 0.0
    assert (found.sqnr_g, found.underflow_g, found.saturated_g) == (math.inf, 0.0, 0.0)  # there was no backward


def test_values_that_are_not_finite_show():
    module = layer("fp16")
    x = torch.ones(4, 128)
    x[0, :2] = 1e5
    watched = Probe(module)
    with watched.sampling():
        module(x)
    assert math.isnan(watched.layers[""].sqnr_x)
    assert watched.layers[""].saturated_x == 2 / 512
    x[0, 0] = math.nan
    with watched.sampling():
        module(x)
    assert math.isnan(watched.layers[""].sqnr_x)


@pytest.mark.parametrize("recipe", RECIPES)
def test_large_operands_are_measured_by_their_leading_rows(recipe: str, monkeypatch: pytest.MonkeyPatch):
    """The last row's outlier is not measured, but it still sets the scale if one scale spans all rows."""
    monkeypatch.setattr(probe, "SAMPLE", 129 * 128)
    module, x = layer(recipe), outliers(300, 128, 1)
    spec = module.recipe.fprop.a
    watched = Probe(module)
    with watched.sampling():
        module(x)
    if module.recipe.fprop.hadamard is not None:
        x = module.recipe.fprop.hadamard.apply(x)
    whole = quantize(x, spec).dequantize()[:128]
    assert watched.layers[""].sqnr_x == pytest.approx(sqnr_db(x[:128], whole), rel=1e-9)
    assert watched.layers[""].underflow_x == ((whole == 0) & (x[:128] != 0)).double().mean()


def test_x_is_measured_as_the_layer_takes_it():
    """The layer takes x cast by autocast, or the product of SwiGLU if the layer makes it."""
    module, x, gate = layer("mxfp8"), torch.randn(64, 128), torch.randn(64, 128)
    watched, spec = Probe(module), library.get("mxfp8").fprop.a
    with watched.sampling(), torch.autocast("cpu", torch.bfloat16):
        module(x)
    cast = x.bfloat16()
    assert watched.layers[""].sqnr_x == pytest.approx(direct(cast.float(), spec)[0], rel=1e-9)
    with watched.sampling():
        module(x, times_silu_of=gate)
    assert watched.layers[""].sqnr_x == pytest.approx(direct(nn.functional.silu(gate) * x, spec)[0], rel=1e-9)


# A probed step


def train(model: Any, *, probed: bool, steps: int = 3) -> tuple[list[float], dict[str, Tensor], list[dict[str, LayerProbe]]]:
    optimizer, watched, found = torch.optim.AdamW(model.parameters(), lr=1e-2), Probe(model), []
    losses = []
    for number in range(steps):
        if probed and number % 2 == 0:
            watched.begin()
        losses.append(step(model))
        if watched.armed:
            found.append(watched.end())
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.state_dict(), found


@pytest.mark.parametrize("recipe", ["fp8_delayed", "nvfp4", "mxfp4_quartet", "qat_int8dyn_int4"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_training_is_the_same_bits_with_a_probe(recipe: str, checkpointing: bool | None):
    """Amax histories and rounding counters are compared as well: they are in the state dict."""
    first = llama(recipe)
    if checkpointing is not None:
        first.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    second = copy.deepcopy(first)
    losses, state, _ = train(first, probed=False)
    again, probed_state, found = train(second, probed=True)
    assert again == losses
    assert all(torch.equal(probed_state[name], value) for name, value in state.items())
    assert len(found) == 2
    assert found[0] != found[1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_figure(reentrant: bool):
    plain = llama("fp8_blockwise")
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    results = []
    for model in (plain, checkpointed):
        watched = Probe(model)
        with watched.sampling():
            step(model)
        results.append(watched.layers)
    assert results[0] == results[1]
    assert all(20 < value < 40 for found in results[0].values() for value in (found.sqnr_x, found.sqnr_w, found.sqnr_g))


def test_a_probed_step_has_the_names_of_layers_and_the_first_micro_batch():
    """A step is named by the model's names; the first of accumulated micro-batches is measured, and evaluation is not."""
    model = llama("mxfp4")
    names = [name for name, module in model.named_modules() if isinstance(module, LowPrecisionLinear)]
    watched = Probe(model)
    with watched.sampling():
        step(model)
    first = watched.layers
    assert list(first) == names
    with watched.sampling():
        with torch.no_grad():
            model.eval()(input_ids=BATCH.flip(1))
        model.train()
        step(model)
        step(model, BATCH.flip(0, 1))
    assert watched.layers == first
    with watched.sampling():
        step(model, BATCH.flip(0, 1))
    assert watched.layers != first


def test_delayed_scales_are_those_that_the_layer_takes():
    """A history of large amaxes makes the scale too large for a small input."""
    module = layer("fp8_delayed")
    large, small = 1e5 * torch.ones(16, 128), torch.randn(16, 128)
    module(large)
    watched = Probe(module)
    with watched.sampling():
        module(small)
    history = torch.zeros(1024)
    history[-1] = 1e5
    spec = library.get("fp8_delayed").fprop.a
    assert spec is not None
    expected = sqnr_db(small, quantize(small, spec, history=history).dequantize())
    assert watched.layers[""].sqnr_x == pytest.approx(expected, rel=1e-9)
    assert expected < direct(small, spec)[0] - 3


def test_nothing_stays_hooked():
    model = llama("mxfp8")
    watched = Probe(model)
    assert not watched.armed
    watched.begin()
    assert watched.armed
    watched.begin()
    assert hooks(model) == 2 * 14
    step(model)
    assert len(watched.end()) == 14
    assert hooks(model) == 0
    assert not watched.armed
    before = watched.layers
    with pytest.raises(IndexError), watched.sampling():
        model(input_ids=torch.tensor([[999]]))
    assert hooks(model) == 0
    assert watched.layers is before


def test_a_model_without_converted_layers():
    watched = Probe(nn.Linear(4, 4))
    with watched.sampling():
        assert not watched.armed
    assert watched.layers == {}


def test_frozen_layers_have_no_gradient_to_measure():
    model = llama("mxfp8").requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    watched = Probe(model)
    with watched.sampling():
        step(model)
    assert {found.sqnr_g for found in watched.layers.values()} == {math.inf}
    assert all(found.sqnr_x < 40 for found in watched.layers.values())


# All come from inside PyTorch: .grad of an input that is not a leaf, an autograd Function that Dynamo instantiates.
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings(r"ignore:.*torch\.autograd\.function\.Function.* should not be instantiated:DeprecationWarning")
def test_compiled_blocks_are_measured_in_an_eager_step():
    """The step after the eager one runs compiled again."""
    eager = llama("fp8_blockwise", layers=1)
    model = copy.deepcopy(eager)
    calls = 0

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return graph.forward(*args)

        return run

    for block in model.model.layers:
        block.compile(backend=backend)
    step(model)
    assert calls > 0
    calls, before = 0, Probe(eager)
    with before.sampling():
        step(eager)
    watched = Probe(model)
    with watched.sampling():
        step(model)
    assert calls == 0
    assert watched.layers == before.layers
    step(model)
    assert calls > 0
    torch._dynamo.reset()


# Experts


@pytest.mark.parametrize("recipe", ["fp8_blockwise", "mxfp4_quartet"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_expert_with_the_most_tokens_is_measured(kind: str, recipe: str):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 64, "num_local_experts": 3}
    module: Any = MixtralExperts(MixtralConfig(**sizes)) if kind == "mixtral" else GptOssExperts(GptOssConfig(**sizes))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / 8)
    convert(module.train(), recipe)
    x, chosen = outliers(96, 128, 1), torch.zeros(96, 1, dtype=torch.int64)
    chosen[:56], chosen[56:90] = 2, 1  # the third expert has 56 tokens, the first 6
    taken: list[Tensor] = []
    module.low_precision["down_proj"].register_full_backward_hook(lambda _, __, gradients: taken.append(gradients[0]))
    watched = Probe(module)
    with watched.sampling():
        module(x.clone().requires_grad_(), chosen, torch.ones(96, 1)).backward(outliers(96, 128, 2))
    assert list(watched.layers) == ["gate_up_proj", "down_proj"]
    up = module.gate_up_proj[2].detach()
    operands = {
        ("gate_up_proj", "x"): x[:56],
        ("gate_up_proj", "w"): up.t() if module.is_transposed else up,
        ("down_proj", "g"): taken[0][-56:],
    }
    spec = library.get(recipe)
    for (name, operand), t in operands.items():
        gemm = spec.dgrad if operand == "g" else spec.fprop
        t = gemm.hadamard.apply(t) if gemm.hadamard is not None else t
        source = gemm.b if operand == "w" else gemm.a
        sqnr, underflow, _ = direct(t.contiguous(), source, torch.zeros(2, dtype=torch.int64))
        assert getattr(watched.layers[name], f"sqnr_{operand}") == pytest.approx(sqnr, rel=1e-9)
        assert getattr(watched.layers[name], f"underflow_{operand}") == pytest.approx(underflow, rel=1e-12)
    assert hooks(module) == 1  # the remaining hook is the test's own


def test_a_mixture_trains_the_same_bits_with_a_probe():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    first: Any = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)).train()
    convert(first, "mxfp4_aws")
    second = copy.deepcopy(first)
    losses, state, _ = train(first, probed=False)
    again, state_again, found = train(second, probed=True)
    assert again == losses
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert [len(layers) for layers in found] == [12, 12]
    assert all(10 < layer.sqnr_g < 60 for layer in found[-1].values())
