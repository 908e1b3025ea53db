"""Decide which recipe each linear layer of a model gets, or why it stays in high precision.

    facts = RunFacts.of(model, device="cuda", tokens=8192, compiled=True)
    decisions = decide(model, config, facts)

Nothing is changed here: `describe` turns decisions into the plan, `convert.apply` carries them out.

The first rule that matches a layer's whole name decides; without one the layer takes the
configuration's recipe. A layer stays in high precision for the first of these reasons that holds;
those marked * count only where no rule names the layer:

    the recipe is 'none'
    * it is the output head: its gradient feeds everything, its error goes straight into the loss
    * it is a gate of experts, whose errors send tokens elsewhere (arXiv 2412.19437, 3.3.1)
    * it is an adapter that PEFT added
    it can't be converted (`discover.why_not_convert`); then the decision is `blocked`
    * the recipe would slow it down (`cost_model`)

Rules know every layer by its full name and by the name that it has without PEFT.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import nn

from lowprec.conversion import swiglu_fusion
from lowprec.conversion.config import ConversionConfig
from lowprec.conversion.cost_model import TOKENS, against_bf16
from lowprec.conversion.discover import Survey, Weight, survey, why_not_convert
from lowprec.conversion.layer_backends import layer_backend
from lowprec.gemm import LayerShape, select
from lowprec.nn.gemms import backend_or_auto
from lowprec.recipe import Recipe
from lowprec.recipe.rules import Rule, check_rules


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of a run that its configuration does not hold, but on which decisions depend."""

    device: str
    """Type of the device that trains the model: "cpu" or "cuda"."""
    tokens: int | None = None
    """Number of tokens in a forward pass on one device; None: unknown."""
    compiled: bool = False
    """Flag: the blocks are compiled, so the host's time does not count."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        device: str | torch.device | None = None,
        tokens: int | None = None,
        compiled: bool = False,
    ) -> "RunFacts":
        """Return the facts of a run of `model`. Without a `device` it is the one that holds the
        parameters, or, for a model on the meta device, a GPU if there is one."""
        if device is not None:
            device_type = torch.device(device).type
        else:
            device_type = next((p.device.type for p in model.parameters()), "cpu")
            if device_type == "meta":
                device_type = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(device=device_type, tokens=tokens, compiled=compiled)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The recipe of one weight, or the reason why it stays in high precision."""

    weight: Weight
    recipe: Recipe | None
    """None: it stays in high precision."""
    rule: str
    """The expression of the rule that decided, "default", or "raised"."""
    reason: str = ""
    """The reason why it stays in high precision."""
    blocked: bool = False
    """Flag: the layer was meant to be converted, but can't be."""
    slow: bool = False
    """Flag: the recipe would slow the layer down."""
    backend: str = "auto"
    evaluation: Recipe | None = None
    """The recipe of evaluation, if that is another one."""
    keeps: tuple[Recipe, ...] = ()
    """Recipes of the rest of the run, whose state the layer holds from now on."""


@dataclass(frozen=True)
class Decisions:
    """The decisions on all linear layers of a model under one precision."""

    config: ConversionConfig
    facts: RunFacts
    layers: Mapping[str, Decision]
    """The decision on each layer, by full name, in the model's order."""
    mlps: tuple[str, ...]
    """Names of the MLPs whose SwiGLU can be fused, if down_proj takes the gate."""

    @cached_property
    def fused(self) -> tuple[str, ...]:
        """Names of the MLPs that are fused."""
        if not self.config.fuse or not layer_backend(self.config.backend).fuses:
            return ()
        recipes = {name: decision.recipe for name, decision in self.layers.items()}
        return tuple(
            name
            for name in self.mlps
            if swiglu_fusion.takes_gate(
                recipes.get(f"{name}.down_proj".lstrip(".")), self.facts.device, self.config.backend
            )
        )

    def raised(self, recipes: Mapping[str, Recipe]) -> "Decisions":
        """Return decisions in which converted layers take their recipe of `recipes`, by full name,
        where that has more bits."""
        layers = {
            name: _raised(decision, recipes.get(name), self.config.backend, self.facts.device)
            for name, decision in self.layers.items()
        }
        return replace(self, layers=layers)

    def keeping(self, later: Iterable["Decisions"]) -> "Decisions":
        """Return decisions whose layers keep the state of the recipes that `later` gives them."""
        others = [other.layers for other in later]
        layers = {}
        for name, decision in self.layers.items():
            recipes = (other[name].recipe for other in others)
            keeps = tuple(recipe for recipe in recipes if recipe is not None)
            layers[name] = replace(decision, keeps=keeps)
        return replace(self, layers=layers)


