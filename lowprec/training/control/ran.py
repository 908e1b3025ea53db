"""The precision in which a run has really run: shares of the linear weights and of their operations
by recipe, over all its steps.

The plan may change during a run, by the schedule, by the guard, or because layers turn out not to
be called. Each step counts with the plan that it ran in.
"""

from collections.abc import Mapping
from typing import Any

from lowprec.conversion.plan import Plan
from lowprec.conversion.shares import flops_by_recipe, weights_by_recipe


class RanPrecision:
    """The sums of the shares of all steps so far."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._of_plan: dict[str, dict[str, float]] = {}
        self.forget()

    def forget(self) -> None:
        """Begin another run."""
        self.steps = 0
        """Number of steps that are counted."""
        self._sums: dict[str, dict[str, float]] = {"weights": {}, "flops": {}}

    def add(self, plan: Plan | None) -> None:
        """Count a step that ran in `plan`."""
        assert plan is not None
        if plan is not self._plan:
            self._plan = plan
            self._of_plan = _shares_of(plan)
        self.steps += 1
        for kind, shares in self._of_plan.items():
            sums = self._sums[kind]
            for name, share in shares.items():
                sums[name] = sums.get(name, 0.0) + share

    def shares(self, plan: Plan | None) -> dict[str, dict[str, float]]:
        """Return {"weights": {recipe: share}, "flops": {recipe: share}} over the steps so far. If
        none is counted, as in a run that resumes at its end, they are those of `plan`."""
        if not self.steps:
            return {} if plan is None else _shares_of(plan)
        return {
            kind: {name: value / self.steps for name, value in sums.items()}
            for kind, sums in self._sums.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {"steps": self.steps, **{kind: dict(sums) for kind, sums in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take the result of `state_dict`; None, of an older checkpoint, begins anew."""
        self.forget()
        if state is not None:
            self.steps = state["steps"]
            self._sums = {kind: dict(state[kind]) for kind in self._sums}


def _shares_of(plan: Plan) -> dict[str, dict[str, float]]:
    return {"weights": weights_by_recipe(plan.layers), "flops": flops_by_recipe(plan.layers)}
