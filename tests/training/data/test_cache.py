"""The cache of token files: changed sources, damaged entries, builders that were killed, full and read-only disks."""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowprec.errors import UserError
from lowprec.training.data import DataConfig, load_data, tokens
from lowprec.training.data.cache import MANIFEST, build_once, check_entry, delete_abandoned
from tests.processes import ROOT, TIMEOUT, Program, start
from tests.runs import make_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus", 12)


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(source=str(corpus), cache_dir=str(tmp_path / "cache"), seq_len=16, validation_fraction=0.3)


def entries(settings: DataConfig) -> list[str]:
    return sorted(path.name for path in settings.cache_path.iterdir())


def test_contents_that_change_behind_size_and_time(settings: DataConfig, corpus: Path):
    before = load_data(settings)
    changed = corpus / "03.txt"
    state = changed.stat()
    changed.write_bytes(changed.read_bytes().upper())
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (changed.stat().st_size, changed.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    after = load_data(settings)
    assert after.stats["cache"] != before.stats["cache"]
    assert after.stats["train"]["tokens"] == before.stats["train"]["tokens"]
    other = corpus.parent / "other.txt"
    other.write_bytes(changed.read_bytes().lower())
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.replace(changed)  # another file under the same name
    assert load_data(settings).stats["cache"] not in (before.stats["cache"], after.stats["cache"])


def test_a_source_that_changes_while_it_is_read(settings: DataConfig, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    write = tokens.token_dtype

    def change(tokenizer: Any) -> Any:
        (corpus / "05.txt").write_text("new")
        return write(tokenizer)

    monkeypatch.setattr(tokens, "token_dtype", change)
    with pytest.raises(UserError, match=r"^data\.source: \S+05\.txt has changed while it was read; start again$"):
        load_data(settings)
    assert entries(settings) == []


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _pickle(path: Path) -> None:
    np.save(path, np.array([print], dtype=object), allow_pickle=True)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped tokens": (lambda entry: _flip(entry / "train.bin"), "the contents of train.bin have changed"),
    "flipped starts": (lambda entry: _flip(entry / "validation-starts.npy"), "the contents of validation-starts.npy have changed"),
    "flipped counts": (lambda entry: _flip(entry / "meta.json"), "the contents of meta.json have changed"),
    "flipped manifest": (lambda entry: _flip(entry / MANIFEST), "manifest.json can't be read"),
    "cut": (lambda entry: os.truncate(entry / "validation.bin", 7), "validation.bin has 7 bytes instead of "),
    "empty": (lambda entry: os.truncate(entry / "train.bin", 0), "train.bin has 0 bytes instead of "),
    "missing": (lambda entry: (entry / "train-starts.npy").unlink(), "train-starts.npy is missing"),
    "a folder": (lambda entry: ((entry / "train.bin").unlink(), (entry / "train.bin").mkdir()), "train.bin is missing"),
    "a pickle": (lambda entry: _pickle(entry / "train-starts.npy"), "train-starts.npy has "),
    "a foreign file": (lambda entry: (entry / "added_tokens.json").write_text("{}"), "added_tokens.json is not of it"),
    "no manifest": (lambda entry: (entry / MANIFEST).unlink(), "manifest.json can't be read"),
    "another manifest": (lambda entry: (entry / MANIFEST).write_text('{"files": {}}'), "manifest.json can't be read"),
    "a file": (lambda entry: (shutil.rmtree(entry), entry.write_text("")), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_damaged_entry_is_one_line(settings: DataConfig, damage: str, tokenizer: str):
    if tokenizer == "bpe" and damage not in ("flipped manifest", "a foreign file", "a file"):
        return
    settings = settings.model_copy(update={"tokenizer": tokenizer})
    load_data(settings)
    (entry,) = settings.cache_path.glob("tokens-*" if tokenizer == "bytes" else "bpe-*")
    harm, expected = DAMAGES[damage]
    harm(entry)
    with pytest.raises(UserError, match=r"^data\.cache_dir: [^\n]+$") as error:
        load_data(settings)
    assert str(entry) in str(error.value) or damage == "a file"
    assert expected in str(error.value)


def _write_a(folder: Path) -> None:
    (folder / "a").write_bytes(bytes(range(160)))


def test_large_files_are_checked_at_some_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowprec.training.data.cache._BLOCK", 16)
    monkeypatch.setattr("lowprec.training.data.cache._MOST_BLOCKS", 4)
    build_once(tmp_path / "entry", _write_a)
    check_entry(tmp_path / "entry")
    for at in (0, 50, 159):
        content = bytearray(range(160))
        content[at] ^= 1
        (tmp_path / "entry" / "a").write_bytes(content)
        with pytest.raises(UserError, match="the contents of a have changed"):
            check_entry(tmp_path / "entry")


BUILDER = """
import sys
import time
from pathlib import Path

from lowprec.training.data.cache import build_once


def build(folder):
    (folder / "part").write_text("half")
    Path(sys.argv[2]).write_text("")
    time.sleep(600)


build_once(Path(sys.argv[1]), build)
"""


def _start(entry: Path, ready: Path) -> Program:
    """Start a builder of `entry`, which has written a part of it and never ends."""
    script = ready.with_suffix(".py")
    script.write_text(BUILDER)
    program = start(str(script), str(entry), str(ready), PYTHONPATH=str(ROOT))
    deadline = time.monotonic() + TIMEOUT
    while not ready.exists():
        assert program.poll() is None, program.wait().stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return program


def test_what_a_killed_builder_leaves_is_deleted_and_a_living_one_keeps_its_folder(tmp_path: Path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ".mine.tmp").mkdir()  # not named by a builder
    for name, age in (("young", 0), ("old", 2 * 24 * 3600)):  # of another machine, whose locks may not be seen here
        other = cache / f".{name}.elsewhere-7.01234567.tmp"
        other.mkdir()
        os.utime(other, (time.time() - age, time.time() - age))
    killed = _start(cache / "killed", tmp_path / "ready1")
    living = _start(cache / "living", tmp_path / "ready2")
    try:
        assert len(list(cache.glob(".*.*.tmp"))) == 3
        killed.kill()
        assert build_once(cache / "entry", _write_a)
        left, young = sorted(cache.glob(".*.*.tmp"))
        assert young.name.startswith(".young.")
        assert f"-{living.pid}." in left.name
        assert (left / "part").read_text() == "half"
        assert (cache / ".mine.tmp").is_dir()
    finally:
        living.kill()
    delete_abandoned(cache)
    assert sorted(path.name for path in cache.iterdir()) == [".mine.tmp", young.name, "entry"]


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (Exception("No space left on device (os error 28)"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=str,
)
def test_an_error_leaves_nothing(tmp_path: Path, error: BaseException, line: bool):
    def build(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise error

    with pytest.raises(UserError if line else type(error)) as caught:
        build_once(tmp_path / "cache" / "entry", build)
    assert list((tmp_path / "cache").iterdir()) == []
    if line:
        assert str(caught.value).endswith("no space left on the disk; set it to a writable folder with space")


def test_caches_that_cannot_be_written(settings: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file" / "cache", Path("/proc/none"), Path("/dev/null")):
        with pytest.raises(UserError, match=r"^data\.cache_dir: cannot write to [^\n]+; set it to a writable folder"):
            load_data(settings.model_copy(update={"cache_dir": str(where)}))
    for text in ("", "x" * 300, "a\0b"):
        with pytest.raises(ValueError, match="cache_dir"):
            DataConfig(cache_dir=text)
    assert str(DataConfig(cache_dir="~nobody-of-this-name/x").cache_path).startswith("~nobody")

    # A cache that is full and then read-only is still read: no lock, no folder, no deletion.
    load_data(settings)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for place, name in ((fcntl, "flock"), (Path, "mkdir"), (os, "rename")):
        monkeypatch.setattr(place, name, refuse)
    load_data(settings)


def test_sources_that_are_no_files(settings: DataConfig, corpus: Path, tmp_path: Path):
    os.mkfifo(corpus / "pipe.txt")
    (corpus / "zero.txt").symlink_to("/dev/zero")
    (corpus / "loop.txt").symlink_to(corpus / "loop.txt")
    assert load_data(settings).stats["train"]["documents"] > 0  # all three are skipped
    for name in ("pipe.txt", "zero.txt"):
        with pytest.raises(UserError, match=r"pipe.txt|zero.txt is no regular file"):
            load_data(settings.model_copy(update={"source": str(corpus / name)}))
    for name in ("x" * 300, "a/" * 3000, " ", "a\0b"):
        with pytest.raises(ValueError, match="source"):
            DataConfig(source=name)
