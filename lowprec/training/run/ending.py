"""The end of a run that was killed after its last checkpoint: no step is left, but its validation,
its model and its summary are."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer

from lowprec.training.callback import LowPrecisionCallback
from lowprec.training.checkpoint.files import global_step


def train_or_end(
    trainer: Trainer, low_precision: LowPrecisionCallback, checkpoint: Path | None, steps: int
) -> Any:
    """Train a run of `steps` steps, from `checkpoint` if there is one.

    If that is the checkpoint of the last step, the Trainer loads it and ends as after that step.

    Returns:
        The result of `trainer.train`.
    """
    if checkpoint is None:
        return low_precision.train(trainer)
    has_ended = global_step(checkpoint) == steps
    with _without_steps(trainer) if has_ended else nullcontext():
        return low_precision.train(trainer, str(checkpoint))


@contextmanager
def _without_steps(trainer: Trainer) -> Iterator[None]:
    """Let `trainer.train` load a checkpoint, the best one too if it ends with that, and take no
    step. The Trainer alone would take one step too many."""
    any_trainer: Any = trainer
    assert callable(any_trainer._run_epoch)
    any_trainer._run_epoch = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del any_trainer._run_epoch
