"""YAML read and written by the rules of YAML 1.2's core schema, safely.

PyYAML follows YAML 1.1, in which `off`, `on`, `no` and `yes` are booleans, `1e-3` is a string,
`010` is 8 and `1:30` is 90: `compile: off` and `learning_rate: 1e-3` would not mean what they say.
A key that is given twice is an error here, too.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lowprec.errors import UserError

# YAML 1.2.2, section 10.3.2, and the merge key "<<" of 1.1, which people use. PyYAML matches from
# the start of a scalar only: hence the $.
_SCALARS = {
    "null": (r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "int": (r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "float": (
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    "merge": (r"<<$", ["<"]),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is given twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would take for something else."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


def _construct_int(loader: yaml.SafeLoader, node: Any) -> int:
    text = loader.construct_scalar(node)
    assert isinstance(text, str)
    return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)


for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def load(text: str, where: str) -> Any:
    """The document in `text`; UserError, with `where`, if it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def load_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a file; UserError if the file is missing or holds something else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: " + ("a folder, not a file" if path.is_dir() else "no such file"))
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a text file in UTF-8: {error}") from None
    data = load(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    return data


def dump(data: Any) -> str:
    """`data` as YAML text, in the order of its keys, that `load` reads back the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
