"""The documents of a corpus, in a fixed order, without duplicates, split into train and validation.

A document is a string of text: a file, or a row of a table. Exact duplicates (by SHA-256 of the
UTF-8 bytes) are dropped, because a copy on the other side of the split would let the model recite
its validation text. The same hash decides the side: a document belongs to validation if the first
64 bits of its hash, as a fraction of 2^64, are below `validation_fraction`. So the split depends on
the content alone: not on the order, not on the seed, and not on the other documents.
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
    """A document: its `text`, the size of that text in UTF-8 bytes, and its side of the split."""

    text: str
    size: int
    split: Split


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The corpus that `config` describes. Its sources are resolved, but nothing is read yet.

    `open_corpus` makes one.
    """

    config: DataConfig
    sources: tuple[Source, ...]

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that determine `documents()`, for a cache key."""
        return {
            "sources": [source.identity(self.config) for source in self.sources],
            "validation_fraction": self.config.validation_fraction,
            "max_bytes": self.config.max_bytes,
        }

    def check_unchanged(self) -> None:
        """Raise UserError if a file is not as it was when the sources were resolved."""
        for source in self.sources:
            for file in source.files:
                if SourceFile.of(file.path) != file:
                    raise UserError(
                        f"data.source: {file.path} has changed while it was read; start again"
                    )

    def documents(self, dropped: Counter[str] | None = None) -> Iterator[Document]:
        """Yield every document once, in the order of the sources, files and rows.

        Neither split stays empty: in a corpus that is too small to fill both by chance, the last
        document moves to the empty side.

        Args:
            dropped: Counter to which the dropped documents are added: "duplicates", "not_utf8" and
                "empty".
        Raises:
            UserError: there is no text, or only one document.
        """
        dropped = Counter() if dropped is None else dropped
        seen: Counter[str] = Counter()
        # One document is held back: only the end of the corpus shows if it has to change sides.
        held: Document | None = None
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
        """Yield the documents up to `max_bytes`, without duplicates, each on the side of its
        hash."""
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
                # "ignore": the limit may fall inside a character.
                text = data[:left].decode("utf-8", "ignore")
                size = len(text.encode())
                left = 0
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
        """Yield the UTF-8 bytes of every document: a whole file, or the text column of a row."""
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
        """Yield the text column of `rows` as UTF-8. A row without a value is an empty document."""
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
            except UnicodeEncodeError:
                # Half a surrogate pair: JSON can spell it, UTF-8 can't.
                dropped["not_utf8"] += 1


def open_corpus(config: DataConfig) -> Corpus:
    """Return the corpus of `config`. Raise UserError for the first source that does not exist."""
    return Corpus(config=config, sources=resolve_sources(config))


def _read(file: SourceFile) -> bytes:
    try:
        return file.path.read_bytes()
    except OSError as error:
        raise UserError(f"data.source: cannot read {file.path}: {error.strerror}") from None


def _file_rows(file: SourceFile, reader: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one local table.

    Files are read one at a time, so the order is ours and an error can name the file.
    """
    if not file.size:
        return  # The readers fail on an empty file.
    import datasets

    try:
        # Streaming reads the file itself. Without it, `datasets` keeps a second copy in its own
        # cache.
        yield from datasets.load_dataset(
            reader, data_files=[glob.escape(str(file.path))], split="train", streaming=True
        )
    except Exception as error:
        # pyarrow, json and others raise exceptions of many classes: the file can't be read as
        # its name says.
        raise UserError(
            f"data.source: cannot read {file.path} as {reader}: {_first_line(error)}"
        ) from error


def _hub_rows(name: str, config: DataConfig) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(
            name, config.hub_config, split=config.hub_split, streaming=True
        )
    except Exception as error:
        # No network, no such dataset, a gated one, a wrong configuration or split, ...
        hint = nearest(name, BUILT_IN) if "/" not in name else ""
        raise UserError(
            f"data.source: no file or folder {name}, and reading it as a Hugging Face dataset "
            f"failed: {_first_line(error)}{hint}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _because(dropped: Counter[str]) -> str:
    """Return " (dropped: ...)", for the error about missing documents; "" if none was dropped."""
    parts = [f"{count} {what.replace('_', ' ')}" for what, count in sorted(dropped.items())]
    return f" (dropped: {', '.join(parts)})" if parts else ""
