"""The configurations that the package ships, found by name.

They are the files of `configs/` in the repository. A wheel holds them in `lowprec/configs`. A name
is the path of a file there without `.yaml`: "llama-tiny-cpu", "accelerate/fsdp2". Names without a
slash are runs; the others are launch files of Accelerate.
"""

import os
from pathlib import Path

from lowprec.errors import UserError, nearest, shown

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Return the folder of the shipped configurations."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Return all names, runs first."""
    root = folder()
    found = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    return sorted(found, key=lambda name: (name.count("/"), name))


def path_of(name: str) -> Path:
    """Return the path of a shipped file; raise UserError, which lists the names, if no file has
    this one."""
    known = sorted(names())
    if name not in known:
        # `nearest` lists all names itself if none is near.
        hints = dict.fromkeys((nearest(name, known), f"; known: {', '.join(known)}"))
        raise UserError(f"{shown(name)} is no shipped configuration{''.join(hints)}")
    return folder() / f"{name}.yaml"


def about(name: str) -> str:
    """Return the first comment of a shipped file, which says what it is."""
    first = path_of(name).read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip().removesuffix(":")


def find(config: str) -> Path:
    """Return the path of a run's configuration, given as a path or a bare name.

    A file of the working directory, `config` or `config.yaml`, comes before a shipped one.

    Raises:
        UserError: a bare name is neither a file nor shipped; the message has the nearest name.
    """
    path = Path(config)
    if os.path.isfile(path):
        return path
    runs = [name for name in names() if "/" not in name]
    if path.suffix in (".yaml", ".yml"):
        if not os.path.lexists(path) and path.stem in runs:
            raise UserError(f"{config}: no such file; the shipped one is '{path.stem}'")
        return path
    if len(path.parts) != 1:
        return path
    beside = Path(f"{config}.yaml")
    if os.path.isfile(beside):
        return beside
    if config in runs:
        return path_of(config)
    if os.path.lexists(path):
        return path  # A folder or a device, which the reader refuses by its name.
    raise UserError(f"{config}: no such file or shipped configuration{nearest(config, runs)}")
