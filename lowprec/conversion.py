"""Turning the linear layers of a model to low precision, in place, and back.

    plan = lowprec.convert(model, "fp8_blockwise")

A linear layer is decided by the first rule that matches its whole name; without one it takes the configuration's recipe, except for the
output head, which stays as it is: its gradient feeds everything and its error goes straight into the loss (arXiv 2412.19437, 3.3.1).
Embeddings and norms are no linear layers and are never touched. Adapters that PEFT added stay as they are too, unless a rule names them;
rules know every layer by the name that it has without PEFT as well.

Parameters keep their identity, names and state-dict keys; the modules stay the same objects. So convert before or after building the
optimizer, loading a checkpoint or registering hooks; but before `fully_shard` or parametrizations, which give a module a class of
their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lowprec import fusion
from lowprec.config import TE, PrecisionConfig, parse_precision
from lowprec.errors import UserError
from lowprec.gemm import select
from lowprec.nn import LowPrecisionLinear
from lowprec.nn.linear import gemm_size
from lowprec.nn.te_linear import DelayedTELinear, TELinear, te_reason, why_not_shape, why_not_te
from lowprec.payoff import TOKENS, payoff
from lowprec.plan import GemmPlan, LayerPlan, Plan
from lowprec.recipe import GEMMS, GemmSpec, Recipe
from lowprec.recipe.rules import Rule, check_rules

_HEADS = ("lm_head", "embed_out", "output_projection", "score", "classifier")
"""Last parts of the names by which models call their output layer, for those that have no `get_output_embeddings`."""

_CONVERTED = (LowPrecisionLinear, TELinear, DelayedTELinear)

AS_IT_IS = Recipe(name="as it is", fprop=GemmSpec(), dgrad=GemmSpec(), wgrad=GemmSpec(), about="nn.Linear's own products")
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

    Converting a converted model gives it the new precision; what the new one leaves alone is turned back. A model whose precision changes
    during a run says so by `later`: then state dicts look the same at any time of it, and no state is lost by a change.

    Args:
        precision: a recipe name, a mapping, a YAML path, a Recipe or a PrecisionConfig (see `lowprec.config`).
        device: the device that will train it, if that is not where the parameters are now.
        tokens: of a forward pass on one device, if known: batch size times sequence length. It decides where FP8 pays (`lowprec.payoff`).
        compiled: whether the blocks are compiled: then the host's time does not count in that.
        raised: recipes of single layers, by name, that win over the precision's where they have more bits.
        later: other precisions that the model will get. The state that their recipes keep (`recipe/state.py`) is there from the start, and
            what is there already stays as it is.
    Returns:
        The Plan: every linear layer, its recipe and backend, and the reason where it was left alone.
    Raises:
        UserError: the precision is wrong, a rule matches nothing, or `strict` forbids what would happen. The model is untouched then.
    """
    config = parse_precision(precision)
    plan = make_plan(model, config, device=device, tokens=tokens, compiled=compiled, raised=raised)
    decisions = _decisions(model, config, plan.device, tokens, compiled, raised)
    others = [_decisions(model, parse_precision(other), plan.device, tokens, compiled) for other in later]
    for number, (name, decision) in enumerate(decisions.items()):
        module = model.get_submodule(name)
        keeps = tuple(recipe for other in others if (recipe := other[name].recipe) is not None)
        if decision.recipe is not None or keeps:
            assert isinstance(module, nn.Linear)
            if config.backend == TE:
                assert decision.recipe is not None
                TELinear.from_linear(module, decision.recipe)
                continue
            if isinstance(module, TELinear):
                module.to_linear()
            LowPrecisionLinear.from_linear(
                module,
                decision.recipe or AS_IT_IS,
                config.backend if decision.recipe is not None else "auto",
                plan.device,
                seed=torch.initial_seed(),
                layer=number,
                keeps=keeps,
                evaluation=None if config.evaluation == "training" or decision.recipe is None else config.evaluation,
            )
        elif isinstance(module, _CONVERTED):
            module.to_linear()
    fusion.apply(model, _fused(model, config, decisions, plan.device))
    return plan


def revert(model: nn.Module) -> int:
    """Turn every converted layer of `model` back into the nn.Linear it was, in place. Returns how many there were."""
    layers = [module for module in model.modules() if isinstance(module, _CONVERTED)]
    for layer in layers:
        layer.to_linear()
    fusion.apply(model, [])
    return len(layers)


