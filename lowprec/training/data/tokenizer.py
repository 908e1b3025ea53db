"""Tokenizers: raw bytes, a byte-level BPE trained on the corpus, or any fast Hugging Face
tokenizer.

Each is a `PreTrainedTokenizerFast`, so it can be saved with a checkpoint and loaded by any program
that uses transformers. Documents are encoded as plain text: a document that spells out
"<|endoftext|>" gets the tokens of those characters, not the separator.

Losses per token can't be compared between vocabularies; bits per byte can. `token_bytes` counts the
bytes of text that each token stands for. For byte-level tokenizers the count is exact: each symbol
of a token's spelling is one byte.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowprec.errors import UserError, nearest
from lowprec.training.data.cache import build_once, check_entry, content_key
from lowprec.training.data.config import DataConfig
from lowprec.training.data.corpus import Corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
BPE_TRAINING_BYTES = 64 * 2**20
"""Bytes of text that a BPE is trained on at most. Its merges settle long before that, while the
training time and memory still grow."""
_BPE_VERSION = 2
"""Version of the training procedure below. A cached tokenizer of another version is not used."""

Encoder = Callable[[Sequence[str]], list[np.ndarray]]
"""A function from texts to one array of token ids each."""


def load_tokenizer(config: DataConfig, corpus: Corpus) -> "PreTrainedTokenizerFast":
    """Return the tokenizer that `config.tokenizer` names.

    `bpe` reads the training split of `corpus`, unless the cache holds the trained tokenizer.

    Raises:
        UserError: a Hugging Face tokenizer can't be loaded, is not a fast one, or has no
            end-of-text token.
    """
    if config.tokenizer == "bytes":
        return _wrap(byte_tokenizer())
    if config.tokenizer == "bpe":
        identity = {
            "bpe": _BPE_VERSION,
            "corpus": corpus.identity(),
            "vocab_size": config.vocab_size,
        }
        folder = config.cache_path / f"bpe-{content_key(identity)}"
        build_once(
            folder, lambda unfinished: _train_and_save(corpus, config.vocab_size, unfinished)
        )
        check_entry(folder)
        return _load(str(folder))
    return _load(config.tokenizer)


def byte_tokenizer() -> "Tokenizer":
    """Return a tokenizer of 257 tokens: id b is the byte b, and id 256 is the separator."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    # There are no merges, so cutting the text into words first would gain nothing.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([END])
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE of at most `vocab_size` tokens.

    Its tokens are the 256 bytes, the merges that `texts` support, and the separator.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_encoder(tokenizer: "PreTrainedTokenizerFast") -> Encoder:
    """Return a function from texts to one array of token ids each, without separators.

    The ids are uint16, or uint32 for more than 65536 tokens.
    """
    from tokenizers import Tokenizer

    dtype = token_dtype(tokenizer)
    vocab = tokenizer.get_vocab()
    if len(vocab) == 257 and all(
        vocab.get(symbol) == byte for byte, symbol in enumerate(byte_symbols())
    ):
        # A token is a byte: a widening copy of the text replaces the search for merges, of which
        # there are none.
        return lambda texts: [
            np.frombuffer(text.encode(), dtype=np.uint8).astype(dtype) for text in texts
        ]

    # A copy: these settings are for preparing a corpus, and the user's tokenizer must not get them.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.array(row.ids, dtype=dtype)
            for row in backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    return encode


def token_dtype(tokenizer: "PreTrainedTokenizerFast") -> np.dtype:
    """Return the narrowest dtype of a token file that holds every id: uint16 or uint32."""
    return np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 65536 else np.uint32)


