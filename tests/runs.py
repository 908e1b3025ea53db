"""Small runs of the command for the tests: the tiny model on a corpus made here."""

import json
import struct
from pathlib import Path
from typing import Any

from tests.processes import ROOT

CONFIG = ROOT / "configs" / "llama-tiny-cpu.yaml"

SMALL = (
    "model.overrides={num_hidden_layers: 1, hidden_size: 128, intermediate_size: 256, num_attention_heads: 2, num_key_value_heads: 2}",
    "data.seq_len=64",
    "data.validation_fraction=0.2",
    "trainer.per_device_train_batch_size=4",
    "trainer.logging_steps=1",
)


def make_corpus(folder: Path, documents: int = 40) -> Path:
    folder.mkdir(parents=True)
    for number in range(documents):
        text = f"document {number}: " + "the quick brown fox jumps over the lazy dog. " * (4 + number % 7)
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


def overrides(corpus: Path, **settings: Any) -> list[str]:
    """Return the overrides of a small run on `corpus`; double underscores in keywords stand for dots."""
    given = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()]
    return [*SMALL, f"data.source={corpus}", f"data.cache_dir={corpus.parent / 'cache'}", *given]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Return the training loss by step, in full precision."""
    return {record["step"]: record["loss"] for record in read_metrics(run) if "loss" in record}


def wandb_history(log: Path) -> list[dict[str, Any]]:
    """Return the logged rows of a wandb offline run.

    The file has LevelDB's log format after a header of 7 bytes: blocks of 32 KiB with records of (crc32, length, type) and data. A type
    other than 1 (whole) marks the first, a middle or the last part.
    """
    from wandb.proto import wandb_internal_pb2

    data, at, parts, rows = log.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # there is no room for a record's header: the block is padded
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if kind == 0:
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows
