"""The loss of a finished run on its validation split, each token of it counted once."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer


@torch.no_grad()
def validate(trainer: Trainer, token_bytes: Any) -> dict[str, Any]:
    """val_loss, the mean negative log-likelihood [nats] of all predicted tokens of the validation
    split, and bits per byte of its text."""
    model: Any = trainer.model_wrapped  # with its FSDP or DDP wrapping, if any
    model.eval()
    table = (
        None if token_bytes is None else torch.as_tensor(token_bytes, device=trainer.args.device)
    )
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    for rows in _shares(trainer):
        inputs = trainer._prepare_inputs(rows)
        with trainer.compute_loss_context_manager():
            loss: Any = model(**inputs).loss  # the Trainer's may be another (label smoothing)
        predicted = inputs["labels"][
            :, 1:
        ]  # the model shifts: the first label of a row has no prediction
        predicted = predicted[predicted != -100]
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
    trainer.log(
        {"eval_loss": result["val_loss"]}
        | ({"eval_bits_per_byte": result["bits_per_byte"]} if text_bytes else {})
    )
    return result


def _shares(trainer: Trainer) -> Iterator[dict[str, Any]]:
    """This rank's batches of the validation split, as many as every rank has; those too many have
    no labels.

    (Accelerate's loader would repeat rows to even ranks out, and they would count twice.)
    """
    dataset: Any = trainer.eval_dataset
    ranks, size = trainer.args.world_size, trainer.args.eval_batch_size
    own = range(trainer.args.process_index, len(dataset), ranks)
    for first in range(0, -(-len(dataset) // ranks), size):
        rows = [dataset[number] for number in own[first : first + size]]
        batch = trainer.data_collator(rows or [dataset[0]])
        yield batch if rows else {**batch, "labels": torch.full_like(batch["labels"], -100)}