def token_bytes(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray | None:
    """Return the bytes of text that each token stands for: int64 [largest id + 1].

    Special tokens have 0. The result is None for a tokenizer whose tokens have no fixed number of
    bytes: one that adds a space in front of the text, folds case, drops spaces or has an unknown
    token. If a tokenizer first brings text to Unicode's normal form C, the bytes of that form are
    counted.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if _is_byte_level(spec):
        length = _byte_level_length
    elif _is_byte_fallback(spec):
        length = _byte_fallback_length
    else:
        return None
    vocab = tokenizer.get_vocab()
    counts = np.zeros(max(vocab.values()) + 1, dtype=np.int64)
    for token, index in vocab.items():
        counts[index] = length(token)
    for index, added in tokenizer.added_tokens_decoder.items():
        if (added.lstrip or added.rstrip) and not added.special:
            return None  # This token swallows the spaces around it.
        counts[index] = 0 if added.special else len(added.content.encode())
    # The spec names the parts, but we may have misread it. A wrong count is worse than none, so the
    # counts are tried on texts.
    encode = make_encoder(tokenizer)
    right = all(
        counts[ids].sum() == len(text.encode())
        for text, ids in zip(_PROBES, encode(_PROBES), strict=True)
    )
    return counts if right else None


def byte_symbols() -> list[str]:
    """Return the character that spells each byte in a byte-level vocabulary.

    A printable byte is spelled as itself, any other byte as a character from U+0100 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_SYMBOLS = frozenset(byte_symbols())
_PROBES = (
    "The  cat's\r\n\tsat, 1234567 TIMES.\n\n    return x_1\n",
    " leading",
    "\n",
    "né 日本語 – 🎉\u200d\x00 İ ﬁ ½ \ufeff",
    END,
)
"""Texts on which the counts of `token_bytes` are checked."""


def _byte_level_length(token: str) -> int:
    return len(token) if _SYMBOLS.issuperset(token) else len(token.encode())


def _byte_fallback_length(token: str) -> int:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return 1 if is_byte else len(token.replace("▁", " ").encode())


def _is_byte_level(spec: dict[str, Any]) -> bool:
    """Return True for GPT-2's kind of tokenizer: bytes are spelled as characters and merged within
    words, and nothing else is done to the text."""
    model = spec["model"]
    before = _parts(spec["pre_tokenizer"], "pretokenizers")
    return (
        model["type"] == "BPE"
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and _SYMBOLS.issubset(model["vocab"])
        and all(part["type"] == "NFC" for part in _parts(spec["normalizer"], "normalizers"))
        and any(part["type"] == "ByteLevel" for part in before)
        and all(
            part["type"] in ("ByteLevel", "Split", "Digits") and _keeps_text(part)
            for part in before
        )
        and [part["type"] for part in _parts(spec["decoder"], "decoders")] == ["ByteLevel"]
    )


def _is_byte_fallback(spec: dict[str, Any]) -> bool:
    """Return True for SentencePiece's kind of tokenizer with byte tokens (Gemma).

    Text that the vocabulary can't spell becomes byte tokens, a space is spelled "▁", and no space
    is added in front of the text.
    """
    model = spec["model"]
    return (
        model["type"] == "BPE"
        and bool(model.get("byte_fallback"))
        and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
        and all(part["type"] == "Replace" for part in _parts(spec["normalizer"], "normalizers"))
        and all(
            part["type"] in ("Split", "Metaspace") and _keeps_text(part)
            for part in _parts(spec["pre_tokenizer"], "pretokenizers")
        )
        and all(
            part["type"] in ("Replace", "ByteFallback", "Fuse", "Metaspace")
            for part in _parts(spec["decoder"], "decoders")
        )
    )


def _keeps_text(part: dict[str, Any]) -> bool:
    """Return True if a pre-tokenizer's part neither adds nor removes characters."""
    return (
        not part.get("add_prefix_space")
        and part.get("behavior") != "Removed"
        and part.get("prepend_scheme", "never") == "never"
    )


def _parts(spec: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the members of a (nested) Sequence as a flat list. None has no members."""
    if spec is None:
        return []
    if spec["type"] != "Sequence":
        return [spec]
    return [part for member in spec[key] for part in _parts(member, key)]


def _train_and_save(corpus: Corpus, vocab_size: int, folder: Path) -> None:
    def texts() -> Iterator[str]:
        left = BPE_TRAINING_BYTES
        for document in corpus.documents():
            if document.split == "train" and left > 0:
                left -= document.size
                yield document.text

    _wrap(train_bpe(texts(), vocab_size)).save_pretrained(folder)
    corpus.check_unchanged()


def _wrap(tokenizer: "Tokenizer") -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    # The separator stands in front of every document, so generation starts from it too.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, clean_up_tokenization_spaces=False
    )


def _load(name: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = os.path.expanduser(name)
    if name.startswith(("/", "./", "../", "~")) and not os.path.isdir(name):
        raise UserError(f"data.tokenizer: no folder {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        # transformers raises exceptions of many classes here: OSError, ValueError, KeyError, ...
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        hint = nearest(name, ("bytes", "bpe")) if "/" not in name else ""
        raise UserError(
            f"data.tokenizer: no tokenizer loads from the folder or hub name {name}: {reason}{hint}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"data.tokenizer: {name} is a {type(tokenizer).__name__}, not a fast tokenizer (one "
            "with a tokenizer.json)"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"data.tokenizer: {name} has no eos_token, which separates documents; set one in its "
            "tokenizer_config.json"
        )
    return tokenizer
