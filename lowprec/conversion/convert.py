"""Turning the linear layers of a model to low precision, in place, and back.

    plan = lowprec.convert(model, "fp8_blockwise")

A linear layer is decided by the first rule that matches its whole name; without one it takes the
configuration's recipe, except for the output head, which stays as it is: its gradient feeds
everything and its error goes straight into the loss. So do the gates of a mixture of experts, whose
errors send tokens elsewhere (arXiv 2412.19437, 3.3.1). Embeddings and norms are no linear layers
and are never touched. Adapters that PEFT added stay as they are too, unless a rule names them;
rules know every layer by the name that it has without PEFT as well.

The weights of a mixture's experts, stacks of matrices in one parameter, are decided one by one like
layers, by the parameter's name (`nn/experts.py`).

Parameters keep their identity, names and state-dict keys; the modules stay the same objects. So
convert before or after building the optimizer, loading a checkpoint or registering hooks; but
before `fully_shard` or parametrizations, which give a module a class of their own. Recipes that
keep state add buffers: a plain checkpoint is loaded before converting to one of them, or not
strictly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lowprec.conversion import swiglu_fusion
from lowprec.conversion.config import TE, ConversionConfig, parse_conversion
from lowprec.conversion.cost_model import TOKENS, payoff
from lowprec.conversion.discover import (
    CONVERTED,
    Weight,
    expert_gates,
    find_weights,
    output_heads,
    recipes_of,
    why_not_convert,
)
from lowprec.conversion.peft_names import name_without_peft
from lowprec.conversion.plan import GemmPlan, LayerPlan, Plan
from lowprec.errors import UserError
from lowprec.gemm import select
from lowprec.nn import LowPrecisionLinear, experts
from lowprec.nn.experts import ExpertProjection
from lowprec.nn.operands import able_backend, gemm_size
from lowprec.nn.te_linear import TELinear, te_reason, why_not_te
from lowprec.recipe import GEMMS, GemmSpec, Recipe
from lowprec.recipe.rules import Rule, check_rules
from lowprec.recipe.state import FINISHED, states_of

AS_IT_IS = Recipe(
    name="as it is",
    fprop=GemmSpec(),
    dgrad=GemmSpec(),
    wgrad=GemmSpec(),
    about="nn.Linear's own products",
)
"""Of a layer that is left alone now, but not in all of a run."""


def convert(
    model: nn.Module,
    precision: Any,
    *,
    device: str | torch.device | None = None,
    tokens: int | None = None,
    compiled: bool = False,
    raised: Mapping[str, Recipe] = MappingProxyType({}),
    later: Sequence[Any] = (),
) -> Plan:
    """Convert the linear layers of `model` in place.

    Converting a converted model gives it the new precision; what the new one leaves alone is turned
    back. A model whose precision changes during a run says so by `later`: then state dicts look the
    same at any time of it, and no state is lost by a change.

    Args:
        precision: a recipe name, a mapping, a YAML path, a Recipe or a ConversionConfig (see
            `lowprec.conversion.config`).
        device: the device that will train it, if that is not where the parameters are now.
        tokens: of a forward pass on one device, if known: batch size times sequence length. It
            decides where FP8 pays (`lowprec.conversion.cost_model`).
        compiled: whether the blocks are compiled: then the host's time does not count in that.
        raised: recipes of single layers, by name, that win over the precision's where they have
            more bits.
        later: other precisions that the model will get. The state that their recipes keep
            (`recipe/state.py`) is there from the start, and what is there already stays as it is.
    Returns:
        The Plan: every linear layer, its recipe and backend, and the reason where it was left
            alone.
    Raises:
        UserError: the precision is wrong, a rule matches nothing, or `strict` forbids what would
            happen. The model is untouched then.
    """
    config = parse_conversion(precision)
    plan = make_plan(model, config, device=device, tokens=tokens, compiled=compiled, raised=raised)
    decisions = _decisions(model, config, plan.device, tokens, compiled, raised)
    others = [
        _decisions(model, parse_conversion(other), plan.device, tokens, compiled) for other in later
    ]
    kept = {
        name: tuple(recipe for other in others if (recipe := other[name].recipe) is not None)
        for name in decisions
    }
    other = None if config.evaluation == "training" else config.evaluation
    evaluations = {
        name: None if decision.recipe is None else other for name, decision in decisions.items()
    }
    for name, decision in decisions.items():  # for its errors, before anything is changed
        states_of(
            [r for r in (decision.recipe, *kept[name], evaluations[name]) if r is not None],
            torch.device("meta"),
        )
    for module in model.modules():  # another run begins
        if getattr(module, FINISHED, False):
            setattr(module, FINISHED, False)
    projections: dict[nn.Module, dict[str, ExpertProjection]] = {}
    for number, (name, weight) in enumerate(list(find_weights(model))):
        recipe, backend, keeps, evaluation = (
            decisions[name].recipe,
            decisions[name].backend,
            kept[name],
            evaluations[name],
        )
        if weight.stack:
            if recipe is not None or keeps or experts.is_converted(weight.module):
                projections.setdefault(weight.module, {})[weight.stack] = ExpertProjection(
                    recipe or AS_IT_IS,
                    weight.shape,
                    backend,
                    weight.data.device,
                    seed=torch.initial_seed(),
                    layer=number,
                    keeps=keeps if evaluation is None else (*keeps, evaluation),
                    evaluation=evaluation,
                )
        else:
            _convert_linear(weight.module, recipe, backend, plan.device, number, keeps, evaluation)
    for module, made in projections.items():
        if all(
            projection.recipe is AS_IT_IS and not projection.keeps for projection in made.values()
        ):
            experts.revert_experts(module)
        else:
            rest = {
                name: _as_it_is(module, name) for name in experts.stacks(module) if name not in made
            }
            experts.convert_experts(module, {**made, **rest})
    swiglu_fusion.apply(model, _fused(model, config, decisions, plan.device))
    return plan


def _convert_linear(
    module: nn.Module,
    recipe: Recipe | None,
    backend: str,
    device_type: str,
    number: int,
    keeps: tuple[Recipe, ...],
    evaluation: Recipe | None,
) -> None:
    if recipe is None and not keeps:
        if isinstance(module, CONVERTED):
            module.to_linear()
        return
    assert isinstance(module, nn.Linear)
    if backend == TE:
        assert recipe is not None
        TELinear.from_linear(module, recipe)
        return
    if isinstance(module, TELinear):
        module.to_linear()
    LowPrecisionLinear.from_linear(
        module,
        recipe or AS_IT_IS,
        backend,
        device_type,
        seed=torch.initial_seed(),
        layer=number,
        keeps=keeps,
        evaluation=evaluation,
    )


def _as_it_is(module: nn.Module, name: str) -> ExpertProjection:
    return ExpertProjection(
        AS_IT_IS, experts.stack_shape(module, name)[1:], "auto", getattr(module, name).device
    )


def revert(model: nn.Module) -> int:
    """Turn every converted layer of `model` back into what it was, in place. Returns how many there
    were, experts' weights by the stack."""
    converted = [
        module
        for module in model.modules()
        if isinstance(module, CONVERTED) or experts.is_converted(module)
    ]
    count = len(recipes_of(model)) + sum(isinstance(module, TELinear) for module in converted)
    for module in converted:
        if isinstance(module, CONVERTED):
            module.to_linear()
        experts.revert_experts(module)
    swiglu_fusion.apply(model, [])
    return count