def make_plan(
    model: nn.Module,
    precision: Any,
    *,
    device: str | torch.device | None = None,
    tokens: int | None = None,
    compiled: bool = False,
    raised: Mapping[str, Recipe] = MappingProxyType({}),
) -> Plan:
    """What `convert` would do, without doing it. The model may be on the meta device. Errors are `convert`'s."""
    config = parse_precision(precision)
    device_type = _device_type(model, device)
    decisions = _decisions(model, config, device_type, tokens, compiled, raised)
    layers = tuple(
        _plan_layer(name, model.get_submodule(name), decision, config.backend, device_type) for name, decision in decisions.items()
    )
    fused = _fused(model, config, decisions, device_type)
    plan = Plan(device=device_type, layers=layers, parts=(fusion.part(fused),) if fused else ())
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


def _decisions(
    model: nn.Module,
    config: PrecisionConfig,
    device_type: str,
    tokens: int | None,
    compiled: bool,
    raised: Mapping[str, Recipe] = MappingProxyType({}),
) -> dict[str, _Decision]:
    """By the full name of each linear layer, in the model's order."""
    linears = dict(_linear_layers(model))
    found = {name: _without_peft(model, name) for name in linears}
    plain = {name: own for name, (own, _) in found.items()}
    rules = [_PlainNameRule(modules=rule.modules, recipe=rule.recipe, plain=plain) for rule in config.ordered_rules()]
    check_rules(rules, list(plain.values()))
    heads = _output_heads(model, linears, plain)
    decisions = {}
    for name, module in linears.items():
        rule = next((rule for rule in rules if rule.matches_layer(name)), None)
        recipe, by = (config.recipe, "default") if rule is None else (rule.recipe, rule.modules)
        if recipe is None:
            decision = _Decision(recipe=None, rule=by, reason="the recipe is 'none'")
        elif rule is None and name in heads:
            decision = _Decision(recipe=None, rule=by, reason="the output head stays in high precision unless a rule names it")
        elif rule is None and found[name][1]:
            decision = _Decision(recipe=None, rule=by, reason="adapter: small, and trained in high precision")
        elif (obstacle := _obstacle(module) or _te_obstacle(module, recipe, config.backend)) is not None:
            decision = _Decision(recipe=None, rule=by, reason=obstacle, blocked=True)
        elif rule is None and (loss := _loss(module, recipe, config, device_type, tokens, compiled)) is not None:
            decision = _Decision(recipe=None, rule=by, reason=loss)
        else:
            decision = _Decision(recipe=recipe, rule=by)
        higher = raised.get(name)
        if higher is not None and decision.recipe is not None and higher.narrowest_bits > decision.recipe.narrowest_bits:
            decision = replace(decision, recipe=higher, rule="raised")
        decisions[name] = decision
    return decisions


def _fused(model: nn.Module, config: PrecisionConfig, decisions: dict[str, _Decision], device_type: str) -> list[str]:
    if not config.fuse or config.backend == TE:
        return []
    return fusion.fusable(model, {name: decision.recipe for name, decision in decisions.items()}, device_type, config.backend)


def _loss(module: nn.Module, recipe: Recipe, config: PrecisionConfig, device_type: str, tokens: int | None, compiled: bool) -> str | None:
    """Why the recipe would slow the layer down; None if it would not, or if that is not to be asked."""
    assert isinstance(module, nn.Linear)
    if not config.skip_slow or config.backend != "auto" or device_type != "cuda":
        return None
    chosen = {gemm: select(*recipe.operands(gemm), device_type, "auto", recipe.gemm(gemm).sums)[0].name for gemm in GEMMS}
    if not {chosen["fprop"], chosen["dgrad"]} <= {"hopper", "scaled_mm"}:
        return None
    N, K = module.weight.shape
    wgrad_x = recipe.operands("wgrad")[1]
    found = payoff(N, K, "" if wgrad_x is None else wgrad_x.kind, tokens, compiled)
    if found.pays:
        return None
    return f"{recipe.name} would run at {found.speedup:.2f} of bf16's speed with {tokens or TOKENS} tokens a pass: {found.limit}"


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that multiplies by a weight matrix, nn.Linear or like it, once."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            yield name, module


def _obstacle(module: nn.Module) -> str | None:
    if type(module) in (nn.Linear, *_CONVERTED):
        return None
    kind = type(module).__name__
    if _is_conv1d(module):
        return "transformers' Conv1D keeps its weight transposed and is no nn.Linear"
    if kind.startswith("FSDP"):
        return f"{kind}: already sharded; convert before fully_shard"
    return f"{kind} is a subclass of nn.Linear with a forward of its own"


