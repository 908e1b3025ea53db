"""Every named recipe runs through LowPrecisionLinear: each of the three GEMMs multiplies the right operands, with the stated quality."""

import pytest
import torch
from torch import Tensor, nn

from lowprec.formats.hadamard import Hadamard
from lowprec.formats.random import derive_key
from lowprec.nn import LowPrecisionLinear
from lowprec.quant import OperandSpec, quantize
from lowprec.recipe import GEMMS, FromFprop, Recipe, library
from lowprec.recipe.state import OPERANDS, ROUNDING_STATE, new_state, next_key
from lowprec.testing import (
    DISTRIBUTIONS,
    ODD_SHAPES,
    RECIPE_SHAPE,
    SQNR_CEILING_ABOVE_FLOOR_DB,
    SQNR_CEILING_FP32_DB,
    SQNR_FLOORS_DB,
    SQNR_SHAPE,
    fp32_accumulation_bound,
    gaussian,
    sqnr_db,
)
from lowprec.testing.theory import gaussian_sqnr_db

COMPOSED = {
    "blockwise, fprop in bf16": {"base": "fp8_blockwise", "fprop": "bf16"},
    "mxfp4, wgrad in bf16": {"base": "mxfp4", "wgrad": "bf16"},
    "mxfp4 fprop, mxfp8 backward": {"base": "mxfp8", "fprop": "mxfp4"},
    "qat, fprop in mxfp4": {"base": "qat_int8dyn_int4", "fprop": "mxfp4"},  # dgrad and wgrad take mxfp4's operands, and its mask
    "qat, fprop in bf16": {"base": "qat_int8dyn_int4", "fprop": "bf16"},
    "blockwise, dgrad through fprop's w": {"base": "fp8_blockwise", "dgrad": "qat_int8dyn_int4"},
    "qat, wgrad in bf16": {"base": "qat_int8dyn_int4", "wgrad": "bf16"},
}
RECIPES = {**{name: library.get(name) for name in library.names()}, **{name: library.resolve(value) for name, value in COMPOSED.items()}}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def operands(make, shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return random x [M, K], w [N, K] of the size of an initialised weight, bias [N], and the gradient of y [M, N].

    The gradient is random because ones would hide mistakes.
    """
    m, n, k = shape
    return make(m, k, seed), make(n, k, seed + 1) / k**0.5, make(1, n, seed + 2)[0], make(m, n, seed + 3)


def run(recipe: Recipe, x: Tensor, w: Tensor, bias: Tensor | None, g: Tensor) -> dict[str, Tensor]:
    """Return y and the gradients of x, w and bias, from the layer."""
    linear = nn.Linear(w.shape[1], w.shape[0], bias=bias is not None)
    layer = LowPrecisionLinear.from_linear(linear, recipe)
    with torch.no_grad():
        layer.weight.copy_(w)
        if bias is not None:
            layer.bias.copy_(bias)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    assert x.grad is not None
    assert layer.weight.grad is not None
    got = {"fprop": y.detach(), "dgrad": x.grad, "wgrad": layer.weight.grad}
    return got if bias is None else {**got, "bias": layer.bias.grad}  # pyright: ignore[reportReturnType]


def made(recipe: Recipe, gemm: str, side: str, t: Tensor, source: OperandSpec | None) -> Tensor:
    """Return an operand of the first forward pass, transformed and quantised with the draws that the layer's state gives it."""
    hadamard = recipe.gemm(gemm).hadamard
    t = t if hadamard is None else hadamard.apply(t)
    if source is None:
        return t
    key = None
    if source.stochastic:
        key = derive_key(next_key(new_state(recipe, torch.device("cpu"))[ROUNDING_STATE], 0, False), OPERANDS.index((gemm, side)))
    return quantize(t, source, key=key).dequantize()


def matrix(hadamard: Hadamard) -> Tensor:
    """Return diag(s) H / sqrt(n), by Sylvester's construction, fp64."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < hadamard.size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return torch.tensor(hadamard.signs, dtype=torch.float64).diag() @ h / hadamard.size**0.5


def reference_operands(recipe: Recipe, x: Tensor, w: Tensor, g: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the two dequantised operands of each GEMM, contraction axis last, straight from the recipe's definition."""

    def second(gemm: str, again: Tensor, from_fprop: Tensor) -> Tensor:
        source = recipe.gemm(gemm).b
        if not isinstance(source, FromFprop):
            return made(recipe, gemm, "b", again, source)
        return from_fprop.t() if source.requantize is None else made(recipe, gemm, "b", from_fprop.t(), source.requantize)

    def first(gemm: str, t: Tensor) -> Tensor:
        return made(recipe, gemm, "a", t, recipe.gemm(gemm).a)  # pyright: ignore[reportArgumentType]

    x_fprop, w_fprop = first("fprop", x), second("fprop", w, w)
    return {
        "fprop": (x_fprop, w_fprop),
        "dgrad": (first("dgrad", g), second("dgrad", w.t(), w_fprop)),
        "wgrad": (first("wgrad", g.t()), second("wgrad", x.t(), x_fprop)),
    }


def cut(recipe: Recipe, x: Tensor, w: Tensor) -> dict[str, Tensor]:
    """Return where the straight-through gradient is zero: of dx if wgrad.b is fprop's fake-quantised x, and of dw likewise."""
    hadamard = recipe.fprop.hadamard
    masks = {}
    for gemm, source, t, spec in (("dgrad", recipe.wgrad.b, x, recipe.fprop.a), ("wgrad", recipe.dgrad.b, w, recipe.fprop.b)):
        t = t if hadamard is None else hadamard.apply(t)
        masks[gemm] = torch.zeros_like(t, dtype=torch.bool)
        if isinstance(source, FromFprop) and isinstance(spec, OperandSpec):
            saturated = quantize(t, spec, saturation=True).saturated
            masks[gemm] = masks[gemm] if saturated is None else saturated
    return masks


@every_recipe
@pytest.mark.parametrize("shape", [RECIPE_SHAPE, *ODD_SHAPES], ids=str)
def test_each_gemm_multiplies_the_operands_that_its_recipe_says(recipe, shape):
    """The layer is compared with float64 products of dequantised operands.

    The bound is that of fp32 accumulation alone, so no other operand passes.
    """
    x, w, bias, g = operands(DISTRIBUTIONS["heavy_tailed"], shape)
    got, masks = run(recipe, x, w, bias, g), cut(recipe, x, w)
    for gemm, (a, b) in reference_operands(recipe, x, w, g).items():
        expected = a.double() @ b.double().t()
        bound = fp32_accumulation_bound(a, b)
        if gemm == "fprop":
            expected = expected + bias.double()
            bound = bound + 2.0**-24 * (expected.abs() + bound)  # one more rounding: the bias
        elif masks[gemm].any():
            expected, bound = expected.masked_fill(masks[gemm], 0), bound.masked_fill(masks[gemm], 0)
            if recipe.fprop.hadamard is None:
                assert (got[gemm][masks[gemm]] == 0).all()
        if gemm != "fprop" and recipe.fprop.hadamard is not None:  # the gradient goes back through fprop's transform
            inverse = matrix(recipe.fprop.hadamard).t()
            groups = [part.unflatten(1, (-1, len(inverse))) for part in (expected, bound)]
            expected = (groups[0] @ inverse).flatten(1)[:, : x.shape[1]]
            # each of the transform's log2(n) levels of additions rounds once, and so does the scaling
            roundings = 2.0**-24 * (len(inverse).bit_length() + 1)
            bound = ((groups[1] + roundings * groups[0].abs()) @ inverse.abs()).flatten(1)[:, : x.shape[1]]
        error = (got[gemm].double() - expected).abs()
        assert (error <= bound).all(), f"{gemm}: {(error / bound).max():.3g} times the bound"
    ones = torch.ones(1, len(g))
    assert ((got["bias"].double() - g.double().sum(0)).abs() <= fp32_accumulation_bound(ones, g.t())[0]).all()


def test_the_reference_distinguishes_the_recipes():
    """The test above could not fail if its bound were loose: no recipe's operands pass for another's, in any of the three GEMMs."""
    x, w, _, g = operands(DISTRIBUTIONS["heavy_tailed"], RECIPE_SHAPE)
    products = {name: reference_operands(recipe, x, w, g) for name, recipe in RECIPES.items() if name in library.names()}
    # These pairs differ only in what underflows, since both scales are powers of two, or share operands by definition.
    twins = [{"fp8_blockwise_ue8m0", "mxfp8"}, {"fp8_tensorwise", "fp8_delayed"}]
    shared = {
        "fprop": [{"bf16", "mxfp4_aws"}, {"fp8_rowwise", "fp8_rowwise_wgrad_hp"}, {"fp8_blockwise", "fp8_blockwise_wgrad2d"}],
        "dgrad": [{"fp8_rowwise", "fp8_rowwise_wgrad_hp"}, {"fp8_blockwise", "fp8_blockwise_wgrad2d"}],
        "wgrad": [{"bf16", "fp8_rowwise_wgrad_hp"}, {"bf16", "int8"}, {"fp8_rowwise_wgrad_hp", "int8"}],
    }
    for gemm in ("fprop", "dgrad", "wgrad"):
        for name, ops in products.items():
            a, b = ops[gemm]
            bound = fp32_accumulation_bound(a, b)
            for other, other_ops in products.items():
                if other == name or {name, other} in twins + shared[gemm]:
                    continue
                c, d = other_ops[gemm]
                if "mxfp4_quartet" in (name, other) and gemm != "fprop":
                    continue  # its gradients are not transformed back yet: there is no product to compare
                distance = (a.double() @ b.double().t() - c.double() @ d.double().t()).abs()
                assert (distance > bound).any(), f"{gemm}: {name} and {other} are within the bound of one another"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", library.names())
def test_quality_against_high_precision(name, distribution):
    x, w, _, g = operands(DISTRIBUTIONS[distribution], SQNR_SHAPE)
    got = run(library.get(name), x, w, None, g)  # an exact bias would make y look better
    xd, wd, gd = x.double(), w.double(), g.double()
    exact = {"fprop": xd @ wd.t(), "dgrad": gd @ wd, "wgrad": gd.t() @ xd}
    for (gemm, reference), floor in zip(exact.items(), SQNR_FLOORS_DB[name][distribution], strict=True):
        quality = sqnr_db(reference, got[gemm])
        ceiling = SQNR_CEILING_FP32_DB if name == "fp32" else floor + SQNR_CEILING_ABOVE_FLOOR_DB
        assert floor <= quality <= ceiling, f"{gemm}: {quality:.2f} dB"


@pytest.mark.parametrize("name", ["fp8_blockwise", "mxfp8", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxfp4_aws", "nvfp4"])
def test_floors_follow_from_theory(name):
    """A floor lies 0.2 to 0.6 dB below what integration over a gaussian predicts for the operands' formats, blocks and roundings."""
    m, n, k = SQNR_SHAPE
    for gemm, length, floor in zip(GEMMS, (k, n, m), SQNR_FLOORS_DB[name]["gaussian"], strict=True):
        specs = library.get(name).operands(gemm)
        if all(spec is not None and spec.scaling is not None for spec in specs):
            assert 0.2 <= gaussian_sqnr_db(*specs, length) - floor <= 0.6


def test_every_named_recipe_has_floors():
    assert set(SQNR_FLOORS_DB) == set(library.names())
    assert all(set(floors) == set(DISTRIBUTIONS) for floors in SQNR_FLOORS_DB.values())


# Quantisation-aware training is compared with autograd through a fake-quantiser that is written out.


def round_straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def fake_int8_per_token(x: Tensor) -> Tensor:
    """Return an asymmetric fake-quantised x, per row.

    Scale and zero point are constants to autograd, and torch.clamp's own gradient is the mask.
    """
    with torch.no_grad():
        low, high_ = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        scale = (high_ - low) / 255
        zero = (-128 - (low / scale).round()).clamp(-128, 127)
    q = torch.clamp(round_straight_through(x * (1 / scale)) + zero, -128, 127)
    return (q - zero) * scale


def fake_int4_per_group(w: Tensor) -> Tensor:
    groups = w.unflatten(1, (-1, 32))
    with torch.no_grad():
        scale = groups.abs().amax(2, keepdim=True) / 7.5
    return (torch.clamp(round_straight_through(groups * (1 / scale)), -8, 7) * scale).flatten(1)


# round_straight_through computes x + (round(x) - x), which is round(x) to within an ulp of a code (<= 128). Its gradient meets
# (1 / scale) * scale, which is one to within two roundings. Both are relative errors of an operand, of a few 2^-24.
QAT_OPERAND_ERROR = 4 * 2.0**-24


def test_qat_gradients_equal_autograd_through_an_explicit_fake_quantiser():
    x, w, _, g = operands(DISTRIBUTIONS["gaussian"], (64, 48, 96))
    # Both ends of this row round up, so that 128 is cut (see the quantiser's tests): amax of int8 saturates only in such a row.
    x[5] = x[5].clamp(-1, 1)
    x[5, 0], x[5, 1] = -1.5, 253.5
    got = run(library.get("qat_int8dyn_int4"), x, w, None, g)
    x_leaf, w_leaf = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = fake_int8_per_token(x_leaf) @ fake_int4_per_group(w_leaf).t()
    y.backward(g)
    expected = {"fprop": y.detach(), "dgrad": x_leaf.grad, "wgrad": w_leaf.grad}

    masks = cut(library.get("qat_int8dyn_int4"), x, w)
    assert masks["dgrad"].nonzero().tolist() == [[5, 1]]
    assert (
        0.01 < masks["wgrad"].float().mean() < 0.02
    )  # +amax is cut in about 40% of the groups of 32, in 79% of those where it is positive
    for gemm in ("dgrad", "wgrad"):
        assert expected[gemm] is not None
        assert torch.equal(expected[gemm] == 0, masks[gemm])
        assert torch.equal(got[gemm] == 0, masks[gemm])

    for gemm, (a, b) in reference_operands(library.get("qat_int8dyn_int4"), x, w, g).items():
        bound = 2 * fp32_accumulation_bound(a, b) + 2 * QAT_OPERAND_ERROR * (a.double().abs() @ b.double().abs().t())
        assert expected[gemm] is not None
        assert ((got[gemm].double() - expected[gemm].double()).abs() <= bound).all()


def test_qat_is_exact_where_nothing_is_rounded():
    """With codes times a scale of one, the fake-quantiser is the identity: y and both gradients are those of the plain linear layer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (8, 32), generator=generator).float()
    x[:, 0], x[:, 1] = -128.0, 127.0
    w = torch.randint(-7, 8, (6, 32), generator=generator).float()
    w[:, 0], w = -7.5, w  # scale 1; -7.5 becomes -8, the only value that changes
    g = torch.randint(-4, 5, (8, 6), generator=generator).float()
    got = run(library.get("qat_int8dyn_int4"), x, w, None, g)
    served = w.clone()
    served[:, 0] = -8.0
    assert torch.equal(got["fprop"], x @ served.t())
    assert torch.equal(got["dgrad"], g @ served)
    assert torch.equal(got["wgrad"], g.t() @ x)


def test_healing_fprop_changes_fprop_alone():
    """With {base: fp8_blockwise, fprop: bf16}, y is bf16's and the gradients are fp8_blockwise's, bit for bit."""
    x, w, bias, g = operands(gaussian, RECIPE_SHAPE)
    healed, base, bf16 = (run(RECIPES[name], x, w, bias, g) for name in ("blockwise, fprop in bf16", "fp8_blockwise", "bf16"))
    assert torch.equal(healed["fprop"], bf16["fprop"])
    assert not torch.equal(healed["fprop"], base["fprop"])
    assert torch.equal(healed["dgrad"], base["dgrad"])
    assert torch.equal(healed["wgrad"], base["wgrad"])
