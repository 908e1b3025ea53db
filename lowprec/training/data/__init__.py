"""Real text for pretraining: documents -> tokens -> examples.

`load_data(config)` works in four steps. Each step has its own modules:

    sources, corpus    the documents, without duplicates, split into train and validation
    tokenizer          bytes, a BPE trained on the corpus, or a Hugging Face tokenizer
    tokens             memory-mapped token files, made once and kept in the cache
    packing            examples of `seq_len` tokens: blocks across documents, or single documents

Importing this package loads neither torch nor transformers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowprec.training.data.config import DataConfig

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

    from lowprec.training.data.packing import DocumentChunks, PackedBlocks

__all__ = ["DataConfig", "LoadedData", "load_data"]


@dataclass(frozen=True, kw_only=True)
class LoadedData:
    """A corpus that is ready for training."""

    train: "PackedBlocks | DocumentChunks"
    """Map-style dataset. An item is a dict of int64 tensors [seq_len]: `input_ids`, `labels` and,
    if requested, `position_ids`."""
    validation: "PackedBlocks | DocumentChunks"
    """The same kind of dataset, of documents that are not in `train`."""
    tokenizer: "PreTrainedTokenizerFast"
    """The tokenizer, to be saved with the checkpoint. A model needs `len(tokenizer)` embeddings.
    `eos_token_id` is the separator between documents."""
    token_bytes: "np.ndarray | None"
    """Bytes of text per token id, int64 [vocab]. None if the tokenizer's tokens have no fixed
    number of bytes; bits per byte can't be computed then."""
    stats: dict[str, Any]
    """Counts: `train` and `validation`, each {documents, bytes, tokens, examples}; `dropped`:
    {duplicates, not_utf8, empty}; `vocab_size`; and `cache`, the folder of the token files."""


def load_data(config: DataConfig, *, document_positions: bool = False) -> LoadedData:
    """Return the train and validation examples that `config` describes.

    The corpus is tokenised now, or read from the cache. Several processes may call this at the same
    time; until one of them has filled the cache, each does the whole work itself. To avoid that,
    let one process go first.

    Args:
        document_positions: Add `position_ids` that restart at every separator, for models whose
            attention keeps documents apart.
    Raises:
        UserError: a source, a tokenizer or a setting can't be used.
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