def _te_obstacle(module: nn.Module, recipe: Recipe, backend: str) -> str | None:
    assert isinstance(module, nn.Linear)
    return why_not_shape(module, recipe) if backend == TE else None


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
        return super().matches(name) or any(super(_PlainNameRule, self).matches(full) for full, own in self.plain.items() if own == name)


_PEFT = {
    "PeftModel": ("base_model",),
    "PeftMixedModel": ("base_model",),
    "BaseTuner": ("model", "lora_model"),
    "BaseTunerLayer": ("base_layer",),
    "AuxiliaryTrainingWrapper": ("original_module", "modules_to_save", "token_adapter"),
}
"""PEFT's wrappers, by the name of their class so that PEFT need not be imported, and where each keeps what was there before it."""


def _without_peft(model: nn.Module, name: str) -> tuple[str, bool]:
    """The name that a layer has without PEFT, and whether PEFT added it: whether it lies in a wrapper, but is not what that wraps."""
    plain, added, module = [], False, model
    for part in name.split("."):
        kept = next((_PEFT[base.__name__] for base in type(module).__mro__ if base.__name__ in _PEFT), None)
        copies = isinstance(module, nn.ModuleDict) and plain[-1:] == ["modules_to_save"]
        added |= kept is not None and part not in kept
        if copies:  # by the adapter's name
            plain.pop()
        elif kept is None or part not in kept or part == "modules_to_save":
            plain.append(part)
        module = module.get_submodule(part)
    return ".".join(plain), added


def _output_heads(model: nn.Module, linears: dict[str, nn.Module], plain: dict[str, str]) -> set[str]:
    """The layers whose output is the model's: by transformers' own account, by a weight tied to an embedding, or by name."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    head = getattr(head, "base_layer", head)  # an adapter's
    return {
        name
        for name, module in linears.items()
        if module is head or id(module.weight) in embeddings or plain[name].rpartition(".")[2] in _HEADS
    }


def _plan_layer(name: str, module: nn.Module, decision: _Decision, backend: str, device_type: str) -> LayerPlan:
    weight: Any = module.weight
    gemms, reason = (), decision.reason
    if decision.recipe is not None:
        gemms = tuple(_plan_gemm(decision.recipe, gemm, device_type, backend, tuple(weight.shape)) for gemm in GEMMS)
        reason = "; ".join(dict.fromkeys(gemm.reason for gemm in gemms if not gemm.native))
    return LayerPlan(
        name=name,
        kind="Linear" if isinstance(module, _CONVERTED) else type(module).__name__,
        shape=tuple(weight.t().shape if _is_conv1d(module) else weight.shape),
        recipe=None if decision.recipe is None else decision.recipe.name,
        rule=decision.rule,
        gemms=gemms,
        reason=reason,
        blocked=decision.blocked,
    )


def _plan_gemm(recipe: Recipe, gemm: str, device_type: str, backend: str, shape: tuple[int, int]) -> GemmPlan:
    if backend == TE:
        if (reason := why_not_te(recipe, device_type)) is not None:
            raise UserError(f"precision.backend: 'te' can't run recipe {recipe.name} on {device_type}: {reason}")
        return GemmPlan(gemm=gemm, equation=recipe.equation(gemm), backend=TE, native=True, reason=te_reason(recipe))
    chosen, support = select(*recipe.operands(gemm), device_type, backend, recipe.gemm(gemm).sums, gemm_size(gemm, *shape))
    return GemmPlan(gemm=gemm, equation=recipe.equation(gemm), backend=chosen.name, native=support.native, reason=support.reason)


def _check_strict(plan: Plan) -> None:
    for layer in plan.layers:
        if layer.blocked:
            raise UserError(f"precision.strict: {layer.name} can't be converted: {layer.reason}")
        if layer.converted and not layer.native:
            raise UserError(f"precision.strict: {layer.name} would run {layer.recipe} emulated on {plan.device}: {layer.reason}")


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, the linear layer of GPT-2, told by its name so that transformers need not be imported."""
    return type(module).__name__ == "Conv1D"


def _device_type(model: nn.Module, device: str | torch.device | None) -> str:
    if device is not None:
        return torch.device(device).type
    found = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return found if found != "meta" else "cuda" if torch.cuda.is_available() else "cpu"
