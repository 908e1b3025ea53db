"""Going back to a checkpoint on disk after a breach (`guard.data: replay`), so that the batches
since then are trained on again."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowprec.distributed.processes import on_main_process
from lowprec.errors import TrainingStopped
from lowprec.files import keep_lines_until
from lowprec.training.checkpoint.files import (
    checkpoints,
    damage,
    global_step,
    is_checkpoint_of,
    step_of,
)
from lowprec.training.checkpoint.history import set_aside_later
from lowprec.training.checkpoint.torn import check_whole, last_whole
from lowprec.training.control.controller import PrecisionController
from lowprec.training.control.recovery import SETTLED
from lowprec.training.file_names import END_OF_TRAINING, METRICS
from lowprec.training.optim.loss_scaling import prepare_to_load

if TYPE_CHECKING:
    from transformers import Trainer, TrainerState

logger = logging.getLogger("lowprec")


class Replay:
    """The checkpoints that a Trainer's run may go back to."""

    def __init__(self, controller: PrecisionController) -> None:
        self.controller = controller
        self.goes_back = False
        """Flag: the Trainer is called again, to continue from a checkpoint after a breach."""
        self.runs = False
        """Flag: `train` runs, so the end of the Trainer's training may not be the end."""
        self._checkpoints: list[Path] = []
        """Checkpoints that this run wrote or resumed from, oldest first."""

    def train(self, trainer: "Trainer", resume_from_checkpoint: str | bool | None) -> Any:
        """See `LowPrecisionCallback.train`."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole(Path(_output_dir(trainer)), trainer.args))
        if resume_from_checkpoint:
            first = Path(resume_from_checkpoint)
            check_whole(first, trainer.args)
            older = [
                path for path in checkpoints(first.parent) if step_of(path) < global_step(first)
            ]
            self._checkpoints = [*older, first]
        last: tuple[int, Path] | None = None
        while True:
            scaler = trainer.accelerator.scaler
            if resume_from_checkpoint and scaler is not None:
                prepare_to_load(scaler, trainer.args.device)
            self.runs = True
            try:
                output = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
            finally:
                self.goes_back = False
                self.runs = False
            before = self.controller.replay_before
            if before is None:
                return output
            directory = Path(_output_dir(trainer))
            checkpoint = self._find_last_good(trainer, before, last)
            if checkpoint is None:
                raise TrainingStopped(
                    f"guard: no checkpoint before step {before} in {directory} to go back to: save "
                    "more often"
                )
            last = before, checkpoint
            if trainer.state.is_world_process_zero:
                # First the checkpoints: after a kill in between, the metrics still fit to them.
                set_aside_later(directory, global_step(checkpoint), trainer.args.save_total_limit)
                keep_lines_until(directory / METRICS, global_step(checkpoint), end=END_OF_TRAINING)
            resume_from_checkpoint = str(checkpoint)
            self.goes_back = True

    def begin(self) -> None:
        """Forget all checkpoints: another run begins."""
        self._checkpoints = []

    def wrote(self, checkpoint: Path) -> None:
        """Note that the run wrote `checkpoint`."""
        others = [path for path in self._checkpoints if path != checkpoint]
        self._checkpoints = [*others, checkpoint]

    def resumed_from(self, state: "TrainerState", output_dir: Path) -> list[Path]:
        """Return the checkpoints that a resumed Trainer's state may have been read from, the most
        likely first."""
        own = output_dir / f"checkpoint-{state.global_step}"
        known = [*reversed(self._checkpoints), own]
        return [path for path in known if is_checkpoint_of(path, state)]

    def _find_last_good(
        self, trainer: "Trainer", before: int, last: tuple[int, Path] | None
    ) -> Path | None:
        """Return the result of `_last_good` on the main process, which alone reads the files."""
        args = trainer.args
        processes = args.distributed_state if args.world_size > 1 else None
        return on_main_process(processes, lambda: self._last_good(before, last))

    def _last_good(self, before: int, last: tuple[int, Path] | None) -> Path | None:
        """Return the checkpoint to go back to.

        Args:
            before: the step of the breach.
            last: the step of the breach before that, and the checkpoint that the run went back to.
        """
        steps = {
            path: global_step(path)
            for path in self._checkpoints
            if damage(path, content=False) is None
        }
        whole = sorted(
            (path for path, step in steps.items() if step < before), key=lambda path: steps[path]
        )
        good = [path for path in whole if steps[path] <= before - SETTLED]
        if last is not None and before <= last[0] + SETTLED:  # the same trouble once more
            good = [path for path in good if steps[path] < steps[last[1]]]
        for path in (*reversed(good), *whole):
            problem = damage(path)
            if problem is None:
                return path
            logger.warning("%s is not gone back to: it is not whole: %s", path, problem)
        return None


def _output_dir(trainer: "Trainer") -> str:
    assert trainer.args.output_dir is not None
    return trainer.args.output_dir
