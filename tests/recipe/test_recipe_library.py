"""Recipes as data: names, forms of a configuration, equations, and refusals."""

import pytest

from lowprec.errors import UserError
from lowprec.formats.element import BF16, FP16, FP32
from lowprec.quant import OperandSpec
from lowprec.recipe import FROM_FPROP, GEMMS, GemmSpec, Recipe, library
from lowprec.recipe.rules import Rule, check_rules


def test_names_and_their_recipes():
    assert library.names() == [
        "fp32", "bf16", "fp16", "fp8_tensorwise", "fp8_delayed", "fp8_rowwise", "fp8_rowwise_wgrad_hp", "fp8_blockwise",
        "fp8_blockwise_ue8m0", "fp8_blockwise_wgrad2d", "mxfp8", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxfp4_aws", "mxfp4_quartet", "nvfp4",
        "nvfp4_4over6", "int8", "qat_int8dyn_int4",
    ]  # fmt: skip
    for name in library.names():
        recipe = library.get(name)
        assert recipe.name == name
        assert recipe.about
        assert "\n" not in recipe.about


@pytest.mark.parametrize(
    "name, equations",
    [
        ("bf16", ("y = bf16(x) · bf16(w)ᵀ", "dx = bf16(g) · bf16(wᵀ)ᵀ", "dw = bf16(gᵀ) · bf16(xᵀ)ᵀ")),
        (
            "fp8_blockwise",
            (
                "y = e4m3[1x128 fp32](x) · e4m3[128x128 fp32](w)ᵀ  (fp32 sums, promoted every 128)",
                "dx = e4m3[1x128 fp32](g) · e4m3[128x128 fp32](wᵀ)ᵀ  (fp32 sums, promoted every 128)",
                "dw = e4m3[1x128 fp32](gᵀ) · e4m3[1x128 fp32](xᵀ)ᵀ  (fp32 sums, promoted every 128)",
            ),
        ),
        (
            "nvfp4",
            (
                "y = e2m1[1x16 e4m3](x) · e2m1[16x16 e4m3](w)ᵀ",
                "dx = e2m1[1x16 e4m3 stochastic](g) · e2m1[16x16 e4m3](wᵀ)ᵀ",
                "dw = e2m1[1x16 e4m3 stochastic](H16·gᵀ) · e2m1[1x16 e4m3](H16·xᵀ)ᵀ",
            ),
        ),
        (
            "fp8_tensorwise",
            (
                "y = e4m3[tensor fp32](x) · e4m3[tensor fp32](w)ᵀ",
                "dx = e5m2[tensor fp32](g) · e4m3[tensor fp32](wᵀ)ᵀ",
                "dw = e5m2[tensor fp32](gᵀ) · e4m3[tensor fp32](xᵀ)ᵀ",
            ),
        ),
        (
            "mxfp4",
            (
                "y = e2m1[1x32 e8m0:floor](x) · e2m1[1x32 e8m0:floor](w)ᵀ",
                "dx = e2m1[1x32 e8m0:floor](g) · e2m1[1x32 e8m0:floor](wᵀ)ᵀ",
                "dw = e2m1[1x32 e8m0:floor](gᵀ) · e2m1[1x32 e8m0:floor](xᵀ)ᵀ",
            ),
        ),
        (
            "qat_int8dyn_int4",
            (
                "y = int8[row fp32 asymmetric](x) · int4[1x32 fp32](w)ᵀ",
                "dx = g · int4[1x32 fp32](w)",
                "dw = gᵀ · int8[row fp32 asymmetric](x)",
            ),
        ),
    ],
)
def test_equations(name, equations):
    assert tuple(library.get(name).equation(gemm) for gemm in GEMMS) == equations


def test_the_rest_of_the_model():
    rest = {name: library.get(name).rest for name in library.names()}
    assert (rest.pop("fp32"), rest.pop("fp16")) == (FP32, FP16)
    assert set(rest.values()) == {BF16}


