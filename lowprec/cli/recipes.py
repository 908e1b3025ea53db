"""`lowprec recipes`: the named recipes as equations."""

from typing import Any

import click

from lowprec.cli.common import JSON, answers
from lowprec.files import to_json


@click.command("recipes")
@JSON
@answers
def command(as_json: bool) -> str:
    """List the recipes, each with its three GEMMs as equations."""
    from lowprec.cli.tables import recipes_table

    recipes = describe()
    return to_json(recipes, indent=1, ensure_ascii=False) if as_json else recipes_table(recipes)


def describe() -> list[dict[str, Any]]:
    """Return each named recipe's name, description, GEMMs as equations, and the format of the rest
    of the model."""
    from lowprec.recipe import GEMMS, library

    return [
        {"name": recipe.name, "about": recipe.about, "rest": recipe.rest.name}
        | {gemm: recipe.equation(gemm) for gemm in GEMMS}
        for recipe in map(library.get, library.names())
    ]
