"""LowPrecisionLinear as a module: shapes, dtypes, autocast, tensors kept for the backward, and its treatment of NaN and infinity.

tests/recipe tests which operand each GEMM multiplies, and how good the results are.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowprec.nn.operands as operands_module
from lowprec.nn import LowPrecisionLinear
from lowprec.quant import fake_quantize, quantize
from lowprec.recipe import FromFprop, GemmSpec, Recipe, library
from lowprec.recipe.state import new_state
from lowprec.testing import ODD_SHAPES, fp32_accumulation_bound, gaussian
from lowprec.testing.tolerances import LOSS_LEFT

every_recipe = pytest.mark.parametrize("name", library.names())
SCALED = [name for name in library.names() if name not in ("fp32", "bf16", "fp16")]
STATELESS = [name for name in library.names() if not new_state(library.get(name), torch.device("cpu"))]
QAT = "qat_int8dyn_int4"


def through_fprop(name: str) -> bool:
    """Return True if the recipe differentiates the operands that fprop made."""
    return isinstance(library.get(name).wgrad.b, FromFprop)


class Casting(nn.Linear):
    """A linear layer that takes inputs of any dtype, as nn.Linear does not."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def layer(
    name: str, k: int, n: int, *, bias: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, kind: Any = nn.Linear
) -> LowPrecisionLinear:
    linear = kind(k, n, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(gaussian(n, k, seed) / k**0.5)
        if bias:
            linear.bias.copy_(gaussian(1, n, seed + 1)[0])
    return LowPrecisionLinear.from_linear(linear, library.get(name))


def rewind(module: nn.Module) -> None:
    """Reset the state of stochastic rounding and delayed scaling to that before the first step, so that two calls can be compared."""
    for part in module.modules():
        if isinstance(part, LowPrecisionLinear):
            for name, fresh in new_state(part.recipe, part.weight.device, *part.seed).items():
                part.get_buffer(name).copy_(fresh)


def saved_by(function) -> list[Tensor]:
    """Return the tensors that autograd keeps for the backward of `function()`."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


def gradients(module: Any, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Return y, dx, and the gradients of the parameters, in the first step."""
    rewind(module)
    return next_step(module, x, g)


def next_step(module: Any, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Return y, dx, and the gradients of the parameters, in the next step."""
    x = x.detach().clone().requires_grad_()
    y = module(x)
    return (y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), g))


def assert_within_summation_order(got, expected, x: Tensor, w: Tensor, g: Tensor) -> None:
    """Assert that y, dx, dw and db, summed in another order from the same operands, lie within the bounds of that order.

    Each result lies within its bound of the exact one. Dequantised operands may be larger than x, w and g, by a third each at the most
    (e2m1 rounds 0.75 to 1): twice the bound covers it. One code of one operand that is off by one costs more than this.
    """
    ones = torch.ones(1, len(g))
    for part, a, b, left, right in zip(("y", "dx", "dw", "db"), got, expected, (x, g, g.t(), ones), (w, w.t(), x.t(), g.t()), strict=True):
        bound = 2 * 2 * fp32_accumulation_bound(left, right).max()
        assert (a - b).abs().max() <= bound, part


# Shapes and dtypes


@every_recipe
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_leading_dimensions_are_tokens(shape, bias, name):
    """[K], [M, K], [B, S, K] and [B, S, H, K] give the rows that [M, K] gives, and so do the gradients."""
    m, n, k = shape
    module, x, g = layer(name, k, n, bias=bias), gaussian(m, k, 2), gaussian(m, n, 3)
    expected = gradients(module, x, g)
    for leading in ((m,), (1, m), (m, 1, 1), *[()] * (m == 1)):
        y, dx, *rest = gradients(module, x.view(*leading, k), g.view(*leading, n))
        assert y.shape == (*leading, n)
        assert dx.shape == (*leading, k)
        assert torch.equal(y.view(m, n), expected[0])
        assert torch.equal(dx.view(m, k), expected[1])
        assert all(torch.equal(a, b) for a, b in zip(rest, expected[2:], strict=True))


@every_recipe
@pytest.mark.parametrize("leading", [(0,), (0, 5), (3, 0, 2)], ids=str)
def test_no_tokens(leading, name):
    module = layer(name, 40, 24)
    y, dx, dw, db = gradients(module, torch.empty(*leading, 40), torch.empty(*leading, 24))
    assert y.shape == (*leading, 24)
    assert dx.shape == (*leading, 40)
    assert torch.equal(dw, torch.zeros(24, 40))
    assert torch.equal(db, torch.zeros(24))


@every_recipe
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(x_dtype, w_dtype, name):
    """y and dx take x's dtype, dw and db their parameters' dtypes; each is the fp32 layer's result on the same values, rounded once.

    A layer takes another dtype than its weight's if its own class does; nn.Linear refuses it."""
    module, x, g = layer(name, 96, 40, dtype=w_dtype, kind=Casting), gaussian(24, 96, 2).to(x_dtype), gaussian(24, 40, 3).to(x_dtype)
    if x_dtype != w_dtype:
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            layer(name, 96, 40, dtype=w_dtype)(x)
    got = gradients(module, x, g)
    assert [t.dtype for t in got] == [x_dtype, x_dtype, w_dtype, w_dtype]
    wide = copy.deepcopy(module).float()
    y, dx, dw, db = gradients(wide, x.float(), g.float())
    product = y - wide.bias.detach()
    rounded = product.to(x_dtype) + wide.bias.detach().to(x_dtype)  # the bias is added in the output's dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # one ulp, as another product may round otherwise
    for a, b in zip(got, (rounded, dx, dw, db), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance[a.dtype], atol=tolerance[a.dtype] * b.abs().mean().item())


@every_recipe
def test_strides_of_the_input_and_gradient_do_not_matter(name):
    module, x, g = layer(name, 70, 36), gaussian(33, 70, 2), gaussian(33, 36, 3)
    expected = gradients(module, x, g)
    x_leaf = x.t().contiguous().t().requires_grad_()
    assert not x_leaf.is_contiguous()
    rewind(module)
    y = module(x_leaf)
    dx, dw, db = torch.autograd.grad(y, (x_leaf, module.weight, module.bias), g.t().contiguous().t())
    assert_within_summation_order((y.detach(), dx, dw, db), expected, x, module.weight.detach(), g)
    padded = torch.nn.functional.pad(x, (3, 5))[:, 3:-5]
    assert torch.equal(module(padded).detach(), expected[0])


def test_an_expanded_gradient():
    """y.sum() gives a gradient of stride 0 (and of ones): it is legal, and equal to the dense one."""
    module, x = layer("fp8_blockwise", 70, 36), gaussian(33, 70, 2)
    dense = gradients(module, x, torch.ones(33, 36))
    expanded = gradients(module, x, torch.ones(1, 1).expand(33, 36))
    for a, b in zip(dense, expanded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Autocast


@every_recipe
def test_autocast_casts_x_and_quantises_w_from_its_master_copy(name):
    module, x, g = layer(name, 96, 40, kind=Casting), gaussian(24, 96, 2), gaussian(24, 40, 3)
    x_leaf = x.clone().requires_grad_()
    rewind(module)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x_leaf)
    assert y.dtype == torch.bfloat16
    dx, dw, db = torch.autograd.grad(y, (x_leaf, module.weight, module.bias), g.bfloat16())
    assert (dx.dtype, dw.dtype, db.dtype) == (torch.float32,) * 3
    by_hand = gradients(module, x.bfloat16(), g.bfloat16())
    for a, b in zip((y.detach(), dx, dw, db), by_hand, strict=True):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("name", [QAT, "mxfp4", "fp8_blockwise"])
def test_the_quantised_weight_is_the_master_copy_not_its_bf16_cast(name):
    """The amax is a number that its bf16 cast changes, so the scale shows which of the two was quantised."""
    module, x = layer(name, 64, 8, bias=False), gaussian(16, 64, 2)
    with torch.no_grad():
        module.weight.copy_(module.weight.bfloat16().float() * (1 + 2.0**-9))
    rounded = copy.deepcopy(module)
    with torch.no_grad():
        rounded.weight.copy_(rounded.weight.bfloat16().float())
    assert not torch.equal(module.weight, rounded.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(module(x), rounded(x))


def test_autocast_may_be_off_or_disabled():
    module, x = layer("fp8_blockwise", 32, 8), gaussian(4, 32, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert module(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert module(x).dtype == torch.float32


# Tensors kept for the backward


@every_recipe
def test_a_frozen_weight_keeps_nothing_of_x(name):
    """dx needs only w. Quantisation-aware training also needs the mask of x: one byte an element, and no codes."""
    module, x, g = layer(name, 96, 40, bias=False), gaussian(24, 96, 2).requires_grad_(), gaussian(24, 40, 3)
    (expected,) = torch.autograd.grad(module(x), x, g)
    module.weight.requires_grad_(False)
    saved = saved_by(lambda: module(x))
    kept = [t for t in saved if t.data_ptr() != module.weight.data_ptr()]
    assert len(kept) == len(saved) - 1
    kept = [t for t in kept if t.shape != (2,)]  # without the key of stochastic rounding
    if through_fprop(name):
        assert sum(t.nbytes for t in kept) == x.numel()
    else:
        assert kept == []
    rewind(module)
    (dx,) = torch.autograd.grad(module(x), x, g)
    assert torch.equal(dx, expected)


@every_recipe
def test_a_frozen_input_gets_no_gradient(name):
    module, x, g = layer(name, 96, 40), gaussian(24, 96, 2), gaussian(24, 40, 3)
    _, _, *expected = gradients(module, x, g)
    rewind(module)
    y = module(x)
    assert y.requires_grad
    dw, db = torch.autograd.grad(y, (module.weight, module.bias), g)
    assert torch.equal(dw, expected[0])
    assert torch.equal(db, expected[1])
    y = module(x)
    y.backward(g)
    assert x.grad is None


def test_a_frozen_layer_and_input_record_nothing():
    module = layer("fp8_blockwise", 32, 8).requires_grad_(False)
    assert saved_by(lambda: module(gaussian(4, 32, 0))) == []


@pytest.mark.parametrize("name, bytes_per_element", [("fp8_blockwise", 1), ("mxfp8", 1), ("fp8_rowwise", 1), ("bf16", 2), ("fp32", 4)])
def test_the_saved_activation_is_as_wide_as_its_codes(name, bytes_per_element):
    m, k = 256, 384
    module, x = layer(name, k, 8, bias=False), gaussian(m, k, 2)
    kept = [t for t in saved_by(lambda: module(x)) if t.data_ptr() != module.weight.data_ptr()]
    codes = [t for t in kept if t.numel() == m * k]
    assert [t.element_size() for t in codes] == [bytes_per_element]
    scales = sum(t.nbytes for t in kept) - codes[0].nbytes
    assert scales == {"fp8_blockwise": 4 * k * m // 128, "mxfp8": k * m // 32, "fp8_rowwise": 4 * k}.get(name, 0)
    if bytes_per_element < 4:  # x itself can be freed as well
        assert x.data_ptr() not in [t.data_ptr() for t in kept]


@pytest.mark.parametrize("name", ["fp8_blockwise", QAT])
def test_without_gradients_only_fprop_is_quantised(name, monkeypatch):
    """Evaluation, generation and the first pass of a reentrant checkpoint need no operand for wgrad."""
    calls = []
    for function in (quantize, fake_quantize):
        counted = lambda *args, function=function, **kwargs: calls.append(kwargs) or function(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(operands_module, function.__name__, counted)
    module, x = layer(name, 64, 8), gaussian(16, 64, 2)
    with torch.no_grad():
        module(x)
    assert len(calls) == 2
    with torch.inference_mode():
        module(x)
    assert len(calls) == 4


# NaN and infinity


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", SCALED)
def test_a_bad_activation_reaches_the_output(name, value):
    """A quantised x becomes NaN in the whole block. Other tokens keep their values unless a scale spans the tensor."""
    module, x = layer(name, 300, 40), gaussian(12, 300, 2)
    clean = module(x).detach()
    x[5, 200] = value
    y = module(x).detach()
    scaling = library.get(name).operands("fprop")[0].scaling  # pyright: ignore[reportOptionalMemberAccess]
    assert (~y[5].isfinite() if scaling is None else y[5].isnan()).all()
    others = torch.arange(12) != 5
    if scaling is not None and (scaling.block == (-1, -1) or scaling.scale_format == "e4m3"):
        assert y.isnan().all()
    else:
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_recipe
def test_a_bad_gradient_reaches_the_weight_gradient(name, value):
    """Dynamic loss scaling looks there: training would continue on an infinity that saturated."""
    module, x, g = layer(name, 64, 40), gaussian(48, 64, 2), gaussian(48, 40, 3)
    g[7, 11] = value
    _, dx, dw, db = gradients(module, x, g)
    mask = torch.zeros(40, 64, dtype=torch.bool)
    if name == QAT:  # the gradient is zero where the clamp cut
        saturated = quantize(module.weight.detach(), module.recipe.fprop.b, saturation=True).saturated  # pyright: ignore[reportArgumentType]
        assert saturated is not None
        mask = saturated
    assert not dw[11][~mask[11]].isfinite().any()
    assert not db[11].isfinite()
    assert not dx[7].isfinite().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", SCALED)
def test_a_bad_weight_reaches_the_output(name, value):
    module, x = layer(name, 64, 40), gaussian(8, 64, 2)
    with torch.no_grad():
        module.weight[3, 5] = value
    assert not module(x)[:, 3].isfinite().any()


def test_fp16_overflows_rather_than_saturates():
    """1e5 is beyond fp16: its product must be infinite or NaN, or loss scaling would never see the overflow."""
    module, x = layer("fp16", 16, 4, bias=False), gaussian(3, 16, 2)
    x[1, 2] = 1e5
    y = module(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


# Compiled code


# All come from inside PyTorch: the import of Inductor, .grad of an input that is not a leaf, an autograd Function that Dynamo instantiates.
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings(r"ignore:.*torch\.autograd\.function\.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["fp8_blockwise", "mxfp4", "bf16", QAT, "nvfp4", "fp8_delayed", "mxfp4_quartet"])
def test_compiled_equals_eager(name):
    """One graph gives the same codes; products may be summed in another order. The second step, which has state, is compared as well."""
    torch._dynamo.reset()
    m, n, k = 40, 24, 160
    module, x, g = layer(name, k, n), gaussian(m, k, 2), gaussian(m, n, 3)
    compiled = torch.compile(module, fullgraph=True)
    first, expected = gradients(module, x, g), next_step(module, 0.7 * x, 0.5 * g)
    assert_within_summation_order(gradients(compiled, x, g), first, x, module.weight.detach(), g)
    assert_within_summation_order(next_step(compiled, 0.7 * x, 0.5 * g), expected, x, module.weight.detach(), g)


# Autograd's other ways of calling a layer


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", STATELESS)
def test_activation_checkpointing_changes_nothing(name, use_reentrant):
    """The recipes are stateless: with state, the second forward pass would draw again, or see one more amax."""
    block = nn.Sequential(layer(name, 40, 56), nn.SiLU(), layer(name, 56, 40, seed=5))
    x, g = gaussian(24, 40, 2), gaussian(24, 40, 3)
    expected = gradients(block, x, g)
    x_leaf = x.clone().requires_grad_()
    y = checkpoint(block, x_leaf, use_reentrant=use_reentrant)
    assert isinstance(y, Tensor)
    y.backward(g)
    got = (y.detach(), x_leaf.grad, *(p.grad for p in block.parameters()))
    for a, b in zip(got, expected, strict=True):
        assert a is not None
        assert torch.equal(a, b)


@every_recipe
def test_gradients_accumulate(name):
    module = layer(name, 40, 24)
    batches = [(gaussian(16, 40, seed), gaussian(16, 24, seed + 1)) for seed in (10, 20)]
    separate = [gradients(module, x, g)[2:] for x, g in batches]
    for x, g in batches:
        rewind(module)
        module(x).backward(g)
    for parameter, a, b in zip(module.parameters(), *separate, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, a + b)


def test_a_second_derivative_is_refused():
    """Rounding has no useful derivative: a second derivative of the backward would be wrong in silence."""
    module, x = layer("fp8_blockwise", 40, 24), gaussian(16, 40, 2).requires_grad_()
    (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@every_recipe
def test_training_lowers_the_loss(name):
    """The layer learns another linear map from its outputs, in 40 steps of plain SGD."""
    module, target = layer(name, 32, 16, seed=0), gaussian(16, 32, 50) / 32**0.5
    optimizer = torch.optim.SGD(module.parameters(), lr=2.0)
    losses = []
    for step in range(40):
        x = gaussian(64, 32, 100 + step)
        loss = (module(x) - x @ target.t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < LOSS_LEFT[name] * losses[0]


# The module


@every_recipe
def test_deepcopy_is_independent(name):
    module, x, g = layer(name, 40, 24), gaussian(16, 40, 2), gaussian(16, 24, 3)
    twin = copy.deepcopy(module)
    expected = gradients(module, x, g)
    assert type(twin) is type(module)
    assert twin.recipe == module.recipe
    for a, b in zip(gradients(twin, x, g), expected, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(module(x).detach(), expected[0])


def test_a_stateful_recipe_keeps_its_state_in_buffers_and_a_restored_layer_resumes():
    """Draws and scales of the third step are the same, whether the first two steps were made here or come from a checkpoint."""
    for name in ("nvfp4", "fp8_delayed", "mxfp4_aws", "mxfp4_quartet"):
        module, x, g = layer(name, 40, 24), gaussian(16, 40, 2), gaussian(16, 24, 3)
        for scale in (3.0, 2.0):
            module(x * scale).backward(g * scale)
        restored = layer(name, 40, 24)
        restored.load_state_dict(module.state_dict())
        third, again = [torch.autograd.grad(m(x), m.weight, g)[0] for m in (module, restored)]
        assert torch.equal(third, again)
        fresh = layer(name, 40, 24)
        assert not torch.equal(third, torch.autograd.grad(fresh(x), fresh.weight, g)[0])


def test_evaluation_does_not_change_the_state():
    for name in ("nvfp4", "fp8_delayed"):
        module, x = layer(name, 40, 24), gaussian(16, 40, 2)
        module(x)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        module.eval()
        module(100 * x)
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_layers_steps_and_seeds_draw_apart():
    x, g = gaussian(16, 40, 2), gaussian(16, 24, 3)

    def weight_gradient(seed: int = 0, number: int = 0, passes: int = 1) -> Tensor:
        linear = nn.Linear(40, 24)
        linear.weight.data = gaussian(24, 40, 9)
        module = LowPrecisionLinear.from_linear(linear, library.get("nvfp4"), seed=seed, layer=number)
        return [torch.autograd.grad(module(x), module.weight, g)[0] for _ in range(passes)][-1]

    assert torch.equal(weight_gradient(), weight_gradient())
    for other in (weight_gradient(seed=1), weight_gradient(number=1), weight_gradient(passes=2)):
        assert not torch.equal(weight_gradient(), other)


def test_delayed_scaling_lags_behind():
    """The first pass's amax scales the second pass, so larger values saturate; the third pass has the larger amax."""
    linear = nn.Linear(16, 16, bias=False)
    linear.weight.data = torch.eye(16)
    module, x = LowPrecisionLinear.from_linear(linear, library.get("fp8_delayed")), torch.ones(1, 16)
    assert module(x).max() == 1.0
    assert module(4 * x).max() == 1.0
    assert module(4 * x).max() == 4.0


def test_a_layer_built_on_meta_gets_its_state_when_it_is_reset():
    with torch.device("meta"):
        module = LowPrecisionLinear.from_linear(nn.Linear(40, 24), library.get("nvfp4"), seed=7, layer=3)
    module.to_empty(device="cpu")
    module.reset_parameters()
    assert module.get_buffer("rounding_state").tolist() == [7, 3, 0]


def test_state_dicts_are_those_of_nn_linear(tmp_path):
    module, plain = layer("fp8_blockwise", 40, 24), nn.Linear(40, 24)
    assert list(module.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    plain.load_state_dict(module.state_dict())
    assert torch.equal(plain.weight, module.weight)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    other = layer("mxfp4", 40, 24, seed=9)
    other.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True))
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(other.bias, module.bias)


def test_from_linear_and_to_linear_work_in_place():
    linear = nn.Linear(40, 24)
    weight, before, keys = linear.weight, dict(linear.__dict__), set(linear.__dict__)
    module = LowPrecisionLinear.from_linear(linear, library.get("fp8_blockwise"))
    assert module is linear
    assert module.weight is weight
    assert isinstance(module, nn.Linear)
    assert module.to_linear() is linear
    assert type(linear) is nn.Linear
    assert set(linear.__dict__) == keys
    LowPrecisionLinear.from_linear(linear, library.get("nvfp4")).to_linear()
    assert list(linear.state_dict()) == ["weight", "bias"]
    assert all(linear.__dict__[key] is before[key] for key in keys)


def test_a_layer_can_be_given_another_recipe():
    module, x = layer("fp8_blockwise", 40, 24), gaussian(16, 40, 2)
    assert LowPrecisionLinear.from_linear(module, library.get("mxfp4"), "reference") is module
    assert torch.equal(module(x), layer("mxfp4", 40, 24)(x))


def test_repr_names_the_recipe():
    assert repr(layer("fp8_blockwise", 40, 24)) == "LowPrecisionLinear(in_features=40, out_features=24, bias=True, recipe=fp8_blockwise)"


def test_a_layer_built_on_meta_chooses_its_backend_where_it_lands():
    linear = nn.Linear(40, 24, device="meta")
    module = LowPrecisionLinear.from_linear(linear, library.get("fp8_blockwise"))
    assert module.gemms == {}
    module.to_empty(device="cpu")
    module.load_state_dict(layer("fp8_blockwise", 40, 24).state_dict())
    x = gaussian(16, 40, 2)
    assert torch.equal(module(x), layer("fp8_blockwise", 40, 24)(x))
    assert list(module.gemms) == ["cpu"]


def test_a_recipe_without_specs_is_nn_linear():
    """A recipe without any spec computes as nn.Linear does."""
    plain, x, g = nn.Linear(40, 24), gaussian(16, 40, 2), gaussian(16, 24, 3)
    expected = gradients(plain, x, g)
    module = LowPrecisionLinear.from_linear(plain, Recipe(name="none of it", fprop=GemmSpec()))
    for a, b in zip(gradients(module, x, g), expected, strict=True):
        torch.testing.assert_close(a, b)