def decide(model: nn.Module, config: ConversionConfig, facts: RunFacts) -> Decisions:
    """Return the decision on each linear layer of `model`, which may be on the meta device.

    Raises:
        UserError: a rule matches nothing, or a weight has no shape yet.
    """
    found = survey(model)
    rules = _plain_name_rules(config.ordered_rules(), found.plain)
    check_rules(rules, list(found.plain.values()))
    layers = {}
    for name in found.weights:
        rule = next((rule for rule in rules if rule.matches_layer(name)), None)
        layers[name] = _decide_layer(name, found, rule, config, facts)
    return Decisions(
        config=config, facts=facts, layers=layers, mlps=tuple(swiglu_fusion.candidates(model))
    )


def _decide_layer(
    name: str, found: Survey, rule: Rule | None, config: ConversionConfig, facts: RunFacts
) -> Decision:
    weight = found.weights[name]
    recipe = config.recipe if rule is None else rule.recipe
    decision = partial(Decision, weight=weight, rule="default" if rule is None else rule.modules)
    if recipe is None:
        return decision(recipe=None, reason="the recipe is 'none'")
    if rule is None and (reason := found.high_precision.get(name)) is not None:
        return decision(recipe=None, reason=reason)
    if (reason := why_not_convert(weight, recipe, layer_backend(config.backend))) is not None:
        # Of a parameter that may be no factor of a product, nobody has asked for a conversion.
        asked = rule is not None or weight.matrix is None or weight.matrix.is_known
        return decision(recipe=None, reason=reason, blocked=asked)
    may_skip = rule is None and config.skip_slow and config.backend == "auto"
    if may_skip and (reason := slowdown_reason(weight, recipe, facts)) is not None:
        return decision(recipe=None, reason=reason, slow=True)
    return decision(
        recipe=recipe,
        backend=config.backend,
        evaluation=None if config.evaluation == "training" else config.evaluation,
    )


def _raised(decision: Decision, recipe: Recipe | None, backend: str, device_type: str) -> Decision:
    if (
        recipe is None
        or decision.recipe is None
        or recipe.narrowest_bits <= decision.recipe.narrowest_bits
    ):
        return decision
    able = backend_or_auto(recipe, backend, device_type)
    return replace(decision, recipe=recipe, rule="raised", backend=able)


def slowdown_reason(weight: Weight, recipe: Recipe, facts: RunFacts) -> str | None:
    """Return why `recipe`, by the backends that `auto` takes, would be slower than bf16 for a
    layer; None if it would not, or if the backends of fprop and dgrad state no cost."""
    if facts.device != "cuda":
        return None
    N, K = weight.shape
    kinds = [
        "" if spec is None else spec.kind
        for spec in (recipe.operands("fprop")[0], recipe.operands("wgrad")[1])
    ]
    layer = LayerShape(M=facts.tokens or TOKENS, N=N, K=K, fprop_kind=kinds[0], wgrad_kind=kinds[1])
    costs = []
    for gemm in ("fprop", "dgrad"):
        sums = recipe.gemm(gemm).sums
        backend, _ = select(*recipe.operands(gemm), facts.device, "auto", sums)
        if (cost := backend.cost(layer)) is None:
            return None
        costs.append(cost)
    if weight.stack:
        return (
            "experts run one after another here, each launched anew for its number of tokens: "
            "not known to pay on a GPU"
        )
    slower = max(costs, key=lambda cost: cost.device)
    found = against_bf16(slower, layer, compiled=facts.compiled)
    if found.pays:
        return None
    return (
        f"{recipe.name} would run at {found.speedup:.2f} of bf16's speed with {layer.M} tokens a "
        f"pass: {found.limit}"
    )


@dataclass(frozen=True, kw_only=True)
class _PlainNameRule(Rule):
    """A rule for names without PEFT's parts that matches full names as well."""

    plain: Mapping[str, str]
    """The plain name of each layer by its full name."""
    full: Mapping[str, list[str]]
    """The full names of the layers that have a plain name."""

    def matches_layer(self, name: str) -> bool:
        """Return whether the rule matches a layer, given its full name."""
        return super().matches(name) or super().matches(self.plain[name])

    def matches(self, name: str) -> bool:
        """Return whether the rule matches a layer, given its plain name, which messages use."""
        return super().matches(name) or any(map(super().matches, self.full.get(name, ())))


def _plain_name_rules(rules: Iterable[Rule], plain: Mapping[str, str]) -> list[_PlainNameRule]:
    full: dict[str, list[str]] = {}
    for name, own in plain.items():
        full.setdefault(own, []).append(name)
    return [
        _PlainNameRule(modules=rule.modules, recipe=rule.recipe, plain=plain, full=full)
        for rule in rules
    ]
