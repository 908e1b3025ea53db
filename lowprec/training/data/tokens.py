"""Token files: a corpus is tokenised once and then read through a memory map.

An entry of the cache is a folder. For each split it holds

    train.bin          every document as [separator] + its tokens, little-endian uint16
                       (uint32 if the vocabulary has more than 65536 tokens)
    train-starts.npy   int64 [documents]: index of each document's separator in train.bin

and for both a `meta.json` with the counts. The separator comes first, so the first token of a
document is predicted too, from the separator and within its own document. The folder's name is a
hash of everything that determines its contents. Sequence length and packing are not part of it,
because examples are cut from the memory map when they are read (`lowprec.training.data.packing`).
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from lowprec.errors import UserError
from lowprec.files import to_json
from lowprec.training.data.cache import build_once, check_entry, content_key
from lowprec.training.data.corpus import SPLITS, Corpus, Document, Split
from lowprec.training.data.tokenizer import make_encoder, token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = 2
"""Version of the file format above."""
_BATCH_BYTES = 4 * 2**20
"""Bytes of text that are encoded at a time: enough to keep every core busy, and few enough to
stream."""


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """The files of one split, and their counts.

    An instance is small and picklable. `tokens` and `starts` open the memory maps.
    """

    folder: Path
    split: Split
    dtype: str
    eos_id: int
    token_count: int
    document_count: int
    byte_count: int
    """Number of UTF-8 bytes of text. Separators have none."""

    @property
    def path(self) -> Path:
        return self.folder / f"{self.split}.bin"

    def tokens(self) -> np.ndarray:
        """Return the tokens, uint16 or uint32 [token_count], as a read-only memory map.

        Raises:
            UserError: the file is damaged.
        """
        expected = self.token_count * np.dtype(self.dtype).itemsize
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != expected:
            raise UserError(
                f"data.cache_dir: {self.path} has {size} bytes instead of {expected}; remove "
                f"{self.folder}"
            )
        return np.memmap(self.path, dtype=self.dtype, mode="r")

    def starts(self) -> np.ndarray:
        """Return the index of each document's separator, int64 [document_count], as a read-only
        memory map."""
        return np.load(self.folder / f"{self.split}-starts.npy", mmap_mode="r", allow_pickle=False)


@dataclass(frozen=True, kw_only=True)
class TokenisedCorpus:
    """Both splits of a tokenised corpus, and the number of dropped documents by reason."""

    folder: Path
    train: TokenFile
    validation: TokenFile
    dropped: dict[str, int]


def tokenise(corpus: Corpus, tokenizer: "PreTrainedTokenizerFast") -> TokenisedCorpus:
    """Return the token files of `corpus`. They are made now if the cache does not hold them.

    Several processes may call this at the same time.
    """
    identity = {
        "format": _FORMAT,
        "corpus": corpus.identity(),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "eos": tokenizer.eos_token_id,
    }
    folder = corpus.config.cache_path / f"tokens-{content_key(identity)}"
    build_once(folder, lambda unfinished: _write(unfinished, corpus, tokenizer))
    check_entry(folder)
    return _open(folder)


def _open(folder: Path) -> TokenisedCorpus:
    """Return the token files in `folder`. Raise UserError if its meta.json is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        splits = {
            split: TokenFile(
                folder=folder,
                split=split,
                dtype=meta["dtype"],
                eos_id=meta["eos_id"],
                **meta[split],
            )
            for split in SPLITS
        }
        return TokenisedCorpus(folder=folder, dropped=meta["dropped"], **splits)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"data.cache_dir: {folder} is damaged; remove it") from None


class _Writer:
    """A writer that appends documents to the token file of one split."""

    def __init__(self, file: BinaryIO, separator: np.ndarray) -> None:
        self.file = file
        self.separator = separator
        self.starts = array("q")
        self.tokens = 0
        self.bytes = 0

    def add(self, document: Document, ids: np.ndarray) -> None:
        self.starts.append(self.tokens)
        self.file.write(self.separator.tobytes())
        self.file.write(ids.tobytes())
        self.tokens += 1 + len(ids)
        self.bytes += document.size


def _write(folder: Path, corpus: Corpus, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Tokenise `corpus` and write its files into the empty `folder`."""
    dtype = token_dtype(tokenizer).newbyteorder("<")
    encode = make_encoder(tokenizer)
    separator = np.array([tokenizer.eos_token_id], dtype=dtype)
    dropped: Counter[str] = Counter(duplicates=0, not_utf8=0, empty=0)
    with ExitStack() as stack:
        writers = {
            split: _Writer(stack.enter_context(open(folder / f"{split}.bin", "wb")), separator)
            for split in SPLITS
        }
        for batch in _batches(corpus.documents(dropped)):
            for document, ids in zip(
                batch, encode([document.text for document in batch]), strict=True
            ):
                writers[document.split].add(document, ids.astype(dtype, copy=False))
    meta: dict = {"dtype": dtype.str, "eos_id": tokenizer.eos_token_id, "dropped": dict(dropped)}
    for split, writer in writers.items():
        np.save(
            folder / f"{split}-starts.npy",
            np.frombuffer(writer.starts, dtype=np.int64),
            allow_pickle=False,
        )
        meta[split] = {
            "token_count": writer.tokens,
            "document_count": len(writer.starts),
            "byte_count": writer.bytes,
        }
    (folder / "meta.json").write_text(to_json(meta, indent=2) + "\n", encoding="utf-8")
    corpus.check_unchanged()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield the documents in lists of about `_BATCH_BYTES` bytes of text."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= _BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch
