"""The Plan as data: status, totals, JSON, the printed table, and a file that is written whole or not at all."""

import json
import re
from dataclasses import fields
from html import unescape

import pytest

import lowprec.files
from lowprec.conversion.plan import GemmPlan, LayerPlan, PartPlan, Plan
from lowprec.files import write_atomically


def gemms(native: bool = False, backends: tuple[str, ...] = ("reference",) * 3) -> tuple[GemmPlan, ...]:
    return tuple(
        GemmPlan(gemm=gemm, equation=f"{out} = a · bᵀ", backend=backend, native=native, reason="because")
        for gemm, out, backend in zip(("fprop", "dgrad", "wgrad"), ("y", "dx", "dw"), backends, strict=True)
    )


def layer(name: str, shape: tuple[int, int] = (4, 2), **changes) -> LayerPlan:
    """Return a converted, emulated layer, with these changes."""
    values = {"kind": "Linear", "recipe": "mxfp8", "rule": "default", "gemms": gemms(), "reason": "emulated here", **changes}
    return LayerPlan(name=name, shape=shape, **values)


def alone(name: str, **changes) -> LayerPlan:
    return layer(name, **{"recipe": None, "gemms": (), "reason": "not asked for", **changes})


PLAN = Plan(
    device="cpu",
    layers=(
        *(layer(f"layers.{i}.up", (8, 4)) for i in range(3)),
        layer("layers.0.down", recipe="bf16", gemms=gemms(native=True, backends=("torch",) * 3), reason=""),
        alone("head", shape=(16, 2)),
    ),
    parts=(PartPlan(name="attention", choice="sdpa", reason="plain causal"), PartPlan(name="amp", choice="bf16")),
)


def test_status():
    assert [entry.status for entry in PLAN.layers] == ["emulated"] * 3 + ["native", "kept in high precision"]
    mixed = layer("x", gemms=(*gemms(native=True)[:2], gemms()[2]))
    assert mixed.status == "emulated"  # one emulated product makes the layer emulated
    assert not alone("x").native


def test_totals():
    assert PLAN.totals() == {
        "linears": 5,
        "native": 1,
        "emulated": 3,
        "kept in high precision": 1,
        "not called": 0,
        "recipes": {"mxfp8": 3, "bf16": 1},
        "converted_weights": (3 * 32 + 8) / (3 * 32 + 8 + 32),
        "weights": {"mxfp8": 96 / 136, "bf16": 8 / 136, "high precision": 32 / 136},
        "flops": {"mxfp8": 96 / 136, "bf16": 8 / 136, "high precision": 32 / 136},
    }
    assert Plan(device="cpu", layers=()).totals()["converted_weights"] == 0.0


def test_summary():
    assert PLAN.summary() == ("4 of 5 linear layers converted (76.5% of their weights): mxfp8 x 3, bf16 x 1; 1 native, 3 emulated on cpu")
    empty = Plan(device="cuda", layers=())
    assert empty.summary() == "0 of 0 linear layers converted (0.0% of their weights): no recipe; 0 native, 0 emulated on cuda"


def test_the_table():
    assert str(PLAN).splitlines() == [
        "layers           N x K   count  recipe  backend    status",
        "---------------  ------  -----  ------  ---------  ----------------------",
        "layers.{0-2}.up  8 x 4   3      mxfp8   reference  emulated",
        "layers.0.down    4 x 2   1      bf16    torch      native",
        "head             16 x 2  1      -       -          kept in high precision",
        "",
        "attention  sdpa (plain causal)",
        "amp        bf16",
        "",
        "emulated: emulated here [1 of 3 rows]",
        "kept in high precision: not asked for [1 of 3 rows]",
        "",
        "4 of 5 linear layers converted (76.5% of their weights): mxfp8 x 3, bf16 x 1; 1 native, 3 emulated on cpu",
    ]


def test_the_repr_counts_layers_by_recipe_and_status():
    assert repr(PLAN) == "<Plan for cpu: 5 linear layers, 3 mxfp8 emulated, 1 bf16 native, 1 kept in high precision>"
    assert repr(Plan(device="cuda", layers=())) == "<Plan for cuda: 0 linear layers>"
    some = Plan(device="cpu", layers=(layer("a"), layer("b", gemms=gemms(native=True)), layer("c")))
    assert repr(some) == "<Plan for cpu: 3 linear layers, 2 mxfp8 emulated, 1 mxfp8 native>"


