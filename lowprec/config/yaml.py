"""YAML, read and written safely by the rules of YAML 1.2's core schema.

ruamel.yaml parses and writes. Two of its rules are replaced:

- Its table of plain scalars keeps parts of YAML 1.1: `1_000` and `0b11` are integers, `2024-01-01`
  is a date, and `=` is an error. Here a plain scalar is a string unless the core schema says
  otherwise (YAML 1.2.2, section 10.3.2), so `off` is a string, `1e-3` a float and `010` is 10.
- It accepts a repeated key beside a merge key (`<<`). Here a repeated key is always an error.

A document is bounded: in the bytes of its file, in the depth of its nesting, in the digits of a
number, and in the values and characters that its aliases expand to. A tag other than the core
schema's is an error, because a configuration is plain data.
"""

import io
import os
import re
import stat
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.resolver import VersionedResolver

from lowprec.errors import UserError, shown

MAX_BYTES = 256 * 2**10
"""Largest file that is read: about three seconds of parsing."""
_MAX_DEPTH = 40
_MAX_VALUES = 50_000
_MAX_CHARACTERS = 2**20
"""Limits on the values and characters of a document whose aliases are written out."""
_MAX_DIGITS = 100
"""Most digits of an integer. Python refuses to convert more than 4300."""

_CORE_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
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


class _Composer(Composer):
    """A composer that bounds the depth of a document, and its size with all aliases written out."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader=loader)
        self.warn_double_anchors = False
        self.level = 0
        self.values = 0
        self.characters = 0
        self.sizes: dict[int, tuple[int, int]] = {}
        """Values and characters of each finished node, by the id of the node."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        before = (self.values, self.characters)
        self.level += 1
        if self.level > _MAX_DEPTH:
            raise _refusal(f"nested deeper than {_MAX_DEPTH} levels", event)
        node = super().compose_node(parent, index)
        self.level -= 1
        if isinstance(event, AliasEvent):
            if id(node) not in self.sizes:
                raise _refusal(f"the alias '{event.anchor}' lies inside its own anchor", event)
            values, characters = self.sizes[id(node)]
        else:
            values = 1
            characters = len(node.value) if isinstance(node, ScalarNode) else 0
        self.values += values
        self.characters += characters
        if self.values > _MAX_VALUES or self.characters > _MAX_CHARACTERS:
            raise _refusal(
                f"more than {_MAX_VALUES} values or {_MAX_CHARACTERS} characters, aliases written "
                "out",
                event,
            )
        self.sizes[id(node)] = (self.values - before[0], self.characters - before[1])
        return node


def _refusal(problem: str, event: Any) -> ComposerError:
    return ComposerError(None, None, problem, event.start_mark)


class _Constructor(SafeConstructor):
    """A constructor of plain data that refuses every repeated key, and every tag that is not of the
    core schema."""

    def flatten_mapping(self, node: Any) -> Any:
        # `merge` is set once the merged keys are part of `node.value`, where they may recur.
        if getattr(node, "merge", None) is None:
            seen = set()
            for key_node, _ in node.value:
                # Keys are compared as data: 1 and 0x1 are one key.
                merges = key_node.tag == _MERGE
                key = "<<" if merges else self._key(key_node)
                if (merges, key) in seen:
                    problem = f"the key '{key_node.value}' is given twice"
                    raise ConstructorError(None, None, problem, key_node.start_mark)
                seen.add((merges, key))
        return super().flatten_mapping(node)

    def _key(self, node: Any) -> Any:
        if not isinstance(node, ScalarNode):
            problem = "a key is a name or a number, not a list or a mapping"
            raise ConstructorError(None, None, problem, node.start_mark)
        return self.construct_object(node, deep=True)

    def construct_integer(self, node: Any) -> int:
        if len(node.value) > _MAX_DIGITS:
            problem = f"a number of {len(node.value)} characters; at most {_MAX_DIGITS} are read"
            raise ConstructorError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node)

    def construct_undefined(self, node: Any) -> Any:
        tag = str(node.tag).replace("tag:yaml.org,2002:", "!!")
        problem = f"the tag {shown(tag)} is not of plain data"
        raise ConstructorError(None, None, problem, node.start_mark)


_Constructor.yaml_constructors = {
    tag: function
    for tag, function in SafeConstructor.yaml_constructors.items()
    if tag in [f"tag:yaml.org,2002:{name}" for name in _CORE_TAGS]
} | {
    "tag:yaml.org,2002:int": _Constructor.construct_integer,
    None: _Constructor.construct_undefined,
}
_Constructor.yaml_multi_constructors = {}


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _CoreSchema
    yaml.Composer = _Composer
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
    # ruamel leaves some errors to Python: `!!int many`, `!!bool maybe`, `"\\UFFFFFFFF"`.
    except (YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
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
    data = load(_read(path), str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    return data


def _read(path: str | Path) -> str:
    """Return the text of a regular file of at most `MAX_BYTES` bytes."""
    try:
        # Not blocking, since opening a FIFO waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: can't be read: {reason}") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{path}: a folder, not a file")
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES} bytes, which no configuration is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8: {error}") from None


def dump(data: Any) -> str:
    """Return `data` as YAML text, in the order of its keys. `load` reads it back the same."""
    stream = io.StringIO()
    _yaml().dump(data, stream)
    return stream.getvalue()
