"""Describe decisions as a Plan: the backend of each product, and what is emulated and why."""

from lowprec.conversion import swiglu_fusion
from lowprec.conversion.decide import Decision, Decisions
from lowprec.conversion.layer_backends import LayerBackend, layer_backend
from lowprec.conversion.plan import GemmPlan, LayerPlan, Plan
from lowprec.conversion.shares import shortfall
from lowprec.errors import UserError
from lowprec.nn import experts
from lowprec.recipe import GEMMS, Recipe

_HIGH_PRECISION_BITS = 16
"""Bits of an operand from which on a recipe counts as high precision."""


def describe(decisions: Decisions) -> Plan:
    """Return the plan of `decisions`.

    Raises:
        UserError: the backend that the configuration asks for can't run a recipe, or `strict`
            forbids what would happen.
    """
    device_type = decisions.facts.device
    layers = tuple(
        _describe_layer(name, decision, device_type) for name, decision in decisions.layers.items()
    )
    parts = (swiglu_fusion.part(decisions.fused),) if decisions.fused else ()
    asked = decisions.config.recipe
    warning = None
    if asked is not None and asked.narrowest_bits < _HIGH_PRECISION_BITS:
        warning = shortfall(layers, asked.name)
    plan = Plan(
        device=device_type,
        layers=layers,
        parts=parts,
        recipe=None if asked is None else asked.name,
        warnings=() if warning is None else (warning,),
    )
    if decisions.config.strict:
        _check_strict(plan)
    return plan


def _describe_layer(name: str, decision: Decision, device_type: str) -> LayerPlan:
    weight = decision.weight
    recipe = decision.recipe
    gemms = ()
    reason = decision.reason
    if recipe is not None:
        layers = layer_backend(decision.backend)
        gemms = tuple(
            _describe_gemm(recipe, gemm, layers, device_type, weight.shape) for gemm in GEMMS
        )
        reason = "; ".join(dict.fromkeys(gemm.reason for gemm in gemms if not gemm.native))
    return LayerPlan(
        name=name,
        kind=weight.kind,
        shape=weight.shape,
        recipe=None if recipe is None else recipe.name,
        rule=decision.rule,
        gemms=gemms,
        reason=reason,
        blocked=decision.blocked,
        experts=weight.experts,
        per_token=experts.per_token(weight.module, weight.experts),
        slow=decision.slow,
    )


def _describe_gemm(
    recipe: Recipe, gemm: str, layers: LayerBackend, device_type: str, shape: tuple[int, int]
) -> GemmPlan:
    backend, support = layers.supports(recipe, gemm, device_type, shape)
    return GemmPlan(
        gemm=gemm,
        equation=recipe.equation(gemm),
        backend=backend,
        native=support.native,
        reason=support.reason,
    )


def _check_strict(plan: Plan) -> None:
    for layer in plan.layers:
        if layer.blocked:
            raise UserError(f"precision.strict: {layer.name} can't be converted: {layer.reason}")
        if layer.converted and not layer.native:
            raise UserError(
                f"precision.strict: {layer.name} would run {layer.recipe} emulated on "
                f"{plan.device}: {layer.reason}"
            )
