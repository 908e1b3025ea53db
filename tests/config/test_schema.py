"""Configuration: every mistake is one line with its place, and YAML means what YAML 1.2 says."""

import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import field_validator

from lowprec.config.schema import StrictConfig, parse, parse_value
from lowprec.config.yaml import dump, load, load_mapping
from lowprec.errors import UserError, nearest


class Optimizer(StrictConfig):
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.95)
    name: str = "adamw"

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value == "sgd":
            raise ValueError("sgd is not for transformers")
        return value


class Text(StrictConfig):
    path: str


class Stream(StrictConfig):
    address: str


class Run(StrictConfig):
    steps: int = 10
    optimizer: Optimizer | None = None
    sources: tuple[Text, ...] = ()
    data: Text | Stream | None = None
    devices: int | list[int] = 1
    extras: dict[str, int] = {}  # noqa: RUF012


def message(data, where: str = "") -> str:
    with pytest.raises(UserError) as error:
        parse(Run, data, where)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "data, expected",
    [
        # unknown keys, with the nearest one at the same place
        ({"stepps": 3}, "stepps: unknown key; did you mean 'steps'?"),
        ({"optimizer": {"learning_rat": 1.0}}, "optimizer.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ({"sources": [{"path": "a"}, {"pth": "b"}]}, "sources.1.pth: unknown key; did you mean 'path'?"),
        ({"zzz": 1}, "zzz: unknown key; known: data, devices, extras, optimizer, sources, steps"),
        (
            {"learning_rate": 1.0},
            "learning_rate: unknown key; known: data, devices, extras, optimizer, sources, steps",
        ),  # another place's key
        # missing values
        ({"optimizer": {}}, "optimizer.learning_rate: a value is required"),
        ({"sources": [{}]}, "sources.0.path: a value is required"),
        # wrong types
        ({"steps": "many"}, "steps: input should be a valid integer, unable to parse string as an integer, got 'many'"),
        ({"steps": 1.5}, "steps: input should be a valid integer, got a number with a fractional part, got 1.5"),
        ({"steps": None}, "steps: input should be a valid integer, got None"),
        ({"optimizer": {"learning_rate": [1]}}, "optimizer.learning_rate: input should be a valid number, got [1]"),
        ({"sources": "a"}, "sources: input should be a valid tuple, got 'a'"),
        ({"extras": {"a": "b"}}, "extras.a: input should be a valid integer, unable to parse string as an integer, got 'b'"),
        # our own validators say it all
        ({"optimizer": {"learning_rate": 1, "name": "sgd"}}, "optimizer.name: sgd is not for transformers"),
    ],
)
def test_a_mistake_is_one_line(data, expected):
    assert message(data) == expected
    assert message(data, "run") == f"run.{expected}"


@pytest.mark.parametrize(
    "data, expected",
    [
        ({"devices": "all"}, "devices: input should be a valid integer, unable to parse string as an integer, got 'all'"),
        ({"devices": [0, "x"]}, "devices: input should be a valid integer, got [0, 'x']"),
        ({"data": {"pth": "a"}}, "data.pth: unknown key; did you mean 'path'?"),
    ],
)
def test_in_a_union_the_path_holds_keys_alone(data, expected):
    """pydantic puts the name of each branch that it tried into the place ("devices.int"); users know no such key."""
    assert message(data) == expected


def test_an_unknown_key_is_reported_before_what_follows_from_it():
    assert message({"optimizer": {"learning_rat": 1.0}}) == "optimizer.learning_rat: unknown key; did you mean 'learning_rate'?"
    assert message({"steps": "many", "devicess": 1}) == "devicess: unknown key; did you mean 'devices'?"