def test_operands_replace_from_fprop():
    qat = library.get("qat_int8dyn_int4")
    assert qat.operands("fprop") == (qat.fprop.a, qat.fprop.b)
    assert qat.operands("dgrad") == (None, qat.fprop.b)
    assert qat.operands("wgrad") == (None, qat.fprop.a)


def test_from_fprop_is_no_source_for_fprop_or_a_gradient():
    for gemm, spec in [
        ("fprop", GemmSpec(a=FROM_FPROP)),
        ("fprop", GemmSpec(b=FROM_FPROP)),
        ("dgrad", GemmSpec(a=FROM_FPROP)),
        ("wgrad", GemmSpec(a=FROM_FPROP)),
    ]:
        with pytest.raises(ValueError, match="recipe mine: FROM_FPROP is a source for b of dgrad and wgrad only"):
            Recipe(name="mine", **{gemm: spec})  # pyright: ignore[reportArgumentType]


def test_composition():
    base, bf16 = library.get("fp8_blockwise"), library.get("bf16")
    healed = library.resolve({"base": "fp8_blockwise", "fprop": "bf16"})
    assert healed.name == "fp8_blockwise(fprop=bf16)"
    assert (healed.fprop, healed.dgrad, healed.wgrad) == (bf16.fprop, base.dgrad, base.wgrad)
    assert healed == base.changed({"fprop": bf16}, {})
    assert library.resolve({"base": "mxfp8"}) == library.get("mxfp8")
    nested = library.resolve({"base": {"base": "mxfp4", "wgrad": "mxfp8"}, "dgrad": bf16})
    assert nested.name == "mxfp4(wgrad=mxfp8)(dgrad=bf16)"
    assert (nested.wgrad, nested.dgrad) == (library.get("mxfp8").wgrad, bf16.dgrad)


@pytest.mark.parametrize(
    "value, message",
    [
        ("fp8_blokwise", "unknown recipe 'fp8_blokwise'; did you mean 'fp8_blockwise'?"),
        ({"fprop": "bf16"}, "a recipe given as a mapping needs 'base', the recipe that it changes; got {'fprop': 'bf16'}"),
        ({"base": "bf16", "fprob": "bf16"}, "unknown key 'fprob' in a recipe; did you mean 'fprop'?"),
        ({"base": "bf16", "fprop": "bf61"}, "unknown recipe 'bf61'; did you mean 'bf16'?"),
        (3, "a recipe is a name or a mapping with 'base', got 3"),
    ],
)
def test_wrong_recipes(value, message):
    with pytest.raises(UserError) as error:
        library.resolve(value)
    assert str(error.value) == message


def test_a_recipe_of_ones_own():
    spec = OperandSpec(element=BF16)
    mine = Recipe(name="mine", fprop=GemmSpec(a=spec))
    assert library.resolve(mine) is mine
    assert mine.equation("fprop") == "y = bf16(x) · wᵀ"
    assert mine.equation("dgrad") == "dx = g · wᵀᵀ"


def test_rules_match_whole_names():
    rule = Rule(modules=r"layers\.1", recipe=None)
    assert rule.matches("layers.1")
    assert not rule.matches("layers.10")
    assert not rule.matches("model.layers.1")


NAMES = [f"layers.{i}.{part}" for i in range(12) for part in ("up", "down")]


@pytest.mark.parametrize(
    "rules, message",
    [
        (["head"], "rule 'head' matches none of the 24 linear layers; known: down, up"),
        ([r".*\.dwn"], r"rule '.*\.dwn' matches none of the 24 linear layers; did you mean 'down'?"),
        (["down"], "rule 'down' matches none of the 24 linear layers; it is a part of 'layers.0.down', but a rule matches whole names: "
         "try '.*down.*'"),
        ([r"layers\.\d\..*", r"layers\.3\.up"], r"rule 'layers\.3\.up' never applies: earlier rules match all 1 of its layers"),
        ([r".*up", r".*down", r"layers\.11\..*"], r"rule 'layers\.11\..*' never applies: earlier rules match all 2 of its layers"),
    ],
)  # fmt: skip
def test_rules_that_can_not_apply(rules, message):
    with pytest.raises(UserError) as error:
        check_rules([Rule(modules=rule, recipe=None) for rule in rules], NAMES)
    assert str(error.value) == message


