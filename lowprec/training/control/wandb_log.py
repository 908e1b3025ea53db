"""What a run tells Weights & Biases beyond transformers' own callback: the plan as a table, events,
and scalars that came too late for it.

Everything goes to the run that is active (transformers' callback starts it when training begins);
without one nothing happens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lowprec.conversion.plan import Plan

_STEP = "train/global_step"
"""transformers' name of the step, by which its callback orders all metrics."""


def log_plan(plan: Plan, step: int = 0) -> None:
    """The plan as a table, "lowprec/plan", and in one line in the run's summary,
    "lowprec/plan_summary".

    (Under the table's own name the line would take the table's place in the summary, where the
    workspace looks for it.)
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


def log_events(events: Sequence[Mapping[str, Any]], plan: Plan) -> None:
    """Each event as a line of text at its step, "lowprec/event", and the plan that they led to."""
    if (run := _run()) is None:
        return
    for event in events:
        layers = "".join(f"\n  {name}" for name in event.get("layers", ()))
        run.log(
            {"lowprec/event": f"{event['event']}: {event['reason']}{layers}", _STEP: event["step"]}
        )
    log_plan(plan, events[-1]["step"])


def log_scalars(values: Mapping[str, float], step: int) -> None:
    """Under the names that transformers' callback would give them."""
    if (run := _run()) is not None:
        run.log({**{f"train/{name}": value for name, value in values.items()}, _STEP: step})


def _run() -> Any:
    try:
        import wandb
    except ImportError:
        return None
    return wandb.run
