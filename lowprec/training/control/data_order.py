"""The order in which a run reads its data: kept with its checkpoints, and compared when it resumes.

The Trainer finds its place in the data by counting batches. With other batches, or another order of
the examples, it would read some of them twice and others never, in silence.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from lowprec.errors import UserError


class DataOrder:
    """The sequences of an optimizer step, and the seed of their order, as a part of a checkpoint.

    Args:
        batch: Number of sequences in a forward pass on one device.
        accumulation: Number of forward passes in a step.
        processes: Number of processes of the run.
        seed: Seed that orders the data.
    """

    name = "lowprec_data"

    def __init__(self, *, batch: int, accumulation: int, processes: int, seed: int) -> None:
        self.batch = batch
        self.accumulation = accumulation
        self.processes = processes
        self.seed = seed

    @classmethod
    def of(cls, args: TrainingArguments, batch: int | None = None) -> "DataOrder":
        """Return the order of a Trainer.

        Args:
            batch: Number of sequences in a forward pass, if the Trainer has found another one than
                the arguments say (`auto_find_batch_size`).
        """
        return cls(
            batch=batch or args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    @property
    def sequences(self) -> int:
        """Number of sequences in an optimizer step, over all processes."""
        return self.batch * self.accumulation * self.processes

    def state_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {
            "batch": self.batch,
            "accumulation": self.accumulation,
            "processes": self.processes,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with the result of `state_dict` in a checkpoint.

        Raises:
            UserError: the steps before the checkpoint had another number of sequences, or another
                order.
        """
        before = DataOrder(**state)
        if before.sequences != self.sequences:
            accumulation, rest = divmod(before.sequences, self.batch * self.processes)
            if rest:
                hint = f"{before.processes} processes and {before._settings()}"
            else:
                hint = f"gradient_accumulation_steps={accumulation}"
            raise UserError(
                f"per_device_train_batch_size: a step of the checkpoint's run has "
                f"{before.sequences} sequences ({before._product()}), a step of this run "
                f"{self.sequences} ({self._product()}): it would go on at another place of the "
                f"data; resume with {hint}"
            )
        if before.seed != self.seed:
            raise UserError(
                f"seed: the checkpoint's run reads its data in the order of seed {before.seed}, "
                f"not {self.seed}: the rest of the data would be other examples; resume with "
                f"seed={before.seed}, or data_seed={before.seed}"
            )

    def _product(self) -> str:
        return f"{self.batch} x {self.accumulation} accumulated x {self.processes} processes"

    def _settings(self) -> str:
        return (
            f"per_device_train_batch_size={self.batch} "
            f"gradient_accumulation_steps={self.accumulation}"
        )


def processes_of(checkpoint: Path) -> int | None:
    """Return the number of processes that wrote a checkpoint; None if that can't be seen."""
    ranks = list(checkpoint.glob("rng_state_*.pth"))
    if ranks:
        return len(ranks)
    return 1 if (checkpoint / "rng_state.pth").is_file() else None