@pytest.mark.parametrize(
    "data, part",
    [
        ({"optimizer": {"learning_rate": math.nan}}, "optimizer.learning_rate: input should be a finite number"),
        ({"optimizer": {"learning_rate": math.inf}}, "optimizer.learning_rate: input should be a finite number"),
        ({"optimizer": {"learning_rate": "nan"}}, "optimizer.learning_rate: input should be a finite number"),
        (
            {"optimizer": {"learning_rate": 10**400}},
            "optimizer.learning_rate: expected a number of at most 64 bits, got a number of 1329 bits",
        ),
        ({"steps": 2**63}, "steps: expected a number of at most 64 bits, got 9223372036854775808"),
        ({"steps": 10**5000}, "steps: expected a number of at most 64 bits, got a number of 16610 bits"),
        ({"steps": True}, "steps: expected a number, got true"),
        ({"sources": [{"path": "a\0b"}]}, "sources.0.path: text can't hold a NUL character"),
        ({"extras": {"\ud800": 1}}, "extras: text can't hold a NUL character or half a character: '\\ud800'"),
        ({"x" * 10**6: 1}, "x...: unknown key"),
        ({"steps": ["y" * 10**5] * 100}, "steps: input should be a valid integer, got ['yyy"),
    ],
    ids=range(11),
)
def test_values_that_no_setting_has(data, part):
    text = message(data)
    assert part in text
    assert len(text) < 1000


def test_a_value_without_end_is_refused():
    endless: list = []
    endless.append(endless)
    assert message({"extras": endless}) == "extras: nested deeper than 50 levels"
    assert message(endless).startswith("Run: expected a mapping of settings, got [[[[")


@pytest.mark.parametrize("value", [True, "a\0", 2**64])
def test_single_values_follow_the_same_rules(value):
    with pytest.raises(UserError, match=r"^trainer\.seed: "):
        parse_value(int | None, value, "trainer.seed")


def test_an_error_is_one_line_of_bounded_length():
    assert str(UserError("a\n b\x1b[2J\u202e")) == "a b\\x1b[2J\\u202e"
    assert 3900 < len(str(UserError("x" * 10**6))) < 4100


@pytest.mark.parametrize("data", [None, 3, "text", [1], ("a", 1)])
def test_a_configuration_is_a_mapping(data):
    assert message(data, "precision") == f"precision: expected a mapping of settings, got {data!r}"
    assert message(data) == f"Run: expected a mapping of settings, got {data!r}"


def test_a_valid_configuration_passes():
    run = parse(Run, {"steps": 3, "optimizer": {"learning_rate": 1}, "data": {"address": "a"}, "devices": [0, 1]})
    assert run.steps == 3
    assert run.optimizer == Optimizer(learning_rate=1.0)
    assert run.data == Stream(address="a")
    assert parse(Run, run) is run


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse(Run, {}).steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_single_values():
    assert parse_value(int, "3", "trainer.max_steps") == 3
    with pytest.raises(UserError) as error:
        parse_value(int, "three", "trainer.max_steps")
    assert str(error.value) == "trainer.max_steps: input should be a valid integer, unable to parse string as an integer, got 'three'"


def test_nearest():
    assert nearest("recipee", ["recipe", "rules"]) == "; did you mean 'recipe'?"
    assert nearest("xyz", ["rules", "recipe"]) == "; known: recipe, rules"
    assert nearest("xyz", []) == ""


# YAML


