"""SwiGLU is fused with the quantisation of its result."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import lowprec
from lowprec.nn import swiglu
from lowprec.testing import gaussian
from tests.builders import tiny_config
from tests.nn.native import on_cpu

CONFIG = tiny_config(hidden_size=256, intermediate_size=384)


def mlp() -> LlamaMLP:
    torch.manual_seed(0)
    return LlamaMLP(CONFIG)


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch)


def run(module: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    module.zero_grad()
    x, g = gaussian(96, 256, 1).to(dtype).requires_grad_(), gaussian(96, 256, 2).to(dtype)
    y = module(x)
    y.backward(g)
    return [y.detach(), *(t.grad for t in (x, *module.parameters()) if t.grad is not None)]


def fused() -> LlamaMLP:
    module = mlp()
    plan = lowprec.convert(module, "fp8_blockwise")
    assert swiglu.is_fused(module)
    assert [(part.name, part.choice) for part in plan.parts] == [("swiglu", "fused in 1 MLPs")]
    return module


def unfused() -> LlamaMLP:
    module = mlp()
    lowprec.convert(module, {"recipe": "fp8_blockwise", "fuse": False})
    assert not swiglu.is_fused(module)
    return module


def assert_close(ours: list[Tensor], theirs: list[Tensor], bound: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).norm() <= bound * b.float().norm()


def test_it_computes_what_the_separate_operations_do():
    ours, theirs = run(fused()), run(unfused())
    assert torch.equal(ours[0], theirs[0])
    # dgate and dup differ in the last bit of fp32, which changes a code here and there
    assert_close(ours, theirs, 5e-3)


def test_in_bf16():
    assert_close(run(fused().bfloat16(), torch.bfloat16), run(unfused().bfloat16(), torch.bfloat16), 2e-2)


def test_the_backward_is_the_derivative():
    gate, up, dh = (gaussian(40, 56, seed).double().requires_grad_() for seed in range(3))
    h = nn.functional.silu(gate) * up
    expected = torch.autograd.grad(h, (gate, up), dh)
    for ours, exact in zip(swiglu.swiglu_backward(dh.float(), gate.float(), up.float()), expected, strict=True):
        assert (ours.double() - exact).abs().max() < 1e-5


@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings(r"ignore:.*torch\.autograd\.function\.Function.* should not be instantiated:DeprecationWarning")
def test_compiled_without_a_graph_break():
    module = fused()
    eager = run(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled), eager, 5e-3)


def test_checkpointing_computes_the_same():
    module = fused()
    x = gaussian(96, 256, 1).requires_grad_()
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).backward(gaussian(96, 256, 2))
    assert x.grad is not None
    grads = [x.grad, *(parameter.grad for parameter in module.parameters())]
    for a, b in zip(grads, run(module)[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", ["gate_proj", "up_proj", "down_proj"])
def test_frozen_layers_get_no_gradient_and_the_others_theirs(frozen: str):
    ours, theirs = fused(), unfused()
    for module in (ours, theirs):
        getattr(module, frozen).requires_grad_(False)
    assert_close(run(ours), run(theirs), 5e-3)


def test_the_module_keeps_its_name_its_state_dict_and_its_parameters():
    module = mlp()
    before, parameters = module.state_dict().keys(), [id(parameter) for parameter in module.parameters()]
    lowprec.convert(module, "fp8_blockwise")
    assert type(module).__name__ == "LlamaMLP"
    assert isinstance(module, LlamaMLP)
    assert module.state_dict().keys() == before
    assert [id(parameter) for parameter in module.parameters()] == parameters
    twin = copy.deepcopy(module)
    assert all(torch.equal(a, b) for a, b in zip(run(twin), run(module), strict=True))


def test_reverting_and_converting_again_undo_it():
    module = mlp()
    plain = run(module)
    lowprec.convert(module, "fp8_blockwise")
    lowprec.convert(module, "mxfp4")
    assert type(module) is LlamaMLP
    lowprec.convert(module, "fp8_blockwise")
    lowprec.revert(module)
    assert type(module) is LlamaMLP
    assert all(torch.equal(a, b) for a, b in zip(run(module), plain, strict=True))


@pytest.mark.parametrize(
    "precision",
    [
        {"recipe": "fp8_blockwise", "backend": "reference"},
        {"recipe": "mxfp4"},
        {"recipe": "fp8_blockwise", "rules": [{"modules": "down_proj", "recipe": "none"}]},
    ],
    ids=["emulated", "another recipe", "down_proj kept in high precision"],
)
def test_mlps_are_fused_only_if_down_proj_takes_codes_from_a_kernel(precision: dict):
    module = mlp()
    plan = lowprec.convert(module, precision)
    assert type(module) is LlamaMLP
    assert not plan.parts


def test_a_hook_on_down_proj_still_sees_its_input():
    module, seen = mlp(), []
    module.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    lowprec.convert(module, "fp8_blockwise")
    assert not swiglu.is_fused(module)
    run(module)
    assert seen == [(96, 384)]


def test_an_adapter_put_around_down_proj_later_gets_its_input():
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x)

    module = fused()
    module.down_proj = Adapter(module.down_proj)
    assert torch.equal(run(module)[0], run(unfused())[0])


@pytest.mark.parametrize("kind", [LlamaMLP, MistralMLP, Qwen2MLP])
def test_mlps_of_the_known_formula(kind: type):
    assert swiglu.is_swiglu(kind(CONFIG))


def test_other_formulas_and_activations_are_not_fused():
    class Scaled(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    assert not swiglu.is_swiglu(Scaled(CONFIG))
    assert not swiglu.is_swiglu(GemmaMLP(tiny_config(intermediate_size=64, hidden_act="gelu")))
    assert not swiglu._has_formula(Phi3MLP)
    patched = mlp()
    patched.forward = lambda x: x
    assert not swiglu.is_swiglu(patched)
