"""Logging to Weights & Biases beyond transformers' own callback: the plan as a table, events, and
scalars that come too late for that callback.

All functions log to the active wandb run, which transformers' callback starts when training begins.
Without an active run they do nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lowprec.conversion.plan import Plan

_STEP = "train/global_step"
"""Name of the step in transformers' callback, which orders all metrics by it."""


def log_plan(plan: Plan, step: int = 0) -> None:
    """Log the plan as a table, "lowprec/plan", and as one line in the run's summary,
    "lowprec/plan_summary". The run's configuration gets the recipe that was asked for and the
    shares of weights and operations by recipe, below "lowprec".

    The names differ because the workspace finds the table in the summary, by its name.
    """
    if (run := _run()) is None:
        return
    import wandb

    columns: list[Any] = ["layer", "N", "K", "recipe", "backend", "status", "reason"]
    rows = []
    for layer in plan.layers:
        backend = "/".join(dict.fromkeys(gemm.backend for gemm in layer.gemms))
        rows.append(
            [layer.name, *layer.shape, layer.recipe or "", backend, layer.status, layer.reason]
        )
    run.log({"lowprec/plan": wandb.Table(columns=columns, data=rows), _STEP: step})
    run.summary["lowprec/plan_summary"] = plan.summary()
    totals = plan.totals()
    shares = {"weights": totals["weights"], "flops": totals["flops"]}
    run.config.update({"lowprec": {"asked_recipe": plan.recipe, **shares}}, allow_val_change=True)


def log_events(events: Sequence[Mapping[str, Any]], plan: Plan) -> None:
    """Log each event as a line of text at its step, "lowprec/event", and the plan after them."""
    if (run := _run()) is None:
        return
    for event in events:
        layers = "".join(f"\n  {name}" for name in event.get("layers", ()))
        run.log(
            {"lowprec/event": f"{event['event']}: {event['reason']}{layers}", _STEP: event["step"]}
        )
    log_plan(plan, events[-1]["step"])


def log_scalars(values: Mapping[str, float], step: int) -> None:
    """Log scalars under the names that transformers' callback would give them."""
    if (run := _run()) is not None:
        run.log({**{f"train/{name}": value for name, value in values.items()}, _STEP: step})


def _run() -> Any:
    try:
        import wandb
    except ImportError:
        return None
    return wandb.run
