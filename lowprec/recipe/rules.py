"""Ordered rules that give recipes to modules: the first rule whose expression matches a module's
whole name decides."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowprec.errors import UserError, nearest
from lowprec.recipe.base import Recipe


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Modules whose full name matches `modules` take `recipe`."""

    modules: str
    """A regular expression for the whole dotted name: by a part of the name, "layers.1" would
    match "layers.10" as well."""
    recipe: Recipe | None
    """None: the modules stay in high precision."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.modules)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"rule '{self.modules}' is not a regular expression: {error}") from None

    def matches(self, name: str) -> bool:
        """Return whether the rule matches a module of this full name."""
        return re.fullmatch(self.modules, name) is not None


def check_rules(rules: Sequence[Rule], names: Sequence[str]) -> None:
    """Raise UserError if a rule matches none of `names`, or only names that earlier rules
    match."""
    taken: set[str] = set()
    for rule in rules:
        matched = {name for name in names if rule.matches(name)}
        if not matched:
            raise UserError(
                f"rule '{rule.modules}' matches none of the {len(names)} linear "
                f"layers{_hint(rule.modules, names)}"
            )
        if matched <= taken:
            raise UserError(
                f"rule '{rule.modules}' never applies: earlier rules match all {len(matched)} of "
                "its layers"
            )
        taken |= matched


def _hint(pattern: str, names: Sequence[str]) -> str:
    """Return the end of an error message: the nearest thing that matches."""
    containing = [name for name in names if re.search(pattern, name)]
    if containing:
        return (
            f"; it is a part of '{containing[0]}', but a rule matches whole names: try "
            f"'.*{pattern}.*'"
        )
    if len(names) <= 20:
        return nearest(pattern, names)
    return nearest(pattern, {name.split(".")[-1] for name in names})
