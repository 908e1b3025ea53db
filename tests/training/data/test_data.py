"""Documents, split, token files and examples agree with the text that they came from."""

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lowprec.config.schema import parse
from lowprec.errors import UserError
from lowprec.training.data import DataConfig, LoadedData, load_data
from lowprec.training.data.cache import build_once
from lowprec.training.data.corpus import open_corpus
from lowprec.training.data.tokenizer import byte_tokenizer, make_encoder, train_bpe

UNICODE = "def f(x):\r\n\treturn 'né – 日本語 🎉\u200d' # <|endoftext|>  ,  don't\x00 \ufeff e\u0301"
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "omicron", "sigma"]


def text_of(seed: int, words: int = 40) -> str:
    """Return text that differs for every seed."""
    picks = np.random.default_rng(seed).choice(WORDS, size=words)
    return f"{seed}: " + " ".join(picks) + " é日🎉\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder of 60 text files and return its path."""
    source = tmp_path / "text"
    source.mkdir()
    for seed in range(60):
        (source / f"{seed:03}.txt").write_bytes(text_of(seed, words=5 + seed).encode())
    return source


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def config(folder: Path, cache: Path, **settings) -> DataConfig:
    return DataConfig(**{"source": str(folder), "cache_dir": str(cache), "seq_len": 32, "validation_fraction": 0.2, **settings})


def documents(config: DataConfig, split: str | None = None) -> list[str]:
    return [document.text for document in open_corpus(config).documents() if split in (None, document.split)]


def expected_tokens(config: DataConfig, data: LoadedData, split: str) -> np.ndarray:
    """Return the token stream, made by the tokenizer's own encoder, one document at a time."""
    stream: list[int] = []
    for text in documents(config, split):
        ids = data.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        stream += [data.tokenizer.eos_token_id, *ids]
    return np.array(stream)


def one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# ---- the split ----------------------------------------------------------------------------------------------------------------------


def test_split_is_deterministic_disjoint_and_complete(folder: Path, cache: Path):
    settings = config(folder, cache)
    train, validation = documents(settings, "train"), documents(settings, "validation")
    assert train == documents(settings, "train")
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(text_of(seed, words=5 + seed) for seed in range(60))
    assert 4 <= len(validation) <= 24  # 12 expected of 60


def test_split_of_a_document_does_not_depend_on_the_others(folder: Path, cache: Path):
    settings = config(folder, cache)
    before = set(documents(settings, "validation"))
    for seed in range(100, 130):
        (folder / f"a{seed}.txt").write_text(text_of(seed), encoding="utf-8")
    (folder / "003.txt").unlink()
    after = set(documents(settings, "validation"))
    assert before - {text_of(3, words=8)} == {text for text in after if int(text.split(":")[0]) < 100}


def test_validation_fraction_decides_the_share(folder: Path, cache: Path):
    few, many = (documents(config(folder, cache, validation_fraction=share), "validation") for share in (0.1, 0.9))
    assert set(few) < set(many)
    assert len(many) > 45


@pytest.mark.parametrize(("share", "moved"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_no_split_of_a_small_corpus_is_empty(folder: Path, cache: Path, share: float, moved: str):
    assert documents(config(folder, cache, validation_fraction=share), moved) == [text_of(59, words=64)]


def test_duplicates_and_undecodable_and_empty_files_are_dropped(folder: Path, cache: Path):
    settings = config(folder, cache)
    expected = documents(settings)
    (folder / "zz-copy.txt").write_bytes((folder / "007.txt").read_bytes())
    (folder / "zz-latin.txt").write_bytes("né".encode("latin-1"))
    (folder / "zz-empty.txt").write_bytes(b"")
    assert documents(settings) == expected
    assert load_data(settings).stats["dropped"] == {"duplicates": 1, "not_utf8": 1, "empty": 1}
    assert documents(config(folder, cache, source=[str(folder), str(folder)])) == expected


def test_max_bytes_counts_text_and_cuts_the_last_document(folder: Path, cache: Path):
    everything = "".join(documents(config(folder, cache)))
    for limit in (1000, 1001, 1002):  # one of these limits falls inside a character
        text = "".join(documents(config(folder, cache, max_bytes=limit)))
        assert everything.startswith(text)
        assert limit - 3 <= len(text.encode()) <= limit
    stats = load_data(config(folder, cache, max_bytes=1000)).stats
    assert 997 <= stats["train"]["bytes"] + stats["validation"]["bytes"] <= 1000
    assert len(documents(config(folder, cache, max_bytes=10**9))) == 60


# ---- sources ------------------------------------------------------------------------------------------------------------------------


def test_tables_text_and_globs_hold_the_same_documents(folder: Path, cache: Path, tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    texts = documents(config(folder, cache))
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "a.jsonl").write_text("".join(json.dumps({"n": n, "body": text}) + "\n" for n, text in enumerate(texts)))
    (rows / "b.json").write_text(json.dumps([{"body": text} for text in texts]))
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), rows / "c[1].parquet")
    for name in ("a.jsonl", "b.json", "c[1].parquet", "*.parquet", "."):
        assert documents(config(rows / name, cache, text_column="body")) == texts, name
    assert documents(config(folder / "0[0-4]*.txt", cache)) == texts[:50]
    # A list is read in its order; a document that two members share comes once.
    assert documents(config(folder, cache, source=[str(folder / "01*.txt"), str(folder)])) == texts[10:20] + texts[:10] + texts[20:]


