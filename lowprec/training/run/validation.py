"""The loss of a finished run on its validation split. Each token counts once."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from lowprec.training.data.packing import IGNORE

if TYPE_CHECKING:
    import numpy as np


@torch.no_grad()
def validate(trainer: Trainer, token_bytes: "np.ndarray | None") -> dict[str, float | None]:
    """Return `val_loss` and `bits_per_byte` of the validation split, and log them.

    `val_loss` is the mean negative log-likelihood [nats] of all predicted tokens. `bits_per_byte`
    is None without `token_bytes`, the bytes of text per token id.
    """
    model: Any = trainer.model_wrapped  # With its FSDP or DDP wrapper, if it has one.
    model.eval()
    table = (
        None if token_bytes is None else torch.as_tensor(token_bytes, device=trainer.args.device)
    )
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    for rows in _shares(trainer):
        inputs = trainer._prepare_inputs(rows)
        with trainer.compute_loss_context_manager():
            # The model's own loss: the Trainer's may differ, for example by label smoothing.
            loss: Any = model(**inputs).loss
        # The model shifts the labels: the first label of a row has no prediction.
        predicted = inputs["labels"][:, 1:]
        predicted = predicted[predicted != IGNORE]
        if not predicted.numel():
            continue
        text_bytes = 0 if table is None else int(table[predicted].sum())
        sums += torch.tensor(
            [loss.item() * predicted.numel(), predicted.numel(), text_bytes], dtype=torch.float64
        )
    reduced: Any = trainer.accelerator.reduce(sums.to(trainer.args.device))
    nats, tokens, text_bytes = reduced.tolist()
    result = {
        "val_loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
    }
    logs = {"eval_loss": result["val_loss"]}
    if text_bytes:
        logs["eval_bits_per_byte"] = result["bits_per_byte"]
    trainer.log(logs)
    return result


def _shares(trainer: Trainer) -> Iterator[dict[str, Any]]:
    """Yield this rank's batches of the validation split. Every rank has the same number of them.

    Padding batches have no labels. (Accelerate's loader would repeat rows to give all ranks the
    same number, and repeated rows would count twice.)
    """
    dataset: Any = trainer.eval_dataset
    ranks = trainer.args.world_size
    size = trainer.args.eval_batch_size
    own = range(trainer.args.process_index, len(dataset), ranks)
    for first in range(0, -(-len(dataset) // ranks), size):
        rows = [dataset[number] for number in own[first : first + size]]
        batch = trainer.data_collator(rows or [dataset[0]])
        yield batch if rows else {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
