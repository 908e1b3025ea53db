"""The end of a run that was killed after its last checkpoint: no step is left, but its end is."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer, TrainerState


class EndedRun:
    """Lets a Trainer that resumes after its last step end as after that step.

    The Trainer has loaded the checkpoint then. Its epochs are made empty, so it goes on with its
    own end, which loads the best model if that was asked for. (transformers 5.17 alone would take
    one step too many.)
    """

    def __init__(self) -> None:
        self._trainer: Any = None
        """The Trainer whose epochs are empty."""

    def begin(self, trainer: "Trainer | None", state: "TrainerState") -> None:
        """Make the Trainer's epochs empty if none of its steps is left."""
        self.end()
        if trainer is None or not 0 < state.max_steps <= state.global_step:
            return
        assert callable(getattr(trainer, "_run_epoch", None))
        self._trainer = trainer
        self._trainer._run_epoch = lambda *args, **kwargs: None

    def end(self) -> None:
        """Give the Trainer its epochs back."""
        if self._trainer is not None:
            del self._trainer._run_epoch
        self._trainer = None
