"""Resolves the names in `data.source` to lists of files and hub datasets, before anything is read.

Resolving is cheap and strict: it looks at folders and file sizes only. So a wrong path fails at
once, and the cache key, which needs the file list with the state of each file, costs little if the
tokens are in the cache already.

A name is resolved in this order: one of the two built-in sources; an existing file or folder; a
glob. A name that looks like a path but does not exist is an error. Any other name is a dataset on
the Hugging Face hub.
"""

import glob
import os
import platform
import re
import stat
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowprec.errors import UserError
from lowprec.training.data.config import DataConfig

BUILT_IN = ("python-stdlib", "site-packages")
ROW_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Suffix of a table's file -> the name of its reader in `datasets`."""
SUFFIXES = (".txt", *ROW_SUFFIXES)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file, with what the file system says of its state.

    If the state is the same, the contents are. A program may set the modification time back, as
    `cp -p` and `rsync -t` do, but the system sets the time of the last change itself.
    """

    path: Path
    size: int
    """Size in bytes."""
    mtime_ns: int
    """Time of the last modification [ns]."""
    ctime_ns: int
    """Time of the last change of the contents or the inode [ns]."""
    inode: int

    @classmethod
    def of(cls, path: Path) -> "SourceFile | None":
        """Return the file at `path` as it is now; None if it can't be found, or is a device, a FIFO
        or a socket."""
        try:
            found = path.stat()
        except (OSError, ValueError):
            # A broken link, or a package that is being removed right now.
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return cls(
            path=path,
            size=found.st_size,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns,
            inode=found.st_ino,
        )


@dataclass(frozen=True, kw_only=True)
class Source:
    """A resolved name of `data.source`: its `files` in reading order, none for kind "hub"."""

    name: str
    kind: Literal["python-stdlib", "site-packages", "files", "hub"]
    files: tuple[SourceFile, ...] = ()

    def identity(self, config: DataConfig) -> dict[str, Any]:
        """Return JSON values that change if the documents of this source may have changed."""
        if self.kind == "hub":
            return {
                "hub": self.name,
                "config": config.hub_config,
                "split": config.hub_split,
                "column": config.text_column,
            }
        identity: dict[str, Any] = {
            "files": [
                [str(file.path), file.size, file.mtime_ns, file.ctime_ns, file.inode]
                for file in self.files
            ]
        }
        if self.kind == "python-stdlib":
            identity["python"] = platform.python_version()
        if any(file.path.suffix.lower() in ROW_SUFFIXES for file in self.files):
            identity["column"] = config.text_column
        return identity


def resolve_sources(config: DataConfig) -> tuple[Source, ...]:
    """Return the sources that `config.source` names, in order.

    Raises:
        UserError: a name can't be a source; the first such name is reported.
    """
    return tuple(_resolve(name) for name in config.source_names)


def _resolve(name: str) -> Source:
    if name == "python-stdlib":
        return Source(name=name, kind=name, files=tuple(_library_files()))
    if name == "site-packages":
        return Source(name=name, kind=name, files=tuple(_package_files()))
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        files = _in_folder(path, lambda found: found.suffix.lower() in SUFFIXES)
        return _local(name, files, f"the folder {name} holds no {_listed(SUFFIXES)} file")
    if os.path.exists(path):
        known = path.suffix.lower() in SUFFIXES
        return _local(name, [path] if known else [], f"{name} is not a {_listed(SUFFIXES)} file")
    if glob.has_magic(name):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [
            match for match in matches if match.suffix.lower() in SUFFIXES and os.path.isfile(match)
        ]
        return _local(name, files, f"no {_listed(SUFFIXES)} file matches {name}")
    if path.suffix.lower() in SUFFIXES or not _HUB_NAME.fullmatch(name):
        raise UserError(f"data.source: no file or folder {name}")
    return Source(name=name, kind="hub")


def _local(name: str, paths: list[Path], none_found: str) -> Source:
    """Return a source of local files. Raise UserError with `none_found` if `paths` is empty."""
    if not paths:
        raise UserError(f"data.source: {none_found}")
    files = tuple(_with_stat(Path(os.path.realpath(path)) for path in paths))
    if not files:
        raise UserError(f"data.source: {name} is no regular file, or can't be read")
    return Source(name=name, kind="files", files=files)


def _library_files() -> Iterator[SourceFile]:
    """Return the sources of the interpreter's own library.

    Installed packages are excluded, and so are the library's tests, which are as large again and
    repetitive.
    """
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    folder = Path(sysconfig.get_path("stdlib"))
    return _with_stat(_in_folder(folder, lambda found: found.suffix == ".py", skip))


def _package_files() -> Iterator[SourceFile]:
    """Yield the sources of every installed package, folder by folder."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += [
        entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")
    ]
    # Two names of one folder, such as lib and lib64, are equal after realpath.
    for folder in dict.fromkeys(Path(os.path.realpath(folder)) for folder in folders):
        yield from _with_stat(_in_folder(folder, lambda found: found.suffix == ".py"))


def _in_folder(
    folder: Path, wanted: Callable[[Path], bool], skip: Collection[str] = ()
) -> list[Path]:
    """Return the `wanted` files below `folder`, sorted by relative path.

    Hidden files and folders are skipped, and so are folders whose name is in `skip`.
    """
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if name not in skip and name != "__pycache__" and not name.startswith(".")
        ]
        found += [
            path
            for name in files
            if not name.startswith(".") and wanted(path := Path(parent, name))
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _with_stat(paths: Iterable[Path]) -> Iterator[SourceFile]:
    """Yield each path with its state. Files that vanished, and those that are no regular files, are
    skipped."""
    for path in paths:
        file = SourceFile.of(path)
        if file is not None:
            yield file


def _listed(words: tuple[str, ...]) -> str:
    """Return "a, b or c" for (a, b, c)."""
    return f"{', '.join(words[:-1])} or {words[-1]}"
