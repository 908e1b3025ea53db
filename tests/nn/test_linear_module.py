"""A converted layer supports all that torch and the program around it may do with a module."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import lowprec
from lowprec.conversion.convert import make_plan
from lowprec.nn import LowPrecisionLinear, codes, swiglu
from lowprec.recipe import library
from lowprec.testing import gaussian
from tests.builders import tiny_config
from tests.nn.native import on_cpu


def linear(recipe: str = "fp8_blockwise", dtype: torch.dtype = torch.float32) -> LowPrecisionLinear:
    torch.manual_seed(0)
    return LowPrecisionLinear.from_linear(nn.Linear(128, 256, dtype=dtype), library.get(recipe))


@pytest.mark.parametrize("recipe", ["fp8_blockwise", "fp8_rowwise", "mxfp4", "fp32", "qat_int8dyn_int4"])
def test_a_backward_inside_autocast_is_the_one_outside(recipe: str):
    grads = []
    for inside in (False, True):
        layer, x = linear(recipe), gaussian(32, 128, 1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            if inside:
                y.backward(gaussian(32, 256, 2).to(y.dtype))
        if not inside:
            y.backward(gaussian(32, 256, 2).to(y.dtype))
        grads.append((x.grad, layer.weight.grad))
    for outside, within in zip(*grads, strict=True):
        assert torch.equal(outside, within)
    assert not torch.equal(grads[0][1], grads[0][1].bfloat16().float())


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_kept_in_high_precision_in_a_phase_is_nn_linear(autocast: bool):
    results = []
    for converted in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(128, 64)), gaussian(32, 128, 1).requires_grad_()
        if converted:
            lowprec.convert(model, "none", later=["mxfp4_aws"])
            assert isinstance(model[0], LowPrecisionLinear)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.sum().backward()
        results.append((y, x.grad, model[0].weight.grad, model[0].bias.grad))
    for plain, ours in zip(*results, strict=True):
        assert plain.dtype == ours.dtype
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("autocast", [False, True])
def test_experts_kept_in_high_precision_in_a_phase_are_linear(autocast: bool):
    results = []
    for converted in (False, True):
        torch.manual_seed(0)
        module: Any = MixtralExperts(MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=4))
        module.config._experts_implementation = "eager"
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
        if converted:
            lowprec.convert(module, "none", later=["mxfp4_aws"])
        x, chosen = gaussian(24, 64, 1), torch.arange(48).view(24, 2) % 4
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(module(x, chosen, torch.full((24, 2), 0.5)))
    assert torch.allclose(*results, rtol=0, atol=2e-2 if autocast else 1e-6)  # each token's parts are added in another order


def test_experts_without_any_token_have_gradients():
    """Another rank waits for these gradients."""
    torch.manual_seed(0)
    module: Any = MixtralExperts(MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=4)).train()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    lowprec.convert(module, "mxfp8")
    out = module(torch.randn(3, 64), torch.full((3, 2), 4), torch.full((3, 2), 0.5))
    assert not out.any()
    out.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def test_a_lone_expert_is_a_stack():
    module = MixtralExperts(MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=1))
    assert [layer.experts for layer in lowprec.convert(module, "mxfp8").layers] == [1, 1]
    positions = nn.Module()
    positions.embedding = nn.Parameter(torch.zeros(1, 16, 32))
    assert not make_plan(positions, "mxfp8").layers


def test_experts_compare_the_evaluation_recipe_by_its_gemms_not_its_name():
    torch.manual_seed(0)
    module: Any = MixtralExperts(MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=2))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    renamed = lowprec.recipes.resolve({"base": "mxfp4"})
    fine = lowprec.recipes.resolve("fp32").__class__(**{**vars(library.get("fp32")), "name": renamed.name})
    arguments = gaussian(8, 64, 1), torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1)
    exact = module(*arguments)
    lowprec.convert(module, {"recipe": "mxfp4", "evaluation": fine})
    assert not torch.allclose(module.train()(*arguments), exact, rtol=1e-3)
    assert torch.allclose(module.eval()(*arguments), exact, rtol=1e-4, atol=1e-6)


def test_experts_from_the_meta_device_get_their_rounding_state():
    with torch.device("meta"):
        module: Any = MixtralExperts(MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=2))
        lowprec.convert(module, "mxfp4_aws", device="cpu")
    module.to_empty(device="cpu")
    for number, projection in enumerate(module.low_precision.values()):
        projection.rounding_state.fill_(-77)
        projection.reset_parameters()
        assert projection.rounding_state.tolist()[1:] == [number, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_histories_stay_fp32(dtype: torch.dtype):
    layer = linear("fp8_delayed")
    layer(1e5 * torch.randn(16, 128)).sum().backward()
    before = layer.amax_history_fprop_a.clone()
    assert before.max() > 65504
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.amax_history_fprop_a.dtype == torch.float32
    assert torch.equal(layer.amax_history_fprop_a, before)
    torch.set_default_dtype(dtype)
    try:
        assert linear("fp8_delayed").amax_history_fprop_a.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_inputs_of_another_width_are_one_line():
    with pytest.raises(ValueError, match=r"expected inputs \[\.\.\., 128\], got \[2, 64\]"):
        linear()(torch.zeros(2, 64))


def test_inputs_on_the_meta_device():
    layer = linear("mxfp8").to("meta")
    assert layer(torch.empty(3, 128, device="meta")).shape == (3, 256)


def test_kept_codes_do_not_stop_torch_from_swapping_the_weight(monkeypatch: pytest.MonkeyPatch):
    on_cpu(monkeypatch)
    layer = linear()
    layer(torch.randn(16, 128)).sum().backward()
    layer.zero_grad()
    assert layer in codes._weights
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change", [lambda layer: layer.to_linear(), lambda layer: LowPrecisionLinear.from_linear(layer, library.get("bf16"))]
)
def test_a_change_of_recipe_drops_kept_codes(change: Any, monkeypatch: pytest.MonkeyPatch):
    on_cpu(monkeypatch)
    layer = linear()
    layer(torch.randn(16, 128))
    assert layer in codes._weights
    change(layer)
    assert layer not in codes._weights


def mlp() -> Any:
    torch.manual_seed(0)
    module = LlamaMLP(tiny_config(hidden_size=128, intermediate_size=256))
    lowprec.convert(module, "fp8_blockwise")
    assert swiglu.is_fused(module)
    return module


def test_a_hook_registered_after_fusing_sees_the_unfused_input(monkeypatch: pytest.MonkeyPatch):
    on_cpu(monkeypatch)
    module, x, seen = mlp(), gaussian(16, 128, 1), []
    fused = module(x)
    handle = module.down_proj.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    hooked = module(x)
    assert torch.equal(seen[0], nn.functional.silu(module.gate_proj(x)) * module.up_proj(x))
    assert torch.allclose(hooked, fused, rtol=1e-3, atol=1e-5)
    handle.remove()
    module.down_proj.register_forward_pre_hook(lambda layer, args: (0 * args[0],))
    assert not module(x).any()


def test_fused_modules_and_experts_can_be_saved_whole(monkeypatch: pytest.MonkeyPatch):
    on_cpu(monkeypatch)
    x = gaussian(16, 128, 1)
    torch.manual_seed(0)
    experts: Any = MixtralExperts(MixtralConfig(hidden_size=128, intermediate_size=128, num_local_experts=2))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    lowprec.convert(experts, "mxfp8")
    routed = torch.zeros(16, 1, dtype=torch.long), torch.ones(16, 1)
    for module, arguments in ((mlp(), (x,)), (experts, (x, *routed))):
        expected = module(*arguments)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), torch.load(file, weights_only=False)):
            assert type(copied) is type(module)
            assert torch.equal(copied(*arguments), expected)
            assert lowprec.revert(copied)
            assert type(copied) in (LlamaMLP, MixtralExperts)
