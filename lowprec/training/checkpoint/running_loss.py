"""The Trainer's sums of the losses since its last log and since the run began.

transformers 5.17 begins both anew when a run resumes. If a checkpoint lies between two logs, the
next logged loss would be the mean of fewer steps than in a run that was not interrupted, and
`train_loss` would leave out the steps before the checkpoint.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Trainer


class RunningLoss:
    """A part of a checkpoint (`saved.Saved`): the sums of a Trainer. Every rank writes and reads
    it."""

    name = "lowprec_loss"

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer: Any = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return the sum of each rank since the last log, that log's step, and the sum before."""
        own: Tensor = self._trainer._tr_loss.detach().float().reshape(1)
        sums = [own]
        if dist.is_available() and dist.is_initialized():
            sums = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(sums, own)
        return {
            "sums": [total.item() for total in sums],
            "since": self._trainer._globalstep_last_logged,
            "before": self._trainer._total_loss_scalar,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the result of `state_dict`. Another number of ranks takes the mean of the sums."""
        sums = state["sums"]
        args = self._trainer.args
        same = len(sums) == args.world_size
        own = sums[args.process_index] if same else sum(sums) / len(sums)
        self._trainer._tr_loss.fill_(own)
        self._trainer._globalstep_last_logged = state["since"]
        self._trainer._total_loss_scalar = state["before"]
