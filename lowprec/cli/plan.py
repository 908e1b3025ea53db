"""`lowprec plan`: the plan of a run, without its data and its weights."""

import click

from lowprec.cli.common import CONFIG, JSON, OVERRIDES, answers
from lowprec.config import shipped
from lowprec.files import to_json


@click.command("plan")
@CONFIG
@OVERRIDES
@JSON
@answers
def command(config: str, overrides: tuple[str, ...], as_json: bool) -> str:
    """Show what CONFIG would run where: each linear layer's recipe and backend, native or emulated,
    and why. Builds no weights."""
    path = shipped.find(config)
    from lowprec.training.run.config import load_run

    run, _ = load_run(path, overrides)
    from lowprec.training.run.plan import plan_run

    plan = plan_run(run)
    if as_json:
        return to_json(plan.to_dict(), indent=1, ensure_ascii=False)
    # At both ends, since a plan may be long.
    return "\n".join([*plan.warnings, str(plan), *plan.warnings])