@pytest.mark.parametrize(
    "text, value",
    [
        # YAML 1.1 reads these as booleans
        ("off", "off"),
        ("on", "on"),
        ("no", "no"),
        ("yes", "yes"),
        ("y", "y"),
        ("NO", "NO"),
        ("true", True),
        ("False", False),
        # YAML 1.1 reads these as strings
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2e+4", -2e4),
        ("1.0e-3", 1e-3),
        (".5", 0.5),
        ("3.", 3.0),
        ("-.inf", -math.inf),
        ("+12", 12),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("1e", "1e"),
        # words that only begin with a boolean or a number
        ("truest", "truest"),
        ("False-start", "False-start"),
        ("true/false", "true/false"),
        ("1e-3x", "1e-3x"),
        (".infinite", ".infinite"),
        # YAML 1.1 counts in base 60 and 8, and reads dates
        ("12:30:45", "12:30:45"),
        ("1:30", "1:30"),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("~", None),
        ("null", None),
        ("", None),
        ("'off'", "off"),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(text, value):
    got = load(f"key: {text}", "here")["key"]
    assert (got, type(got)) == (value, type(value))


def test_not_a_number():
    assert math.isnan(load("key: .nan", "here")["key"])


def test_invalid_yaml_is_one_line():
    for text in ("key: [1, 2", "a: b: c", "key: !!python/object/apply:os.getcwd []", "a: 1\na: 2"):
        with pytest.raises(UserError) as error:
            load(text, "run.yaml")
        assert str(error.value).startswith("run.yaml: not YAML: ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value",
    [
        *("off", "no", "true", "True", "truest", "1e-3", "1e3", "-2E5", ".5", "3.", "010", "0o10", "0x1F", "12:30", "1_000", "2024-01-01"),
        *("", "~", "null", "=", "<<", "é", "two\nlines", "- a", "a: b", "#no", "'", '"', " padded "),
        *(1e-3, 1e-5, 1e22, 0.1, -math.inf, 3, -1, 0, True, False, None),
        [1, "1", {"a": "1e5"}],
        {"nested": {"deep": ["off", 1e-7]}},
    ],
    ids=repr,
)
def test_written_data_is_read_back(value):
    got = load(dump({"key": value}), "here")["key"]
    assert (got, type(got)) == (value, type(value))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    )
)
def test_any_plain_data_is_read_back(value):
    assert repr(load(dump(value), "here")) == repr(value)


@pytest.mark.parametrize(
    "text, key, place",
    [
        ("a: 1\nb: 2\na: 3", "a", "line 3, column 1"),
        ("a: {b: 1, 'b': 2}", "b", "line 1, column 11"),
        ("1: a\n0x1: b", "0x1", "line 2, column 1"),  # both keys are the same number
        ("a: &a {b: 1}\nc: {<<: *a, b: 2, b: 3}", "b", "line 2, column 19"),  # beside a merge key
        ("{<<: {a: 1}, <<: {b: 2}}", "<<", "line 1, column 14"),
    ],
)
def test_a_repeated_key_is_named_with_its_place(text, key, place):
    with pytest.raises(UserError) as error:
        load(text, "run.yaml")
    assert str(error.value) == f"run.yaml: not YAML: the key '{key}' is given twice, {place}"


def test_anchors_and_merge_keys():
    text = "a: &a {x: 1, y: off}\nb: *a\nc: {<<: *a, x: 2}\nd: &d {<<: [*a, {z: 3}]}\ne: {<<: *d, y: 4}"
    a = {"x": 1, "y": "off"}
    assert load(text, "here") == {"a": a, "b": a, "c": {"x": 2, "y": "off"}, "d": {**a, "z": 3}, "e": {"x": 1, "y": 4, "z": 3}}


def test_keys_are_scalars_of_any_type():
    assert load("1: a\noff: b\n~: c\n1e-3: d", "here") == {1: "a", "off": "b", None: "c", 1e-3: "d"}


def test_a_directive_changes_no_rule():
    assert load("%YAML 1.1\n---\n{a: off, b: 010, c: 1e3, d: 1:30}", "here") == {"a": "off", "b": 10, "c": 1e3, "d": "1:30"}


@pytest.mark.parametrize(
    "text",
    ["!!python/name:os.getcwd ''", "!!python/object/new:dict {}", "!mine 1", "!!int many", "!!bool maybe", "{? [{a: 1}] : 2}", "[" * 500],
)
def test_tags_make_no_objects_and_odd_documents_are_one_line(text):
    with pytest.raises(UserError, match=r"^here: not YAML: [^\n]+$"):
        load(f"key: {text}", "here")


