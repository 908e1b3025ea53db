"""The check, in the first optimizer step of a run, that the model calls its converted layers.

The plan is made before anything runs. A model may multiply by a converted weight without calling
its layer; then the plan is wrong about it. So the first step is watched (`lowprec.observe.Calls`),
all its micro-batches, on all ranks. The finding belongs to the run: it is part of the checkpoint,
and a resumed run does not check again.

A layer that is not used in the first step may be used later. It is watched until it is called.
"""

from typing import Any

from torch import nn

from lowprec.conversion.discover import recipes_of
from lowprec.conversion.plan import Plan
from lowprec.errors import UserError
from lowprec.observe.called import BYPASSED, UNUSED, Calls
from lowprec.training.control.events import Events


class FirstStepCheck:
    """The watch over the first optimizer step of a run, and what it has found.

    Args:
        events: the events of the run, to which it adds what it finds.
    """

    def __init__(self, events: Events) -> None:
        self.events = events
        self.uncalled: dict[str, str] | None = None
        """Why each converted layer was not called, by name; None: no step was checked yet."""
        self._reported: set[str] = set()
        """The layers that are reported as not called."""
        self._calls: Calls | None = None
        self._hook: Any = None
        """Handle of the optimizer's hook, which runs while the gradients exist."""

    def begin(self, model: nn.Module, optimizer: Any, plan: Plan) -> None:
        """Watch a run that begins or resumes, if it was not checked yet.

        Args:
            model: the converted model, prepared for training.
            optimizer: its optimizer, also in Accelerate's wrapper.
            plan: the corrected plan of the model.
        """
        self.stop()
        self._reported = set(_uncalled_of(plan))
        calls = self._calls = Calls(model)
        if self.uncalled is not None:
            self._watch_unused(calls)
            return
        calls.begin()
        inner = getattr(optimizer, "optimizer", optimizer)
        # An optimizer that is none of torch's may have no hooks. Its step is judged afterwards,
        # without the gradients, if it has freed them.
        register = getattr(inner, "register_step_pre_hook", None)
        if register is not None:
            self._hook = register(lambda *_: calls.look_for_gradients())

    def before_step(self) -> None:
        """Forget what was called since the last step, such as an evaluation."""
        if self._calls is not None and self.uncalled is None:
            self._calls.begin()

    def after_step(self) -> bool:
        """Judge the step that has just finished. Return whether `uncalled` has changed.

        A step that loss scaling skips is not judged; the next one is.
        """
        calls = self._calls
        if calls is None:
            return False
        if self.uncalled is not None:
            return self._drop_late_calls(calls)
        if self._hook is not None and not calls.knows_gradients:
            return False
        self._remove_hook()
        self.uncalled = dict(calls.end(all_ranks=True))
        self._watch_unused(calls)
        return True

    def stop(self) -> None:
        """End the watch."""
        self._remove_hook()
        if self._calls is not None:
            self._calls.cancel()
            self._calls = None

    def forget(self) -> None:
        """Begin another run, which is checked again."""
        self.uncalled = None

    def correct(self, plan: Plan, model: nn.Module) -> Plan:
        """Return the plan of `model` without the layers that are not called. A layer that has no
        recipe now computes what a product outside of it does, and stays as it is."""
        found = self.uncalled or {}
        plain = {name for name, recipe in recipes_of(model).items() if recipe.is_plain}
        return plan.with_uncalled({name: why for name, why in found.items() if name not in plain})

    def report(self, plan: Plan, step: int, *, strict: bool) -> None:
        """Add what is new in a corrected plan to the events.

        Args:
            step: number of finished steps.
        Raises:
            UserError: `strict`, and the model multiplies by a converted weight without calling its
                layer.
        """
        found = self.uncalled or {}
        late = self._reported - found.keys()
        new = [name for name in _uncalled_of(plan) if name not in self._reported]
        self._reported = (self._reported - late) | set(new)
        if late:
            self.events.add(
                step, "called", f"{len(late)} layers for the first time; {plan.summary()}"
            )
        if not new:
            return
        wrong = [name for name in new if found[name] == BYPASSED]
        if wrong and strict:
            first, *_ = plan.reasons_of(wrong)
            raise UserError(
                f"precision.strict: {first}; a rule with recipe none keeps it in high precision"
            )
        self.events.add(
            step,
            "uncalled",
            f"{len(new)} layers are out of the plan; {plan.summary()}",
            layers=plan.reasons_of(new),
            warns=True,
        )

    def _watch_unused(self, calls: Calls) -> None:
        """Watch on for layers that are not used so far; without any, end the watch."""
        if self.uncalled and UNUSED in self.uncalled.values():
            calls.begin()
        else:
            self.stop()

    def _drop_late_calls(self, calls: Calls) -> bool:
        """Remove layers that have been called for the first time. Return whether there are any."""
        assert self.uncalled is not None
        late = calls.called_of(name for name, why in self.uncalled.items() if why == UNUSED)
        for name in late:
            del self.uncalled[name]
        if late:
            self._watch_unused(calls)
        return bool(late)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _uncalled_of(plan: Plan) -> list[str]:
    """Return the names of the layers of a plan that are converted, but not called."""
    return [layer.name for layer in plan.layers if not layer.called]