def test_a_rule_that_applies_to_some_of_its_matches_is_fine():
    check_rules([Rule(modules=r"layers\.0\..*", recipe=None), Rule(modules=r".*up", recipe=None)], NAMES)


def test_a_rule_that_is_no_expression():
    with pytest.raises(UserError, match=r"rule 'layers\.\(' is not a regular expression: "):
        Rule(modules="layers.(", recipe=None)


# Recipes as lines of a configuration


def test_single_fields_of_a_gemm_can_be_changed():
    recipe = library.resolve({"base": "fp8_blockwise", "fprop": {"accumulator_bits": 14, "promote_every": 512}, "dgrad": "bf16"})
    assert (recipe.fprop.accumulator_bits, recipe.fprop.promote_every) == (14, 512)
    assert recipe.fprop.a == library.get("fp8_blockwise").fprop.a
    assert recipe.dgrad == library.get("bf16").dgrad
    assert recipe.wgrad == library.get("fp8_blockwise").wgrad
    assert recipe.equation("fprop").endswith("(14-bit sums, promoted every 512)")


def test_a_published_recipe_can_be_written_out():
    """NVFP4's wgrad is written in its notation, except the published signs, which have no number."""
    g, x = "e2m1[1x16 e4m3 stochastic]", "e2m1[1x16 e4m3]"
    written = library.resolve({"base": "fp32", "wgrad": {"a": g, "b": x, "hadamard": 16}})
    assert (written.wgrad.a, written.wgrad.b) == (library.get("nvfp4").wgrad.a, library.get("nvfp4").wgrad.b)
    assert written.wgrad.hadamard is not None
    assert written.wgrad.hadamard.size == 16
    straight = library.resolve({"base": "bf16", "fprop": {"b": "int4[1x32 fp32]"}, "dgrad": {"a": "none", "b": "from_fprop"}})
    assert straight.dgrad == library.get("qat_int8dyn_int4").dgrad


@pytest.mark.parametrize(
    "fprop, words",
    [
        ({"accumulator_bit": 14}, "did you mean 'accumulator_bits'"),
        ({"accumulator_bits": "many"}, "accumulator_bits is a whole number"),
        ({"accumulator_bits": True}, "accumulator_bits is a whole number"),
        ({"accumulator_bits": 99}, "between 2 and 24"),
        ({"promote_every": 0}, "positive number"),
        ({"hadamard": 24}, "16, 32, 64, 128"),
        ({"a": "e4m4[1x128 fp32]"}, "did you mean 'e4m3'"),
        ({"a": "e4m3"}, "needs a scaling"),
        ({"a": "e4m3[1x128 fp23]"}, "did you mean 'fp32'"),
        ({"a": "from_fprop"}, "for b of dgrad and wgrad only"),
    ],
)
def test_invalid_gemms_are_refused(fprop, words):
    with pytest.raises(UserError, match=words) as caught:
        library.resolve({"base": "bf16", "fprop": fprop})
    assert "\n" not in str(caught.value)


def test_impossible_combinations_are_refused():
    quartet = library.get("mxfp4_quartet")
    with pytest.raises(ValueError, match="both take its operands"):
        quartet.changed({"dgrad": library.get("bf16")}, {})
    with pytest.raises(ValueError, match="delayed scaling"):
        library.get("fp8_delayed").changed({"dgrad": library.get("qat_int8dyn_int4")}, {})
    with pytest.raises(ValueError, match="quantised already"):
        GemmSpec(b=FROM_FPROP, hadamard=quartet.fprop.hadamard)