def test_rows_without_text_are_dropped(cache: Path, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n{"text": "two"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    assert documents(config(tmp_path, cache)) == ["one", "two"]


def test_python_stdlib(cache: Path):
    data = load_data(DataConfig(cache_dir=str(cache)))
    assert data.stats["train"]["bytes"] > 5e6
    assert data.stats["validation"]["bytes"] > 1e4
    names = [file.path.as_posix() for source in open_corpus(DataConfig()).sources for file in source.files]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any(part in name for name in names for part in ("/site-packages/", "/test/", "/idle_test/", "/__pycache__/"))


def test_site_packages(cache: Path):
    settings = DataConfig(source="site-packages", cache_dir=str(cache), max_bytes=200_000)
    assert any("/tests/" in file.path.as_posix() for file in open_corpus(settings).sources[0].files)
    stats = load_data(settings).stats
    assert stats["train"]["bytes"] + stats["validation"]["bytes"] == pytest.approx(200_000, abs=3)


def test_hub_dataset_gets_its_name_configuration_and_split(cache: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return [{"content": text_of(seed)} for seed in range(20)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    settings = DataConfig(
        source="org/name", hub_config="small", hub_split="validation", text_column="content", seq_len=8, cache_dir=str(cache)
    )
    first = load_data(settings)
    assert calls == [(("org/name", "small"), {"split": "validation", "streaming": True})]
    load_data(settings)
    assert len(calls) == 1  # the second call uses the cache and does not ask the hub
    for change in ({"hub_config": "large"}, {"hub_split": "train"}):
        assert load_data(settings.model_copy(update=change)).stats["cache"] != first.stats["cache"]


def test_unreachable_hub_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nwith details")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError) as error:
        load_data(DataConfig(source="python-stdlb", cache_dir=str(cache)))
    one_line(error, "data.source", "python-stdlb", "Couldn't reach it", "did you mean 'python-stdlib'?")
    assert not list(cache.iterdir())  # no unfinished entry is left


# ---- tokenizers ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_round_trip_saving_and_token_bytes(folder: Path, cache: Path, tmp_path: Path, tokenizer: str):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    data = load_data(config(folder, cache, tokenizer=tokenizer, vocab_size=300))
    assert isinstance(data.tokenizer, PreTrainedTokenizerFast)
    assert data.token_bytes is not None
    assert len(data.tokenizer) == (257 if tokenizer == "bytes" else 300)
    data.tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    encode = make_encoder(data.tokenizer)
    for text in (UNICODE, *documents(config(folder, cache))[:10]):
        (ids,) = encode([text])
        assert data.tokenizer.decode(ids) == text
        assert again.decode(again(text)["input_ids"]) == text
        assert data.tokenizer.eos_token_id not in ids  # although the text spells it
        assert data.token_bytes[ids].sum() == len(text.encode())
    assert data.token_bytes.dtype == np.int64
    assert data.token_bytes.shape == (len(data.tokenizer),)
    assert data.token_bytes[data.tokenizer.eos_token_id] == 0
    if tokenizer == "bytes":
        assert encode([UNICODE])[0].tolist() == list(UNICODE.encode())
        assert data.tokenizer.eos_token_id == 256


def test_bpe_is_trained_once_and_on_the_training_split(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []

    def train(texts, vocab_size):
        seen.extend(texts := list(texts))
        return train_bpe(texts, vocab_size)

    monkeypatch.setattr("lowprec.training.data.tokenizer.train_bpe", train)
    settings = config(folder, cache, tokenizer="bpe", vocab_size=300)
    first = load_data(settings)
    assert seen == documents(settings, "train")
    second = load_data(settings)
    assert len(seen) == len(documents(settings, "train"))
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert len(load_data(settings.model_copy(update={"vocab_size": 310})).tokenizer) == 310


def save_tokenizer(backend, path: Path, **special: str) -> str:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(path)
    return str(path)


def sentencepiece_like(prepend: bool):
    """Make the parts of Gemma's tokenizer or, with a space put in front of every text, Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258, "é": 259, "</s>": 260}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    ends = [decoders.Strip(" ", 1, 0)] if prepend else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    backend.add_special_tokens(["</s>"])
    return backend


def test_foreign_tokenizers(folder: Path, cache: Path, tmp_path: Path):
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    backend = train_bpe(documents(config(folder, cache)), 300)
    backend.add_tokens([AddedToken("    ", normalized=False), "日本"])
    name = save_tokenizer(backend, tmp_path / "plain", eos_token="<|endoftext|>")
    data = load_data(config(folder, cache, tokenizer=name))
    assert data.token_bytes is not None
    (ids,) = make_encoder(data.tokenizer)(["    x日本語"])
    assert data.token_bytes[ids].sum() == len("    x日本語".encode())
    assert data.stats["train"]["tokens"] == len(expected_tokens(config(folder, cache), data, "train"))

    for normalizer, counted in ((normalizers.NFC(), True), (normalizers.Lowercase(), False)):
        backend.normalizer = normalizer
        name = save_tokenizer(backend, tmp_path / normalizer.__class__.__name__, eos_token="<|endoftext|>")
        assert (load_data(config(folder, cache, tokenizer=name)).token_bytes is not None) == counted

    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    name = save_tokenizer(backend, tmp_path / "prefix", eos_token="<|endoftext|>")
    assert load_data(config(folder, cache, tokenizer=name)).token_bytes is None

    name = save_tokenizer(sentencepiece_like(prepend=False), tmp_path / "gemma", eos_token="</s>")
    data = load_data(config(folder, cache, tokenizer=name))
    (ids,) = make_encoder(data.tokenizer)([" a a\n é日"])
    assert data.token_bytes is not None
    assert data.token_bytes[ids].tolist() == [2, 2, 1, 1, 2, 1, 1, 1]
    name = save_tokenizer(sentencepiece_like(prepend=True), tmp_path / "llama", eos_token="</s>")
    assert load_data(config(folder, cache, tokenizer=name)).token_bytes is None


def test_a_large_vocabulary_gets_four_bytes_per_token(folder: Path, cache: Path, tmp_path: Path):
    backend = byte_tokenizer()
    backend.add_tokens([f"word{n}" for n in range(66000)])
    settings = config(folder, cache, tokenizer=save_tokenizer(backend, tmp_path / "large", eos_token="<|endoftext|>"))
    data = load_data(settings)
    assert data.train.tokens.dtype == np.uint32
    np.testing.assert_array_equal(data.train.tokens, expected_tokens(settings, data, "train"))


def test_unusable_tokenizers_are_refused(folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect\nwith details")

    name = save_tokenizer(byte_tokenizer(), tmp_path / "no-eos")
    with pytest.raises(UserError) as error:
        load_data(config(folder, cache, tokenizer=name))
    one_line(error, "data.tokenizer", name, "eos_token")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError) as error:
        load_data(config(folder, cache, tokenizer=str(tmp_path / "nothing")))
    one_line(error, "data.tokenizer", "nothing")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    for name, part in ((str(tmp_path / "missing"), "no folder"), ("byte", "did you mean 'bytes'?")):
        with pytest.raises(UserError) as error:
            load_data(config(folder, cache, tokenizer=name))
        one_line(error, "data.tokenizer", name, part)


# ---- token files and the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_token_file_holds_separators_and_documents(folder: Path, cache: Path, tokenizer: str):
    settings = config(folder, cache, tokenizer=tokenizer, vocab_size=300)
    data = load_data(settings)
    assert data.token_bytes is not None
    for split, dataset in (("train", data.train), ("validation", data.validation)):
        assert dataset.tokens.dtype == np.uint16
        np.testing.assert_array_equal(dataset.tokens, expected_tokens(settings, data, split))
        starts = dataset.file.starts()
        np.testing.assert_array_equal(starts, np.flatnonzero(dataset.tokens == data.tokenizer.eos_token_id))
        texts = documents(settings, split)
        stats = data.stats[split]
        assert stats["documents"] == len(starts) == len(texts)
        assert stats["bytes"] == sum(len(text.encode()) for text in texts) == data.token_bytes[dataset.tokens].sum()
        assert stats["tokens"] == len(dataset.tokens)
        assert stats["examples"] == len(dataset)


def test_cache_is_reused_and_invalidated(folder: Path, cache: Path):
    settings = config(folder, cache)
    first = load_data(settings)
    path = Path(first.stats["cache"])
    assert path.parent == cache
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    again = load_data(config(folder, cache, seq_len=16, packing=False))  # the cut into examples is not part of the key
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert again.stats["cache"] == str(path)

    changed = folder / "000.txt"
    changed.write_bytes(changed.read_bytes().upper())
    os.utime(changed, ns=(1, 1))  # the size is the same, only the time differs
    assert load_data(settings).stats["cache"] != str(path)
    for change in ({"max_bytes": 2000}, {"validation_fraction": 0.3}, {"tokenizer": "bpe"}, {"source": str(folder / "00*.txt")}):
        assert load_data(settings.model_copy(update=change)).stats["cache"] not in {str(path), load_data(settings).stats["cache"]}


def test_a_damaged_cache_is_reported(folder: Path, cache: Path):
    settings = config(folder, cache)
    path = Path(load_data(settings).stats["cache"])
    (path / "train.bin").write_bytes(b"short")
    with pytest.raises(UserError) as error:
        load_data(settings).train[0]
    one_line(error, "data.cache_dir", str(path))
    (path / "meta.json").write_text("{")
    with pytest.raises(UserError) as error:
        load_data(settings)
    one_line(error, "data.cache_dir", str(path))


def test_two_builders_at_once(folder: Path, cache: Path):
    entry = cache / "entry"

    def build(unfinished: Path) -> None:
        entry.mkdir()  # another process finishes before this one
        (entry / "made-by").write_text("the other")
        (unfinished / "made-by").write_text("this one")

    assert not build_once(entry, build)
    assert (entry / "made-by").read_text() == "the other"
    assert [path.name for path in cache.iterdir()] == ["entry"]
    assert not build_once(entry, build)

    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_data(config(folder, cache)), range(4)))
    assert len({data.stats["cache"] for data in loaded}) == 1
    assert len(list(cache.iterdir())) == 2
    np.testing.assert_array_equal(loaded[0].train.tokens, expected_tokens(config(folder, cache), loaded[0], "train"))


def test_default_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DataConfig().cache_path == tmp_path / "lowprec" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert DataConfig().cache_path == Path.home() / ".cache" / "lowprec" / "data"


# ---- examples -----------------------------------------------------------------------------------------------------------------------


def positions(ids: list[int], separator: int) -> list[int]:
    result: list[int] = []
    for token in ids:
        result.append(0 if token == separator or not result else result[-1] + 1)
    return result


def test_packed_blocks(folder: Path, cache: Path):
    data = load_data(config(folder, cache), document_positions=True)
    stream = data.train.tokens.astype(np.int64)
    assert len(data.train) == len(stream) // 32
    for index in range(len(data.train)):
        example = data.train[index]
        assert list(example) == ["input_ids", "labels", "position_ids"]
        assert all(value.dtype == torch.int64 and value.shape == (32,) for value in example.values())
        assert example["input_ids"].tolist() == example["labels"].tolist() == stream[32 * index : 32 * index + 32].tolist()
        assert example["position_ids"].tolist() == positions(example["input_ids"].tolist(), 256)
    assert data.train[-1]["input_ids"].tolist() == data.train[len(data.train) - 1]["input_ids"].tolist()
    with pytest.raises(IndexError):
        data.train[len(data.train)]
    assert "position_ids" not in load_data(config(folder, cache)).train[0]


@pytest.mark.parametrize("seq_len", [2, 32, 1000])
def test_document_chunks(folder: Path, cache: Path, seq_len: int):
    settings = config(folder, cache, packing=False, seq_len=seq_len)
    data = load_data(settings, document_positions=True)
    chunks = []
    for text in documents(settings, "train"):
        ids = [256, *text.encode()]
        pieces = [ids[at : at + seq_len] for at in range(0, len(ids), seq_len)]
        chunks += [piece for piece in pieces if len(piece) > 1]
    assert len(data.train) == len(chunks)
    for example, chunk in zip((data.train[index] for index in range(len(chunks))), chunks, strict=True):
        padding = seq_len - len(chunk)
        assert example["input_ids"].tolist() == chunk + [256] * padding
        assert example["labels"].tolist() == chunk + [-100] * padding
        assert example["position_ids"].tolist() == [*range(len(chunk)), *range(padding)]


def test_examples_go_through_workers_and_the_default_collator(folder: Path, cache: Path):
    from transformers import default_data_collator

    for packing in (True, False):
        data = load_data(config(folder, cache, packing=packing), document_positions=True)
        data.train[0]  # the map is open now; pickling must leave it out
        assert len(pickle.dumps(data.train)) < 2000
        copy = pickle.loads(pickle.dumps(data.train))
        assert copy[1]["input_ids"].tolist() == data.train[1]["input_ids"].tolist()
        loader = DataLoader(data.train, batch_size=4, num_workers=1, collate_fn=default_data_collator)
        batches = list(loader)
        assert {name: value.shape for name, value in batches[0].items()} == dict.fromkeys(data.train[0], (4, 32))
        assert torch.cat([batch["input_ids"] for batch in batches])[5].tolist() == data.train[5]["input_ids"].tolist()


# ---- errors -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"source": []}, ["data.source"]),
        ({"source": 3}, ["data.source", "got 3"]),
        ({"seq_len": 1}, ["data.seq_len"]),
        ({"vocab_size": 256}, ["data.vocab_size"]),
        ({"validation_fraction": 0}, ["data.validation_fraction"]),
        ({"validation_fraction": 1}, ["data.validation_fraction"]),
        ({"max_bytes": 0}, ["data.max_bytes"]),
        ({"seqlen": 8}, ["data.seqlen", "did you mean 'seq_len'?"]),
    ],
)
def test_wrong_settings(settings: dict, parts: list[str]):
    with pytest.raises(UserError) as error:
        parse(DataConfig, settings, "data")
    one_line(error, *parts)


def test_wrong_sources(folder: Path, cache: Path, tmp_path: Path):
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "bare").mkdir()
    (tmp_path / "one.txt").write_text("text")
    (tmp_path / "void.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "rows.jsonl").write_text('{"body": "text", "n": 1}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": nope\n')
    for source, settings, parts in [
        ("missing.txt", {}, ["no file or folder", "missing.txt"]),
        ("missing/folder", {}, ["no file or folder", "missing/folder"]),
        ("*.txtt", {}, ["no .txt", "*.txtt"]),
        ("notes.md", {}, ["notes.md", ".jsonl"]),
        ("bare", {}, ["bare holds no"]),
        ("void.txt", {}, ["no text in"]),
        ("latin.txt", {}, ["no text in", "1 not utf8"]),
        ("one.txt", {}, ["only 1 document", "one.txt"]),
        ("rows.jsonl", {}, ["data.text_column", "'text'", "body, n"]),
        ("rows.jsonl", {"text_column": "n"}, ["data.text_column", "'n'", "int"]),
        ("rows.jsonl", {"tokenizer": "bpe"}, ["data.text_column", "'text'", "body, n"]),
        ("broken.jsonl", {}, ["broken.jsonl", "json"]),
    ]:
        with pytest.raises(UserError) as error:
            load_data(config(tmp_path / source, cache, **settings))
        one_line(error, "data.", *parts)
    assert not cache.exists() or not list(cache.iterdir())
    with pytest.raises(UserError) as error:
        load_data(config(folder, tmp_path / "one.txt"))
    one_line(error, "data.cache_dir", "one.txt")


def test_corpus_shorter_than_a_block(folder: Path, cache: Path):
    tokens = load_data(config(folder, cache)).stats["validation"]["tokens"]
    with pytest.raises(UserError) as error:
        load_data(config(folder, cache, seq_len=tokens + 1))
    one_line(error, "data.seq_len", "validation", str(tokens), str(tokens + 1))
    load_data(config(folder, cache, seq_len=tokens))


def test_the_configuration_imports_nothing_heavy():
    script = (
        "import sys, lowprec.training.data.config; print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # Whatever else lowprec imports, the configuration itself stays light.
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
