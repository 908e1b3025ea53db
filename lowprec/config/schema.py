"""Strict configuration: an unknown key, a missing value or a wrong type is a UserError of one line.

A configuration is a tree of frozen pydantic models derived from `StrictConfig`. `parse` makes one
of plain data (from YAML, a dict or the command line). It rewrites pydantic's report into the
sentence that a user needs: the dotted path, what is wrong, and the nearest known key.

Numbers are finite, unless a field says that infinity has a meaning (`allow_inf_nan=True` beside a
bound, which no NaN meets). `check_plain` holds the rules of values that have no type of their own:
text without NUL characters, numbers that fit 64 bits.
"""

import math
import operator
import os
import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from lowprec.errors import UserError, nearest, shown

_MAX_LEVELS = 50
"""Deepest nesting of a value."""
_NO_TEXT = re.compile("[\\0\\ud800-\\udfff]")


class StrictConfig(BaseModel):
    """A frozen section of a configuration, which rejects unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse text and numbers that no setting can have, and a boolean where a number is
        expected."""
        hint = None if info.field_name is None else cls.model_fields[info.field_name].annotation
        refuse_boolean(hint, value)
        if _model_in(hint) is None:  # A section inside checks its own fields, with their names.
            check_plain(value)
        return value


C = TypeVar("C", bound=StrictConfig)


def refuse_boolean(hint: Any, value: Any) -> None:
    """Raise ValueError for a boolean where a number is expected: to Python, and so to pydantic,
    true is 1."""
    kinds = {hint, *get_args(hint)}
    if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
        raise ValueError(f"expected a number, got {str(value).lower()}")


def check_plain(value: Any, *, finite: bool = False, level: int = 0) -> None:
    """Raise ValueError if plain data holds something that no setting can have: text with a NUL
    character or half a surrogate pair, an integer of more than 64 bits, or a nesting without end.

    Args:
        finite: Flag: infinity and NaN are refused, too. A field of a type refuses them itself.
    """
    if level > _MAX_LEVELS:
        raise ValueError(f"nested deeper than {_MAX_LEVELS} levels")
    if isinstance(value, str):
        if _NO_TEXT.search(value):
            raise ValueError(f"text can't hold a NUL character or half a character: {shown(value)}")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"expected a number of at most 64 bits, got {shown(value)}")
    elif isinstance(value, float):
        if finite and not math.isfinite(value):
            raise ValueError(f"expected a finite number, got {value}")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_plain(key, finite=True, level=level + 1)
            check_plain(inner, finite=finite, level=level + 1)
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        for inner in value:
            check_plain(inner, finite=finite, level=level + 1)


def check_path(path: str) -> str:
    """Return `path`; raise ValueError if no file system takes it: it is empty or too long."""
    if not path.strip():
        raise ValueError(f"expected a path, got {shown(path)}")
    if any(len(os.fsencode(part)) > 255 for part in path.split("/")) or len(path) > 3500:
        raise ValueError(f"the path is too long: {shown(path)}")
    return path


def parse(schema: type[C], data: Any, where: str = "") -> C:
    """Return `data` as a `schema`. `where` begins the dotted path of an error: with "precision",
    it is "precision.recipe"."""
    if isinstance(data, schema):
        return data
    if not isinstance(data, Mapping):
        raise UserError(
            f"{where or schema.__name__}: expected a mapping of settings, got {shown(data)}"
        )
    try:
        return schema.model_validate(dict(data))
    except ValidationError as error:
        raise UserError(_one_line(error, schema, where)) from None


def parse_value(hint: Any, value: Any, where: str) -> Any:
    """Return a value as the type `hint`; raise UserError, which names `where`, if it is none.

    Numbers may be infinite or NaN. The caller knows where that has a meaning.
    """
    try:
        check_plain(value)
        refuse_boolean(hint, value)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(
            value
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {_lower_first(first['msg'])}, got {shown(value)}") from None


def whole_number(value: Any, what: str) -> int:
    """Return `value`, an integer of any kind (NumPy's too) from 1, as an int. `what` begins the
    UserError of another value: "tokens: the tokens of a pass"."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise UserError(f"{what} are a whole number from 1, got {shown(value)}")
    return number


def _one_line(error: ValidationError, schema: type[BaseModel], where: str) -> str:
    # A wrong key explains more than its consequences, such as a missing value: it comes first.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    location = _without_branches(schema, first["loc"])
    path = ".".join([where] * bool(where) + [_short(part) for part in location])
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key{nearest(str(location[-1]), _keys_at(schema, location[:-1]))}"
    if first["type"] == "missing":
        return f"{path}: a value is required"
    if first["type"] == "value_error":  # A validator of ours: its message says it all.
        message = first["msg"].removeprefix("Value error, ")
        # The message of a section that a validator parsed begins with its own path.
        return message if message.startswith(f"{path}.") else f"{path}: {message}"
    return f"{path}: {_lower_first(first['msg'])}, got {shown(first['input'])}"


def _without_branches(schema: Any, location: tuple) -> tuple:
    """Return `location` without the names that pydantic adds for the branches of a union
    ("devices.int"), which are no keys."""
    kept = []
    for part in location:
        if _has_branches(schema):
            schema = _model_in(schema)
            continue
        model = _model_in(schema)
        if model is not None and part in model.model_fields:
            schema = model.model_fields[part].annotation
        kept.append(part)
    return tuple(kept)


def _keys_at(schema: Any, location: tuple) -> list[str]:
    """Return the keys known at `location` inside `schema`."""
    for part in location:
        model = _model_in(schema)
        if model is not None and part in model.model_fields:
            schema = model.model_fields[part].annotation
    model = _model_in(schema)
    return list(model.model_fields) if model else []


def _has_branches(hint: Any) -> bool:
    """Return whether a type is a union of several types besides None: pydantic treats it apart."""
    return (
        get_origin(hint) in (Union, UnionType)
        and len([arg for arg in get_args(hint) if arg is not type(None)]) > 1
    )


def _model_in(hint: Any) -> type[BaseModel] | None:
    if isinstance(hint, type) and get_origin(hint) is None and issubclass(hint, BaseModel):
        return hint
    return next((model for arg in get_args(hint) if (model := _model_in(arg))), None)


def _short(part: Any) -> str:
    """Return a part of a path as text, cut if it is long."""
    text = str(part)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
