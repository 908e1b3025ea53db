"""YAML, read and written safely by the rules of YAML 1.2's core schema.

ruamel.yaml parses and writes. Two of its rules are replaced:

- Its table of plain scalars keeps parts of YAML 1.1: `1_000` and `0b11` are integers, `2024-01-01`
  is a date, and `=` is an error. Here a plain scalar is a string unless the core schema says
  otherwise (YAML 1.2.2, section 10.3.2), so `off` is a string, `1e-3` a float and `010` is 10.
- It accepts a repeated key beside a merge key (`<<`). Here a repeated key is always an error.
"""

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.resolver import VersionedResolver

from lowprec.errors import UserError

_MERGE = "tag:yaml.org,2002:merge"

# Tag, pattern and first characters of the plain scalars that are not strings: the core schema, and
# the merge key of YAML 1.1.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


def _by_first_character() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, pattern, first in _SCALARS:
        for character in first:
            entry = (f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"))
            table.setdefault(character, []).append(entry)
    return table


class _CoreSchema(VersionedResolver):
    """A resolver of plain scalars by `_SCALARS`, whatever a %YAML directive says."""

    _table = _by_first_character()

    @property
    def processing_version(self) -> Any:
        return (1, 2)

    @property
    def versioned_resolver(self) -> Any:
        return self._table


class _Constructor(SafeConstructor):
    """A constructor of plain data that refuses every repeated key."""

    def flatten_mapping(self, node: Any) -> Any:
        # `merge` is set once the merged keys are part of `node.value`, where they may recur.
        if getattr(node, "merge", None) is None:
            seen = []
            for key_node, _ in node.value:
                # Keys are compared as data: 1 and 0x1 are one key.
                merges = key_node.tag == _MERGE
                key = "<<" if merges else self.construct_object(key_node, deep=True)
                if (merges, key) in seen:
                    problem = f"the key '{key_node.value}' is given twice"
                    raise ConstructorError(None, None, problem, key_node.start_mark)
                seen.append((merges, key))
        return super().flatten_mapping(node)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _CoreSchema
    yaml.Constructor = _Constructor
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    return yaml


def load(text: str, where: str) -> Any:
    """Return the document in `text` as plain data; raise UserError, with `where`, if it is not
    YAML."""
    try:
        return _yaml().load(text)
    except MarkedYAMLError as error:
        raise UserError(f"{where}: not YAML: {_one_line(error)}") from None
    # ruamel leaves some errors to Python: `!!int many`, `!!bool maybe`, a mapping in a key, and
    # deep nesting.
    except (YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _one_line(error: MarkedYAMLError) -> str:
    """Return the problem and its place, without the excerpt of the text."""
    problem = ": ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(f"{problem}{place}".split())


def load_mapping(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a file; raise UserError if the file is missing or holds something
    else."""
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
    """Return `data` as YAML text, in the order of its keys. `load` reads it back the same."""
    stream = io.StringIO()
    _yaml().dump(data, stream)
    return stream.getvalue()
