"""The plan of a run: what would run in which precision, without data and without weights."""

from dataclasses import replace

from transformers import PreTrainedModel

from lowprec.attention.hf import describe
from lowprec.conversion.plan import PartPlan, Plan
from lowprec.integrations.liger import LigerPlan, plan_liger
from lowprec.training.control.guard import GuardConfig
from lowprec.training.control.precision import PrecisionConfig
from lowprec.training.data import DataConfig
from lowprec.training.data.corpus import open_corpus
from lowprec.training.run.arguments import check_arguments
from lowprec.training.run.config import RunConfig
from lowprec.training.run.model_checks import build_skeleton, check_memory
from lowprec.training.run.models import build_config
from lowprec.training.run.setup import RunSetup


def plan_run(config: RunConfig, *, trains: bool = False) -> Plan:
    """Return the plan of a run on this machine.

    The model is built on the meta device, and the data is not read.

    Args:
        trains: Flag: the run follows. Its weights must fit into the memory of this machine.
    Raises:
        UserError: something is wrong that `pretrain.train` would find before it loads data.
    """
    setup = RunSetup.of(config)
    check_arguments(setup)
    model = skeleton_of(config)
    if trains:
        check_memory(model)
    # All phases are planned, because their errors should show. The plan of the first one is shown.
    plan, *later = (setup.plan_layers(model, phase) for phase in config.precision.phases())
    warnings = [warning for each in (plan, *later) for warning in each.warnings]
    plan = replace(plan, warnings=tuple(dict.fromkeys(warnings)))
    _, autocast = setup.autocast()
    liger = plan_liger(
        model,
        config.kernels.liger,
        device_type=setup.device_type,
        compiled_blocks=setup.compiled,
        head_is_low_precision=head_is_low_precision(model, plan),
    )
    if setup.max_steps is not None:
        setup.check_schedule(setup.max_steps)
    return plan.with_parts(plan_parts(setup, autocast, liger))


def plan_parts(setup: RunSetup, autocast: PartPlan, liger: LigerPlan) -> list[PartPlan]:
    """Return the rows of a run's plan beside those of the linear layers."""
    config = setup.config
    kernel, reason = describe(config.attention.mask, setup.device_type)
    compiled = "each decoder block by torch.compile, in place" if setup.compiled else ""
    parts = [
        autocast,
        PartPlan(name="attention", choice=f"{config.attention.mask} by {kernel}", reason=reason),
        _liger_part(liger),
        PartPlan(name="compile", choice=config.compile, reason=compiled),
    ]
    if config.precision.schedule:
        parts.append(_schedule_part(config.precision))
    if config.precision.guard is not None:
        parts.append(_guard_part(config.precision.guard))
    return parts


def _liger_part(liger: LigerPlan) -> PartPlan:
    """Return the row of Liger's kernels: those in use, and the reasons against the others."""
    names_by_reason: dict[str, list[str]] = {}
    for kernel in liger.kernels:
        if not kernel.used:
            names_by_reason.setdefault(kernel.reason, []).append(kernel.name)
    reasons = [f"{', '.join(names)}: {reason}" for reason, names in names_by_reason.items()]
    return PartPlan(
        name="liger", choice=", ".join(liger.applied) or "none", reason="; ".join(reasons)
    )


def _schedule_part(precision: PrecisionConfig) -> PartPlan:
    """Return the row of the schedule: the recipe of each phase and its end."""
    phases = []
    for phase, configured in zip(precision.phases(), precision.schedule, strict=True):
        recipe = "none" if phase.recipe is None else phase.recipe.name
        phases.append(f"{recipe} until {configured.until}")
    return PartPlan(name="schedule", choice=", ".join(phases))


def _guard_part(guard: GuardConfig) -> PartPlan:
    """Return the row of the guard: its main settings."""
    return PartPlan(
        name="guard",
        choice=f"on: snapshots every {guard.snapshot_every} steps, ladder "
        f"{' < '.join(guard.ladder)}, data {guard.data}",
    )


def head_is_low_precision(model: PreTrainedModel, plan: Plan) -> bool:
    """Return True if `plan` converts the output head of `model`."""
    head = model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if module is head}
    return any(layer.converted and layer.name in names for layer in plan.layers)


def skeleton_of(config: RunConfig) -> PreTrainedModel:
    """Return the model of a run on the meta device.

    Raises:
        UserError: the configuration makes no model, or one whose forward pass fails.
    """
    model_config = build_config(config.model, _vocabulary_limit(config.data))
    return build_skeleton(
        config.model, model_config, config.data.seq_len, mask=config.attention.mask
    )


def _vocabulary_limit(config: DataConfig) -> int:
    """Return the number of tokens that the tokenizer of `config` has at most, without training
    it."""
    from lowprec.training.data.tokenizer import load_tokenizer

    if config.tokenizer == "bpe":
        return config.vocab_size
    return len(load_tokenizer(config, open_corpus(config)))