def make_plan(
    model: nn.Module,
    precision: Any,
    *,
    device: str | torch.device | None = None,
    tokens: int | None = None,
    compiled: bool = False,
    raised: Mapping[str, Recipe] = MappingProxyType({}),
) -> Plan:
    """What `convert` would do, without doing it. The model may be on the meta device. Errors are
    `convert`'s."""
    config = parse_conversion(precision)
    device_type = _device_type(model, device)
    decisions = _decisions(model, config, device_type, tokens, compiled, raised)
    weights = dict(find_weights(model))
    layers = tuple(
        _plan_layer(name, weights[name], decision, device_type)
        for name, decision in decisions.items()
    )
    fused = _fused(model, config, decisions, device_type)
    plan = Plan(
        device=device_type, layers=layers, parts=(swiglu_fusion.part(fused),) if fused else ()
    )
    if config.strict:
        _check_strict(plan)
    return plan


@dataclass(frozen=True, kw_only=True)
class _Decision:
    """What becomes of one linear layer."""

    recipe: Recipe | None
    rule: str
    reason: str = ""
    blocked: bool = False
    backend: str = "auto"


def _decisions(
    model: nn.Module,
    config: ConversionConfig,
    device_type: str,
    tokens: int | None,
    compiled: bool,
    raised: Mapping[str, Recipe] = MappingProxyType({}),
) -> dict[str, _Decision]:
    """By the full name of each linear layer, in the model's order."""
    weights = dict(find_weights(model))
    if lazy := next((name for name, weight in weights.items() if is_lazy(weight.data)), None):
        raise UserError(
            f"{lazy}.weight has no shape yet: let the model see one batch before its precision is "
            "decided"
        )
    found = {name: name_without_peft(model, name, weight.stack) for name, weight in weights.items()}
    plain = {name: own for name, (own, _) in found.items()}
    rules = [
        _PlainNameRule(modules=rule.modules, recipe=rule.recipe, plain=plain)
        for rule in config.ordered_rules()
    ]
    check_rules(rules, list(plain.values()))
    heads, gates = output_heads(model, weights, plain), expert_gates(model)
    decisions = {}
    for name, weight in weights.items():
        rule = next((rule for rule in rules if rule.matches_layer(name)), None)
        recipe, by = (config.recipe, "default") if rule is None else (rule.recipe, rule.modules)
        if recipe is None:
            decision = _Decision(recipe=None, rule=by, reason="the recipe is 'none'")
        elif rule is None and name in heads:
            decision = _Decision(
                recipe=None,
                rule=by,
                reason="the output head stays in high precision unless a rule names it",
            )
        elif rule is None and name in gates:
            decision = _Decision(
                recipe=None,
                rule=by,
                reason="a gate of experts stays in high precision unless a rule names it",
            )
        elif rule is None and found[name][1]:
            decision = _Decision(
                recipe=None, rule=by, reason="adapter: small, and trained in high precision"
            )
        elif (obstacle := why_not_convert(weight, recipe, config.backend)) is not None:
            decision = _Decision(recipe=None, rule=by, reason=obstacle, blocked=True)
        elif (
            rule is None
            and (loss := _loss(weight, recipe, config, device_type, tokens, compiled)) is not None
        ):
            decision = _Decision(recipe=None, rule=by, reason=loss)
        else:
            decision = _Decision(recipe=recipe, rule=by, backend=config.backend)
        higher = raised.get(name)
        if (
            higher is not None
            and decision.recipe is not None
            and higher.narrowest_bits > decision.recipe.narrowest_bits
        ):
            decision = replace(
                decision,
                recipe=higher,
                rule="raised",
                backend=able_backend(higher, config.backend, device_type),
            )
        decisions[name] = decision
    return decisions


