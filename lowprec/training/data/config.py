"""What text to train on and how it becomes blocks of tokens: the `data` section of a run's
configuration.

The defaults need no download: the running interpreter's own library sources (about 12 MB of Python)
as bytes. This module imports nothing heavy, so that a configuration can be checked without loading
torch.
"""

import os
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from lowprec.config.schema import StrictConfig


class DataConfig(StrictConfig):
    """The corpus, its split into train and validation, the tokenizer, and the shape of a training
    example."""

    source: str | list[str] = "python-stdlib"
    """Where documents come from: `python-stdlib` (the running interpreter's library sources),
    `site-packages` (the sources of every installed package), a local .txt, .jsonl, .json or
    .parquet file, a folder or glob of them, or the name of a dataset on the Hugging Face hub. A
    list is read in its order. Hub datasets are streamed once and then read from the cache, whatever
    happens to them on the hub; remove the cache folder to fetch a newer version."""

    hub_config: str | None = None
    """The configuration ("subset") of a hub dataset, such as `sample-10BT`; other sources have
    none."""

    hub_split: str = "train"
    """The split of a hub dataset to read; both our train and our validation split are cut from
    it."""

    text_column: str = "text"
    """The column of .jsonl, .json, .parquet and hub rows that holds the text; every row is one
    document."""

    seq_len: int = Field(default=512, ge=2)
    """Tokens in a training example."""

    packing: bool = True
    """True: examples are consecutive blocks of exactly seq_len tokens that run across documents.
    False: an example never holds more than one document; short ones are padded, and padding has no
    label."""

    tokenizer: str = "bytes"
    """`bytes` (the 256 byte values and a separator), `bpe` (byte-level BPE trained on the training
    split, kept in the cache), or a folder or hub name of a Hugging Face tokenizer."""

    vocab_size: int = Field(default=32768, ge=257)
    """The size of a `bpe` vocabulary, separator included; a corpus with too few distinct words
    gives fewer. The other tokenizers come with their own."""

    validation_fraction: float = Field(default=0.02, gt=0, lt=1)
    """The probability that a document goes to validation. It is decided by a hash of the document's
    content, so that a document stays on its side when others are added or removed."""

    max_bytes: int | None = Field(default=None, ge=1)
    """Stop reading after this many bytes of UTF-8 text, counted over both splits; the document that
    crosses the limit is cut there."""

    cache_dir: str | None = None
    """Where token files and trained tokenizers are kept; by default `lowprec/data` under
    $XDG_CACHE_HOME or ~/.cache."""

    @field_validator("source", mode="before")
    @classmethod
    def _named_sources(cls, value: Any) -> Any:
        # Before pydantic tries the two branches of the union: their two reports would not make one
        # clear line.
        names = [value] if isinstance(value, str) else value
        if (
            not isinstance(names, list | tuple)
            or not names
            or not all(isinstance(name, str) and name.strip() for name in names)
        ):
            raise ValueError(
                f"expected a source's name or path, or a list of at least one, got {value!r}"
            )
        return value

    @property
    def source_names(self) -> tuple[str, ...]:
        """`source` as a tuple, one name or not."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    @property
    def cache_path(self) -> Path:
        """The cache folder, which may not exist yet."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowprec" / "data"
