"""YAML read by the rules of YAML 1.2's core schema, safely.

PyYAML follows YAML 1.1, in which `off`, `on`, `no` and `yes` are booleans and `1e-3` is a string: `compile: off` and
`learning_rate: 1e-3` would not mean what they say.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from lowprec.errors import UserError


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


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
        raise UserError(f"{path}: no such file")
    data = load(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    return data


def dump(data: Any) -> str:
    """`data` as YAML text, in the order of its keys, that `load` reads back the same."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