def _fused(
    model: nn.Module, config: ConversionConfig, decisions: dict[str, _Decision], device_type: str
) -> list[str]:
    if not config.fuse or config.backend == TE:
        return []
    return swiglu_fusion.fusable(
        model,
        {name: decision.recipe for name, decision in decisions.items()},
        device_type,
        config.backend,
    )


def _loss(
    weight: Weight,
    recipe: Recipe,
    config: ConversionConfig,
    device_type: str,
    tokens: int | None,
    compiled: bool,
) -> str | None:
    """Why the recipe would slow the layer down; None if it would not, or if that is not to be
    asked."""
    if not config.skip_slow or config.backend != "auto" or device_type != "cuda":
        return None
    chosen = {
        gemm: select(*recipe.operands(gemm), device_type, "auto", recipe.gemm(gemm).sums)[0].name
        for gemm in GEMMS
    }
    if not {chosen["fprop"], chosen["dgrad"]} <= {"hopper", "scaled_mm"}:
        return None
    if weight.stack:
        return "experts run one after another here, each launched anew for its number of tokens: not known to pay on a GPU"
    N, K = weight.shape
    fprop_x, wgrad_x = recipe.operands("fprop")[0], recipe.operands("wgrad")[1]
    kinds = ["" if spec is None else spec.kind for spec in (fprop_x, wgrad_x)]
    found = payoff(N, K, kinds[1], tokens, compiled, fprop_kind=kinds[0])
    if found.pays:
        return None
    return f"{recipe.name} would run at {found.speedup:.2f} of bf16's speed with {tokens or TOKENS} tokens a pass: {found.limit}"


@dataclass(frozen=True, kw_only=True)
class _PlainNameRule(Rule):
    """A rule for names without PEFT's parts, which matches by the full name as well."""

    plain: Mapping[str, str]
    """The plain name of each layer by its full name."""

    def matches_layer(self, name: str) -> bool:
        """By a full name."""
        return super().matches(name) or super().matches(self.plain[name])

    def matches(self, name: str) -> bool:
        """By a plain name, which is how messages call a layer."""
        return super().matches(name) or any(
            super(_PlainNameRule, self).matches(full)
            for full, own in self.plain.items()
            if own == name
        )


def _plan_layer(name: str, weight: Weight, decision: _Decision, device_type: str) -> LayerPlan:
    gemms, reason = (), decision.reason
    if decision.recipe is not None:
        gemms = tuple(
            _plan_gemm(decision.recipe, gemm, device_type, decision.backend, weight.shape)
            for gemm in GEMMS
        )
        reason = "; ".join(dict.fromkeys(gemm.reason for gemm in gemms if not gemm.native))
    return LayerPlan(
        name=name,
        kind="Linear" if isinstance(weight.module, CONVERTED) else type(weight.module).__name__,
        shape=weight.shape,
        recipe=None if decision.recipe is None else decision.recipe.name,
        rule=decision.rule,
        gemms=gemms,
        reason=reason,
        blocked=decision.blocked,
        experts=weight.experts,
    )


def _plan_gemm(
    recipe: Recipe, gemm: str, device_type: str, backend: str, shape: tuple[int, int]
) -> GemmPlan:
    if backend == TE:
        if (reason := why_not_te(recipe, device_type)) is not None:
            raise UserError(
                f"precision.backend: 'te' can't run recipe {recipe.name} on {device_type}: {reason}"
            )
        return GemmPlan(
            gemm=gemm,
            equation=recipe.equation(gemm),
            backend=TE,
            native=True,
            reason=te_reason(recipe),
        )
    chosen, support = select(
        *recipe.operands(gemm),
        device_type,
        backend,
        recipe.gemm(gemm).sums,
        gemm_size(gemm, *shape),
    )
    return GemmPlan(
        gemm=gemm,
        equation=recipe.equation(gemm),
        backend=chosen.name,
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


def _device_type(model: nn.Module, device: str | torch.device | None) -> str:
    if device is not None:
        return torch.device(device).type
    found = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return found if found != "meta" else "cuda" if torch.cuda.is_available() else "cpu"
