"""Training examples cut from a token file: packed blocks, or single documents.

Packed blocks waste no tokens: the token stream is cut every `seq_len` tokens, so one block can hold
the end of one document, some whole documents and the beginning of another. A model that should not
look across documents gets `position_ids`, which restart at 0 at every separator. An attention that
builds its document mask from them needs no other input. Document chunks never mix documents; their
cost is padding.

Examples have the form that Hugging Face causal language models expect: `labels` equal `input_ids`,
and the model shifts them, so the first token of an example is input only.
"""

import operator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lowprec.errors import UserError
from lowprec.training.data.tokens import TokenFile

IGNORE = -100
"""Label that torch's cross entropy ignores."""


class _TokenDataset(Dataset[dict[str, torch.Tensor]]):
    """Base of both datasets: a token file whose memory map each process opens on first use."""

    def __init__(self, file: TokenFile, *, seq_len: int, document_positions: bool = False) -> None:
        self.file = file
        self.seq_len = seq_len
        self.document_positions = document_positions
        self._map: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of the split, uint16 or uint32 [tokens], memory-mapped."""
        if self._map is None:
            self._map = self.file.tokens()
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        # Pickling the memory map would copy the corpus into every worker.
        return {**self.__dict__, "_map": None}

    def __len__(self) -> int:
        raise NotImplementedError

    def _index(self, index: int) -> int:
        """Return `index` in [0, len). A negative one counts from the end."""
        index = operator.index(index)
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"example {index} of {count}")
        return index % count

    def _example(self, ids: np.ndarray, length: int) -> dict[str, torch.Tensor]:
        """Return `ids` as an example; the tokens from `length` on are padding and get no label."""
        input_ids = torch.from_numpy(ids.astype(np.int64))
        labels = input_ids.clone()
        labels[length:] = IGNORE
        example = {"input_ids": input_ids, "labels": labels}
        if self.document_positions:
            example["position_ids"] = torch.from_numpy(_positions(ids == self.file.eos_id, length))
        return example


class PackedBlocks(_TokenDataset):
    """Consecutive blocks of exactly `seq_len` tokens. The rest, shorter than a block, is dropped.

    An item is a dict of int64 tensors [seq_len]: `input_ids`, `labels` and, with
    `document_positions`, `position_ids`.

    Raises:
        UserError: the split is shorter than one block.
    """

    def __init__(self, file: TokenFile, *, seq_len: int, document_positions: bool = False) -> None:
        super().__init__(file, seq_len=seq_len, document_positions=document_positions)
        if file.token_count < seq_len:
            ways = "lower seq_len to that or add text"
            if file.split == "validation":
                ways = "lower seq_len to that, raise data.validation_fraction or add text"
            raise UserError(
                f"data.seq_len: the {file.split} split has {file.token_count} tokens, fewer than "
                f"one block of {seq_len}; {ways}"
            )

    def __len__(self) -> int:
        return self.file.token_count // self.seq_len

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        at = self._index(index) * self.seq_len
        return self._example(self.tokens[at : at + self.seq_len], self.seq_len)


class DocumentChunks(_TokenDataset):
    """Each document in chunks of at most `seq_len` tokens.

    The last chunk is padded on the right with the separator (label -100). Items have the same form
    as those of `PackedBlocks`. A last chunk of a single token is dropped: it predicts nothing, and
    a batch of such chunks alone would have no loss. Positions of padding restart at 0, as if
    padding were a document of its own.

    Raises:
        UserError: the split has no document of two or more tokens.
    """

    def __init__(self, file: TokenFile, *, seq_len: int, document_positions: bool = False) -> None:
        super().__init__(file, seq_len=seq_len, document_positions=document_positions)
        self._cuts: tuple[np.ndarray, np.ndarray] | None = None
        self._count = int(self._chunks()[1][-1])
        if not self._count:
            raise UserError(
                f"data.source: the {file.split} split has no document of two or more tokens"
            )

    def _chunks(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds of the documents and the number of chunks before each document.

        Both are int64 [documents + 1].
        """
        if self._cuts is None:
            bounds = np.append(self.file.starts(), self.file.token_count)
            lengths = np.diff(bounds)
            counts = lengths // self.seq_len + (lengths % self.seq_len > 1)
            self._cuts = bounds, np.concatenate([[0], np.cumsum(counts)])
        return self._cuts

    def __getstate__(self) -> dict[str, Any]:
        # The cuts are cheaper to compute again than to send to a worker.
        return {**super().__getstate__(), "_cuts": None}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = self._index(index)
        bounds, before = self._chunks()
        document = int(np.searchsorted(before, index, side="right")) - 1
        at = int(bounds[document]) + (index - int(before[document])) * self.seq_len
        length = min(self.seq_len, int(bounds[document + 1]) - at)
        ids = np.full(self.seq_len, self.file.eos_id, dtype=np.int64)
        ids[:length] = self.tokens[at : at + length]
        return self._example(ids, length)


def _positions(is_separator: np.ndarray, length: int) -> np.ndarray:
    """Return int64 positions that count from the last separator, or from the start of the example.

    Padding, from `length` on, counts from 0 once more.
    """
    index = np.arange(len(is_separator), dtype=np.int64)
    begins = is_separator & (index < length)
    begins[length:][:1] = True
    return index - np.maximum.accumulate(np.where(begins, index, 0))
