"""Convert the linear layers of a model to low precision, in place, and revert them.

    plan = lowprec.convert(model, "fp8_blockwise")

Embeddings and norms are no linear layers and are never touched. `decide` says which linear layers
are converted, and why others stay in high precision. The weights of a mixture's experts, stacks of
matrices in one parameter, are decided one by one like layers, by the parameter's name
(`nn/experts.py`).

Parameters keep their identity, names and state-dict keys; the modules stay the same objects. So
convert before or after building the optimizer, loading a checkpoint or registering hooks; but
before `fully_shard` or parametrizations, which give a module a class of their own. Recipes that
keep state add buffers: load a plain checkpoint before converting to one of them, or not strictly.
"""

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from lowprec.conversion import swiglu_fusion
from lowprec.conversion.config import Precision, parse_conversion
from lowprec.conversion.decide import Decision, Decisions, RunFacts, decide
from lowprec.conversion.describe import describe
from lowprec.conversion.layer_backends import CONVERTED, layer_backend
from lowprec.conversion.plan import Plan
from lowprec.log import tell
from lowprec.nn import experts
from lowprec.nn.experts import ExpertProjection
from lowprec.recipe import GemmSpec, Recipe
from lowprec.recipe.finished import begin_run
from lowprec.recipe.state import states_of

AS_IT_IS = Recipe(
    name="as it is",
    fprop=GemmSpec(),
    dgrad=GemmSpec(),
    wgrad=GemmSpec(),
    about="nn.Linear's own products",
)
"""Recipe of a layer that stays in high precision in this phase only."""


def convert(
    model: nn.Module,
    precision: Precision,
    *,
    device: str | torch.device | None = None,
    tokens: int | None = None,
    compiled: bool = False,
    raised: Mapping[str, Recipe] = MappingProxyType({}),
    later: Sequence[Precision] = (),
    quiet: bool = False,
) -> Plan:
    """Convert the linear layers of `model` in place.

    Converting a converted model gives it the new precision; layers that stay in high precision
    under the new one are reverted. A model whose precision changes during a run names the other
    precisions in `later`: then its state dict has the same keys throughout the run, and no change
    loses state.

    Args:
        precision: a recipe name, a mapping, a YAML path, a Recipe or a ConversionConfig (see
            `lowprec.conversion.config`).
        device: the device that will train the model, if that is not where the parameters are now.
        tokens: number of tokens in a forward pass on one device, if known: batch size times
            sequence length. It decides where FP8 pays (`lowprec.conversion.cost_model`).
        compiled: whether the blocks are compiled: then the host's time does not count in that.
        raised: recipes of single layers, by name, that replace the precision's where they have
            more bits.
        later: other precisions that the model will get. The layers hold the state that their
            recipes keep (`recipe/state.py`) from the start, and keep the state that they hold
            already.
        quiet: whether the caller shows the plan's warnings itself.
    Returns:
        The Plan: every linear layer, its recipe and backend, and the reason where it stays in high
            precision.
    Raises:
        UserError: the precision is wrong, a rule matches nothing, or `strict` forbids what would
            happen. The model is untouched then.
    """
    config = parse_conversion(precision)
    facts = RunFacts.of(model, device=device, tokens=tokens, compiled=compiled)
    configured = decide(model, config, facts)
    decisions = configured.raised(raised)
    plan = describe(decisions)
    others = map(parse_conversion, later)
    decisions = decisions.keeping(
        [configured if other == config else decide(model, other, facts) for other in others]
    )
    _check_states(decisions)
    apply(model, decisions)
    for warning in () if quiet else plan.warnings:
        tell(warning, logging.WARNING)
    return plan


def make_plan(
    model: nn.Module,
    precision: Precision,
    *,
    device: str | torch.device | None = None,
    tokens: int | None = None,
    compiled: bool = False,
    raised: Mapping[str, Recipe] = MappingProxyType({}),
) -> Plan:
    """Return what `convert` would do, without doing it. The model may be on the meta device.
    Arguments and errors are those of `convert`."""
    config = parse_conversion(precision)
    facts = RunFacts.of(model, device=device, tokens=tokens, compiled=compiled)
    return describe(decide(model, config, facts).raised(raised))


def apply(model: nn.Module, decisions: Decisions) -> None:
    """Convert the layers of `model` as decided, in place."""
    begin_run(model)
    projections: dict[nn.Module, dict[str, ExpertProjection]] = {}
    able = (layer for layer in decisions.layers.values() if layer.weight.matrix is None)
    for number, decision in enumerate(able):
        weight = decision.weight
        if not weight.stack:
            _convert_linear(weight.module, decision, decisions.facts.device, number)
        elif _has_recipes(decision) or experts.is_converted(weight.module):
            made = projections.setdefault(weight.module, {})
            made[weight.stack] = _make_projection(decision, number)
    for module, made in projections.items():
        _convert_experts(module, made)
    swiglu_fusion.apply(model, decisions.fused)


def revert(model: nn.Module) -> int:
    """Turn every converted layer of `model` back into what it was, in place. Return the number of
    layers, with a stack of experts' weights as one."""
    count = 0
    for module in list(model.modules()):
        if isinstance(module, CONVERTED):
            count += 1
            module.to_linear()
        elif experts.is_converted(module):
            count += len(experts.projections_of(module))
            experts.revert_experts(module)
    swiglu_fusion.apply(model, [])
    return count


def _check_states(decisions: Decisions) -> None:
    """Raise UserError if the recipes of a layer can't keep their state side by side."""
    for decision in decisions.layers.values():
        recipes = (decision.recipe, *decision.keeps, decision.evaluation)
        states_of([recipe for recipe in recipes if recipe is not None], torch.device("meta"))


def _has_recipes(decision: Decision) -> bool:
    return decision.recipe is not None or bool(decision.keeps)


def _convert_linear(module: nn.Module, decision: Decision, device_type: str, number: int) -> None:
    """Convert a linear layer, or revert it; `number` is its place among the model's weights."""
    layers = layer_backend(decision.backend)
    stays = _has_recipes(decision) and isinstance(module, layers.modules)
    if isinstance(module, CONVERTED) and not stays:
        module.to_linear()
    if _has_recipes(decision):
        layers.convert(
            module,
            decision.recipe or AS_IT_IS,
            device_type,
            layer=number,
            keeps=decision.keeps,
            evaluation=decision.evaluation,
        )


def _make_projection(decision: Decision, number: int) -> ExpertProjection:
    keeps = decision.keeps
    if decision.evaluation is not None:
        keeps = (*keeps, decision.evaluation)
    return ExpertProjection(
        decision.recipe or AS_IT_IS,
        decision.weight.shape,
        decision.backend,
        decision.weight.data.device,
        seed=torch.initial_seed(),
        layer=number,
        keeps=keeps,
        evaluation=decision.evaluation,
    )


def _convert_experts(module: nn.Module, made: Mapping[str, ExpertProjection]) -> None:
    """Convert a module of experts, or revert it if none of its weights needs a recipe."""
    if all(projection.recipe is AS_IT_IS and not projection.keeps for projection in made.values()):
        experts.revert_experts(module)
        return
    rest = {
        name: ExpertProjection(
            AS_IT_IS, experts.stack_shape(module, name)[1:], "auto", getattr(module, name).device
        )
        for name in experts.stacks(module)
        if name not in made
    }
    experts.convert_experts(module, {**made, **rest})
