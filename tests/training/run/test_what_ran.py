"""The output, the summary and the plan of a run say in which precision it really ran."""

import json
from pathlib import Path
from typing import Any

import pytest

from lowprec.cli.main import main
from tests.runs import CONFIG, make_corpus, overrides

SLOW = "fp8_blockwise would run at 0.50 of bf16's speed"
WARNING = f"does not pay (model.layers.0.mlp.gate_proj: {SLOW}); precision.skip_slow: false runs all layers in it nevertheless"


def train(folder: Path, capfd: pytest.CaptureFixture[str], **settings: Any) -> tuple[str, str, dict[str, Any]]:
    """Return stdout, stderr and the summary of a run."""
    corpus = make_corpus(folder / "corpus")
    output = folder / "run"
    capfd.readouterr()
    main(["train", str(CONFIG), *overrides(corpus, trainer__output_dir=str(output), **settings)])
    printed = capfd.readouterr()
    return printed.out, printed.err, json.loads((output / "summary.json").read_text())


def test_a_recipe_that_pays_nowhere_is_named_in_the_first_and_the_last_line_and_in_no_title(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lowprec.conversion.decide.slowdown_reason", lambda *_: SLOW)
    out, err, summary = train(tmp_path, capfd, trainer__max_steps=2)
    first = next(line for line in err.splitlines() if not line.startswith("Failed to load"))
    assert f"fp8_blockwise runs in none of the 8 linear layers: it {WARNING}" in first
    last = out.splitlines()[-1]
    assert last.startswith("fp8_blockwise runs in none of the 8 linear layers: it ")
    assert out.splitlines()[0].startswith("high precision: 2 steps in ")
    assert out.count("fp8_blockwise") == last.count("fp8_blockwise")
    assert err.count("0 of 8 linear layers converted") == 1
    assert (summary["recipe"], summary["asked_recipe"]) == (None, "fp8_blockwise")
    assert summary["ran"] == {"weights": {"high precision": 1.0}, "flops": {"high precision": 1.0}}
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["recipe"], len(plan["warnings"])) == ("fp8_blockwise", 1)


def test_a_plan_has_its_warning_at_both_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowprec.conversion.decide.slowdown_reason", lambda *_: SLOW)
    main(["plan", str(CONFIG)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1]
    assert "precision.skip_slow: false" in lines[0]
    main(["plan", str(CONFIG), "precision.schedule=[{until: 50%, recipe: none}, {until: 100%}]"])
    assert capsys.readouterr().out.splitlines()[-1] == lines[-1]  # of a later phase


def test_each_step_counts_with_the_recipe_that_it_ran_in(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    phases = [{"until": "1 steps", "recipe": "none"}, {"until": "3 steps", "recipe": "mxfp8"}, {"until": "100%"}]
    out, _, summary = train(tmp_path, capfd, precision__schedule=phases, trainer__max_steps=4, trainer__save_steps=2)
    assert (summary["recipe"], summary["asked_recipe"]) == ("fp8_blockwise", "fp8_blockwise")
    converted = summary["plan"]["converted_weights"]
    weights = {"high precision": 1 - 0.75 * converted, "mxfp8": 0.5 * converted, "fp8_blockwise": 0.25 * converted}
    assert summary["ran"]["weights"] == pytest.approx(weights)
    title = f"mxfp8 in {0.5 * converted:.1%}, fp8_blockwise in {0.25 * converted:.1%} of the linear weights: 4 steps in "
    assert out.splitlines()[0].startswith(title)
    # A resumed run counts the steps before it.
    checkpoint = tmp_path / "run" / "checkpoint-2"
    main(
        [
            "train",
            str(CONFIG),
            *overrides(
                tmp_path / "corpus",
                precision__schedule=phases,
                trainer__max_steps=4,
                trainer__output_dir=str(tmp_path / "again"),
                trainer__resume_from_checkpoint=str(checkpoint),
            ),
        ]
    )
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["ran"] == summary["ran"]
