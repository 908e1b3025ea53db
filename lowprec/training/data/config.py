"""The `data` section of a run's configuration: the text, and how it becomes blocks of tokens.

The defaults need no download: they train on the running interpreter's own library sources (about
12 MB of Python) as bytes. This module imports nothing heavy, so a configuration can be checked
without loading torch.
"""

import os
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from lowprec.config.schema import StrictConfig, check_path
from lowprec.errors import shown


class DataConfig(StrictConfig):
    """The corpus, its split into train and validation, the tokenizer, and the length of a training
    example."""

    source: str | list[str] = "python-stdlib"
    """Source of the documents: `python-stdlib` (the running interpreter's library sources),
    `site-packages` (the sources of every installed package), a local .txt, .jsonl, .json or
    .parquet file, a folder or a glob of such files, or the name of a dataset on the Hugging Face
    hub. A list is read in order. A hub dataset is streamed once and then read from the cache, even
    if it changes on the hub; remove the cache folder to fetch a newer version."""

    hub_config: str | None = None
    """Configuration ("subset") of a hub dataset, such as `sample-10BT`. Other sources ignore it."""

    hub_split: str = "train"
    """Split of a hub dataset to read. The train and the validation documents are both taken from
    it."""

    text_column: str = "text"
    """Column that holds the text in .jsonl, .json, .parquet and hub rows. Every row is one
    document."""

    seq_len: int = Field(default=512, ge=2, le=2**24)
    """Number of tokens in a training example."""

    packing: bool = True
    """Flag. True: examples are consecutive blocks of exactly seq_len tokens, across documents.
    False: an example holds tokens of one document only; a short one is padded, and padding has no
    label."""

    tokenizer: str = "bytes"
    """Tokenizer: `bytes` (the 256 byte values and a separator), `bpe` (a byte-level BPE trained on
    the training split and kept in the cache), or a folder or hub name of a Hugging Face
    tokenizer."""

    vocab_size: int = Field(default=32768, ge=257, le=2**24)
    """Size of a `bpe` vocabulary, separator included. A corpus with too few distinct words gives a
    smaller one. Other tokenizers have their own vocabulary."""

    validation_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Probability that a document goes to validation. A hash of the document's content decides, so
    a document stays on its side when others are added or removed."""

    max_bytes: int | None = Field(default=None, ge=1)
    """Limit on the bytes of UTF-8 text that are read, over both splits together. The document that
    crosses the limit is cut there."""

    cache_dir: str | None = None
    """Folder of token files and trained tokenizers. Default: `lowprec/data` below $XDG_CACHE_HOME
    or ~/.cache."""

    @field_validator("source", mode="before")
    @classmethod
    def _named_sources(cls, value: Any) -> Any:
        # This check runs before pydantic tries both branches of the union: the two reports of the
        # branches would not make one clear line.
        names = [value] if isinstance(value, str) else value
        if (
            not isinstance(names, list | tuple)
            or not names
            or not all(isinstance(name, str) and name.strip() for name in names)
        ):
            raise ValueError(
                f"expected a source's name or path, or a list of at least one, got {shown(value)}"
            )
        for name in names:
            check_path(name)
        return value

    @field_validator("tokenizer", "cache_dir")
    @classmethod
    def _is_a_path(cls, value: str | None) -> str | None:
        return None if value is None else check_path(value)

    @property
    def source_names(self) -> tuple[str, ...]:
        """`source` as a tuple, also if it is a single name."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    @property
    def cache_path(self) -> Path:
        """Path of the cache folder, which may not exist yet."""
        if self.cache_dir is not None:
            return Path(os.path.expanduser(self.cache_dir))
        parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(parent) / "lowprec" / "data"
