"""The documents of a corpus, in a fixed order, each once, and each on a fixed side of the
train/validation split.

A document is a string of text: a file, or a row of a table. Exact duplicates (by SHA-256 of the
UTF-8 bytes) are dropped, because a copy on the other side of the split would let the model recite
its validation text. The same hash decides the side: a document is validation when its first 64
bits, as a fraction of 2^64, are below `validation_fraction`. So the split depends on nothing but
the content: not on the order, not on the seed, and not on what else is in the corpus.
"""

import glob
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lowprec.errors import UserError, nearest
from lowprec.training.data.config import DataConfig
from lowprec.training.data.sources import (
    BUILT_IN,
    ROW_SUFFIXES,
    Source,
    SourceFile,
    resolve_sources,
)

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document: its `text`, the number of UTF-8 bytes of that text (`size`) and its side of the
    split."""

    text: str
    size: int
    split: Split


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The corpus that `config` describes, with its sources found but nothing read yet. Make one
    with `open_corpus`."""

    config: DataConfig
    sources: tuple[Source, ...]

    def identity(self) -> dict[str, Any]:
        """JSON values that determine `documents()`: the parts of a cache key that come from the
        corpus."""
        return {
            "sources": [source.identity(self.config) for source in self.sources],
            "validation_fraction": self.config.validation_fraction,
            "max_bytes": self.config.max_bytes,
        }

    def documents(self, dropped: Counter[str] | None = None) -> Iterator[Document]:
        """Every document once, in the order of the sources, files and rows.

        `dropped` counts what was left out: "duplicates", "not_utf8" and "empty". Neither split
            stays empty: in a corpus too small to
        fill both by chance, the last document goes to the side that got none. A UserError says so
        when there is no text, or only one document.
        """
        dropped = Counter() if dropped is None else dropped
        seen: Counter[str] = Counter()
        held: Document | None = (
            # One document is held back: only at the end is it known whether it has to change sides.
            None
        )
        for document in self._limited(dropped):
            if held:
                seen[held.split] += 1
                yield held
            held = document
        names = ", ".join(source.name for source in self.sources)
        if held is None:
            raise UserError(f"data.source: no text in {names}{_because(dropped)}")
        other: Split = "validation" if held.split == "train" else "train"
        if not seen[other]:
            if not seen[held.split]:
                raise UserError(
                    f"data.source: only 1 document in {names}{_because(dropped)}, but train and "
                    "validation need one each;"
                    " split the text into several files or rows"
                )
            held = Document(text=held.text, size=held.size, split=other)
        yield held

    def _limited(self, dropped: Counter[str]) -> Iterator[Document]:
        """Documents with their side by hash, duplicates dropped, up to `max_bytes`."""
        digests: set[bytes] = set()
        left = self.config.max_bytes
        threshold = self.config.validation_fraction * 2.0**64
        for data in self._contents(dropped):
            if not data:
                dropped["empty"] += 1
                continue
            digest = hashlib.sha256(data).digest()
            if digest in digests:
                dropped["duplicates"] += 1
                continue
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                dropped["not_utf8"] += 1
                continue
            digests.add(digest)
            size = len(data)
            if left is not None and size > left:
                text = data[:left].decode(
                    "utf-8", "ignore"
                )  # "ignore": the limit may fall inside a character
                size, left = len(text.encode()), 0
                if not text:
                    return
            elif left is not None:
                left -= size
            yield Document(
                text=text, size=size, split=SPLITS[int.from_bytes(digest[:8], "big") < threshold]
            )
            if left == 0:
                return

    def _contents(self, dropped: Counter[str]) -> Iterator[bytes]:
        """The bytes of every file that is a document, and of the text column of every row."""
        for source in self.sources:
            if source.kind == "hub":
                yield from self._texts(_hub_rows(source.name, self.config), source.name, dropped)
            for file in source.files:
                if reader := ROW_SUFFIXES.get(file.path.suffix.lower()):
                    yield from self._texts(_file_rows(file, reader), str(file.path), dropped)
                else:
                    yield _read(file)

    def _texts(
        self, rows: Iterable[dict[str, Any]], where: str, dropped: Counter[str]
    ) -> Iterator[bytes]:
        """The text column of `rows` as UTF-8; a row without a value is an empty document."""
        column = self.config.text_column
        for row in rows:
            if column not in row:
                raise UserError(
                    f"data.text_column: {where} has no column '{column}'; its columns: "
                    f"{', '.join(map(str, row))}"
                )
            text = "" if row[column] is None else row[column]
            if not isinstance(text, str):
                raise UserError(
                    f"data.text_column: column '{column}' of {where} holds {type(text).__name__}, "
                    "not text"
                )
            try:
                yield text.encode("utf-8")
            except (
                UnicodeEncodeError
            ):  # half a surrogate pair, which JSON can spell and UTF-8 can not
                dropped["not_utf8"] += 1


def open_corpus(config: DataConfig) -> Corpus:
    """Find the sources of `config`; a UserError names the first that is not there."""
    return Corpus(config=config, sources=resolve_sources(config))


def _read(file: SourceFile) -> bytes:
    try:
        return file.path.read_bytes()
    except OSError as error:
        raise UserError(f"data.source: cannot read {file.path}: {error.strerror}") from None


def _file_rows(file: SourceFile, reader: str) -> Iterator[dict[str, Any]]:
    """The rows of one local table. One file at a time: the order is ours, and an error can name the
    file."""
    if not file.size:
        return  # the readers trip over a file without a byte
    import datasets

    try:
        # Streaming reads the file itself; otherwise `datasets` would keep a second copy of it in
        # its own cache.
        yield from datasets.load_dataset(
            reader, data_files=[glob.escape(str(file.path))], split="train", streaming=True
        )
    except (
        Exception
    ) as error:  # pyarrow, json, OSError, ...: whatever it is, this file is not what its name says
        raise UserError(
            f"data.source: cannot read {file.path} as {reader}: {_first_line(error)}"
        ) from error


def _hub_rows(name: str, config: DataConfig) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(
            name, config.hub_config, split=config.hub_split, streaming=True
        )
    except (
        Exception
    ) as error:  # no network, no such dataset, gated, a wrong configuration or split, ...
        hint = nearest(name, BUILT_IN) if "/" not in name else ""
        raise UserError(
            f"data.source: no file or folder {name}, and reading it as a Hugging Face dataset "
            f"failed: {_first_line(error)}{hint}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _because(dropped: Counter[str]) -> str:
    """What was dropped, for the error about what is then missing."""
    parts = [f"{count} {what.replace('_', ' ')}" for what, count in sorted(dropped.items())]
    return f" (dropped: {', '.join(parts)})" if parts else ""
