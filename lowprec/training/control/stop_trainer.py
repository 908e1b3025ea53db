"""A Trainer's run that stops because of a signal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowprec.training.control.stop_signals import StopSignals

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState


class _Over(Exception):  # noqa: N818  (it leaves the Trainer's loop, and is no error)
    """The Trainer's loop is over because of a signal."""


class SignalStop:
    """Ends a Trainer's loop when a signal has come, and saves a checkpoint.

    It acts at the end of a step, and after an evaluation or a save at that end, so that a signal
    that comes during one of these does not wait for another step.

    Args:
        is_hopeless: returns True if the run can't continue for another reason. It ends with that
            then, and is not saved.
    """

    def __init__(self, is_hopeless: Callable[[], bool] = lambda: False) -> None:
        self._is_hopeless = is_hopeless
        self._signals: StopSignals | None = None
        self._step_has_ended = False
        self._stopped = False
        self._saved: tuple[int, int] | None = None
        """The step of the last checkpoint, and the number of logs in it."""

    @contextmanager
    def watch(
        self, trainer: "Trainer", signals: StopSignals | None, resume: str | None
    ) -> Iterator[None]:
        """Let `trainer.train` in this block stop by `signals`; without them nothing changes.

        The Trainer would end such a run as a finished one: it would log a summary, load the best
        checkpoint, and delete the last one if it keeps one only.

        Args:
            trainer: the Trainer that trains in this block.
            signals: the handlers; None: signals act as before.
            resume: the command that resumes the run, if it is known.
        Raises:
            StoppedBySignal: the run has stopped.
        """
        if signals is None:
            yield
            return
        any_trainer: Any = trainer
        finish = any_trainer._finalize_training

        def finish_unless_stopped(*args: Any, **kwargs: Any) -> Any:
            if not self._stopped or self._is_hopeless():
                return finish(*args, **kwargs)
            if self._saved != _progress(trainer.state):
                any_trainer._save_checkpoint(trainer.model_wrapped, None)
                trainer.control = trainer.callback_handler.on_save(
                    trainer.args, trainer.state, trainer.control
                )
            raise _Over

        self._signals = signals
        self._stopped = False
        self._step_has_ended = False
        self._saved = None
        any_trainer._finalize_training = finish_unless_stopped
        try:
            yield
        except _Over:
            trainer.control = trainer.callback_handler.on_train_end(
                trainer.args, trainer.state, trainer.control
            )
            trainer.is_in_train = False
            step = trainer.state.global_step
            checkpoint = Path(str(trainer.args.output_dir)) / f"checkpoint-{step}"
            how = resume or f"trainer.train(resume_from_checkpoint={str(checkpoint)!r})"
            signals.stop(
                f"saved {checkpoint} after step {step}; resume by: {how}",
                main=trainer.state.is_world_process_zero,
            )
        finally:
            self._signals = None
            del any_trainer._finalize_training

    def begin_step(self) -> None:
        """Note that a step begins: until its end the weights are not those of a whole step."""
        self._step_has_ended = False

    def end_step(self, state: "TrainerState", control: "TrainerControl") -> None:
        """Stop if a signal has come."""
        self._step_has_ended = True
        self.look(state, control)

    def saved(self, state: "TrainerState", control: "TrainerControl") -> None:
        """Note that a checkpoint has been written, and stop if a signal has come."""
        self._saved = _progress(state)
        self.look(state, control)

    def look(self, state: "TrainerState", control: "TrainerControl") -> None:
        """Stop if a signal has come, and no step has begun since the last one ended. A run that
        ends after this step in any case does that."""
        if self._signals is None or not self._step_has_ended or control.should_training_stop:
            return
        if state.global_step < state.max_steps and self._signals.stops():
            self._stopped = True
            control.should_training_stop = True
            control.should_save = self._saved != _progress(state)

    def end_epoch(self, state: "TrainerState", control: "TrainerControl") -> None:
        """Keep an epoch that has been stopped in its middle from being evaluated and saved as a
        whole one."""
        if self._stopped and state.epoch is not None and not float(state.epoch).is_integer():
            control.should_evaluate = False
            control.should_save = False
            control.should_log = False


def _progress(state: "TrainerState") -> tuple[int, int]:
    return state.global_step, len(state.log_history)