def _laughs(form: str) -> str:
    """Return nine levels, each nine times the one before: 400 million values."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{level}: &a{level} " + form.format(",".join([f"*a{level - 1}"] * 9)) for level in range(1, 10)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text, part",
    [
        (_laughs("[{}]"), "more than 50000 values or 1048576 characters, aliases written out, line 6"),
        (_laughs("{{<<: [{}]}}").replace("[x, x]", "{x: 1}"), "more than 50000 values"),
        ("a: &a " + "x" * 60000 + "\nb: [" + ", ".join(["*a"] * 40) + "]", "more than 50000 values or 1048576 characters"),
        ("a: &a [*a]", "the alias 'a' lies inside its own anchor, line 1, column 8"),
        ("a: &a {b: {c: *a}}", "the alias 'a' lies inside its own anchor"),
        ("[" * 5000, "nested deeper than 40 levels, line 1, column 41"),
        ("{a: " * 5000, "nested deeper than 40 levels"),
        ("- " * 5000 + "a", "nested deeper than 40 levels"),
        ("a: " + "9" * 5000, "a number of 5000 characters; at most 100 are read, line 1, column 4"),
        ("a: 0x" + "f" * 5000, "a number of 5002 characters"),
        ("a: !!int " + "9" * 5000, "a number of 5000 characters"),
        ("a: !!binary aGk=", "the tag '!!binary' is not of plain data"),
        ("a: !!timestamp 2001-01-01", "the tag '!!timestamp' is not of plain data"),
        ("a: !!set {b, c}", "the tag '!!set' is not of plain data"),
        ("a: !!omap [b: 1]", "the tag '!!omap' is not of plain data"),
        ("a: !!python/object/apply:os.system [ls]", "the tag '!!python/object/apply:os.system' is not of plain data"),
        ("a: !<" + "x" * 9000 + "> 1", "is not of plain data"),
        ("? [a, b]\n: 1", "a key is a name or a number, not a list or a mapping, line 1, column 3"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a:\t1\n\tb: 2", "found character '\\t'"),
        ("a: \0", "unacceptable character #x0000"),
        ("a: \x1b[2J", "unacceptable character #x001b"),
        ('a: "\\UFFFFFFFF"', "not YAML"),
    ],
    ids=range(23),
)
def test_hostile_documents_are_one_bounded_line(text, part):
    with pytest.raises(UserError, match=r"^here: not YAML: [^\n]{1,300}$") as error:
        load(text, "here")
    assert part in str(error.value)


def test_an_anchor_may_be_given_again():
    assert load("a: &x 1\nb: &x 2\nc: *x", "here") == {"a": 1, "b": 2, "c": 2}


def test_files_that_are_no_configuration(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    path.write_text("a: 1\n")
    for name, part in (
        ("fifo.yaml", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("/dev/null", "not a regular file"),
        ("loop.yaml", "can't be read: Too many levels of symbolic links"),
        ("x" * 300, "can't be read: File name too long"),
        ("run.yaml/more", "can't be read: Not a directory"),
        ("a\0b", "can't be read: embedded null byte"),
    ):
        with pytest.raises(UserError, match=part):
            load_mapping(tmp_path / name)
    with path.open("r+b") as file:
        file.truncate(100 * 2**20)  # a file with a hole
    with pytest.raises(UserError, match="larger than 262144 bytes, which no configuration is"):
        load_mapping(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load_mapping(path) == {"a": 1}


def test_the_order_of_keys_is_kept():
    assert dump({"b": 1, "a": 2}) == "b: 1\na: 2\n"


def test_files(tmp_path):
    path = tmp_path / "run.yaml"
    with pytest.raises(UserError, match=r"run\.yaml: no such file"):
        load_mapping(path)
    with pytest.raises(UserError, match=r"a folder, not a file"):
        load_mapping(tmp_path)
    path.write_text("- a\n- b\n")
    with pytest.raises(UserError, match=r"run\.yaml: expected a mapping of settings, got list"):
        load_mapping(path)
    path.write_text("")
    with pytest.raises(UserError, match=r"run\.yaml: expected a mapping of settings, got NoneType"):
        load_mapping(str(path))
    path.write_text("lr: 1e-3\nname: é\n", encoding="utf-8")
    assert load_mapping(path) == {"lr": 1e-3, "name": "é"}