def cells(html: str, tag: str = "td") -> list[list[str]]:
    """Return the text of an HTML table's cells, row by row, without rows that have none."""
    rows = [re.findall(rf"<{tag}>(.*?)</{tag}>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    return [[unescape(cell) for cell in row] for row in rows if row]


def test_a_notebook_shows_every_row_with_its_reason_the_parts_and_the_totals():
    html = PLAN._repr_html_()
    assert cells(html, "th") == [
        ["layers", "N x K", "count", "recipe", "backend", "status", "reason"],
        ["part", "choice", "reason"],
    ]
    assert cells(html) == [
        ["layers.{0-2}.up", "8 x 4", "3", "mxfp8", "reference", "emulated", "emulated here"],
        ["layers.0.down", "4 x 2", "1", "bf16", "torch", "native", ""],
        ["head", "16 x 2", "1", "-", "-", "kept in high precision", "not asked for"],
        ["attention", "sdpa", "plain causal"],
        ["amp", "bf16", ""],
    ]
    assert html.endswith(f"<p>{PLAN.summary()}</p>")
    assert "part" not in Plan(device="cpu", layers=PLAN.layers)._repr_html_()


def test_a_notebook_shows_names_and_reasons_as_text():
    plan = Plan(
        device="cpu",
        layers=(layer("<b>up</b>", rule="a&b", reason="1 < 2 & 'x'", recipe="<script>"),),
        parts=(PartPlan(name="<i>", choice="a < b", reason='"why"'),),
    )
    html = plan._repr_html_()
    assert cells(html) == [
        ["<b>up</b>", "4 x 2", "1", "<script>", "reference", "emulated", "1 < 2 & 'x'"],
        ["<i>", "a < b", '"why"'],
    ]
    assert set(re.findall(r"</?(\w+)", html)) == {"table", "thead", "tbody", "tr", "th", "td", "p"}


@pytest.mark.parametrize(
    "names, rows",
    [
        (["layers.0.up", "layers.1.up", "layers.2.up"], ["layers.{0-2}.up"]),
        (["layers.0.up", "layers.2.up", "layers.3.up"], ["layers.{0,2,3}.up"]),
        ([f"layers.{i}.up" for i in range(8, 12)], ["layers.{8-11}.up"]),
        (["layers.7.up"], ["layers.7.up"]),
        (["a.0.b.0", "a.0.b.1"], ["a.0.b.{0-1}"]),
        ([f"a.{i}.b.{j}" for i in range(2) for j in range(2)], ["a.0.b.0 ... a.1.b.1"]),  # two numbers differ
        (["fc1", "fc2"], ["fc{1-2}"]),
        (["up", "down"], ["up", "down"]),
    ],
)
def test_numbered_names_are_merged(names, rows):
    text = str(Plan(device="cpu", layers=tuple(layer(name) for name in names))).splitlines()
    assert [line.split("  ")[0] for line in text[2 : 2 + len(rows)]] == rows
    assert text[2 + len(rows)] == ""


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (8, 8)},
        {"recipe": "mxfp4"},
        {"rule": "layers.1.*"},
        {"reason": "another"},
        {"kind": "Conv1D"},
        {"blocked": True},
        {"gemms": gemms(native=True)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_layers_that_differ_in_more_than_a_number_are_not_merged(change):
    text = str(Plan(device="cpu", layers=(layer("layers.0.up"), layer("layers.1.up", **change)))).splitlines()
    assert [line.split()[0] for line in text[2:4]] == ["layers.0.up", "layers.1.up"]


def test_every_backend_of_a_layer_is_shown():
    plan = Plan(device="cpu", layers=(layer("a", gemms=gemms(backends=("torch", "reference", "torch"))),))
    assert str(plan).splitlines()[2].split() == ["a", "4", "x", "2", "1", "mxfp8", "torch/reference", "emulated"]


def test_json_holds_everything(tmp_path):
    """The plan is the same after it was written and read back: nothing is missing, nothing is rounded."""
    path = tmp_path / "deep" / "plan.json"
    PLAN.save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert set(data) == {field.name for field in fields(Plan)} | {"totals"}
    assert data["totals"] == PLAN.totals()
    for entry, original in zip(data["layers"], PLAN.layers, strict=True):
        assert (entry.pop("converted"), entry.pop("native")) == (original.converted, original.native)
    again = Plan(
        device=data["device"],
        layers=tuple(
            LayerPlan(**{**entry, "shape": tuple(entry["shape"]), "gemms": tuple(GemmPlan(**gemm) for gemm in entry["gemms"])})
            for entry in data["layers"]
        ),
        parts=tuple(PartPlan(**part) for part in data["parts"]),
    )
    assert again == PLAN
    assert "ᵀ" in path.read_text(encoding="utf-8")  # readable, no escapes


def test_with_parts_adds_to_a_copy():
    more = PLAN.with_parts([PartPlan(name="compile", choice="off")])
    assert [part.name for part in more.parts] == ["attention", "amp", "compile"]
    assert len(PLAN.parts) == 2


def test_saving_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    PLAN.save(path)
    assert json.loads(path.read_text(encoding="utf-8"))["device"] == "cpu"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step):
    """The disk fills up, or the process is interrupted, at either step."""
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(lowprec.files.os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        PLAN.save(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_text_that_can_not_be_encoded_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half a pair: \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_atomically(tmp_path / "written", "x")
    assert (tmp_path / "written").stat().st_mode == plain.stat().st_mode
