"""Real text for pretraining: documents -> tokens -> examples.

`load_data(config)` does it in four steps, each a module of its own:

    sources, corpus    the documents of a source, duplicates dropped, each on a fixed side of the train/validation split
    tokenizer          bytes, a BPE trained on the corpus, or a Hugging Face tokenizer, and the bytes of text per token
    tokens             a memory-mapped token file, made once and kept in the cache
    packing            examples of `seq_len` tokens: blocks across documents, or documents one by one

Importing this package loads neither torch nor transformers; the names below are fetched when they
are used.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowprec.training.data.config import DataConfig

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

    from lowprec.training.data.packing import DocumentChunks, PackedBlocks
    from lowprec.training.data.tokenizer import token_bytes

__all__ = ["DataConfig", "DocumentChunks", "LoadedData", "PackedBlocks", "load_data", "token_bytes"]

_LAZY = {
    "DocumentChunks": "lowprec.training.data.packing",
    "PackedBlocks": "lowprec.training.data.packing",
    "token_bytes": "lowprec.training.data.tokenizer",
}


@dataclass(frozen=True, kw_only=True)
class LoadedData:
    """A corpus ready for training."""

    train: "PackedBlocks | DocumentChunks"
    """Map-style dataset of int64 tensors [seq_len]: `input_ids`, `labels` and, if asked for,
    `position_ids`."""
    validation: "PackedBlocks | DocumentChunks"
    """As `train`, from documents that are not in it."""
    tokenizer: "PreTrainedTokenizerFast"
    """Save it with the checkpoint. A model needs `len(tokenizer)` embeddings; its `eos_token_id`
    separates documents."""
    token_bytes: "np.ndarray | None"
    """Bytes of text per token id, int64 [vocab]; None when the tokenizer has no such numbers, and
    then bits per byte do not exist."""
    stats: dict[str, Any]
    """`train` and `validation`: {documents, bytes, tokens, examples}; `dropped`: {duplicates,
    not_utf8, empty}; `vocab_size`; and `cache`, the folder of the token files."""


def load_data(config: DataConfig, *, document_positions: bool = False) -> LoadedData:
    """The train and validation examples that `config` describes, tokenised now or taken from the
    cache.

    `document_positions` adds `position_ids` that restart at every separator, for models that keep
    documents apart. Several processes may call this at once; each then works on its own until the
    first is done, so let one go first where that matters. Raises UserError for a source, tokenizer
    or setting that can't be used.
    """
    from lowprec.training.data import corpus, packing, tokenizer, tokens

    documents = corpus.open_corpus(config)
    loaded = tokenizer.load_tokenizer(config, documents)
    tokenised = tokens.tokenise(documents, loaded)
    dataset = packing.PackedBlocks if config.packing else packing.DocumentChunks
    train, validation = (
        dataset(file, seq_len=config.seq_len, document_positions=document_positions)
        for file in (tokenised.train, tokenised.validation)
    )
    stats: dict[str, Any] = {
        examples.file.split: {
            "documents": examples.file.document_count,
            "bytes": examples.file.byte_count,
            "tokens": examples.file.token_count,
            "examples": len(examples),
        }
        for examples in (train, validation)
    }
    stats |= {
        "dropped": tokenised.dropped,
        "vocab_size": len(loaded),
        "cache": str(tokenised.folder),
    }
    return LoadedData(
        train=train,
        validation=validation,
        tokenizer=loaded,
        token_bytes=tokenizer.token_bytes(loaded),
        stats=stats,
    )


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
