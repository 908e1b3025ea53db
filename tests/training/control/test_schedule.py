"""The schedule: the phase of each step, and the changes when a phase begins."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import TrainerCallback

from lowprec import LowPrecisionCallback, UserError
from lowprec.nn import LowPrecisionLinear
from lowprec.training.control.precision import parse_precision
from lowprec.training.control.schedule import Until, make_schedule
from tests.builders import losses, small_trainer, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning"),
]

THREE = [{"until": "25%", "recipe": "bf16"}, {"until": "75%"}, {"until": "100%", "recipe": {"base": "mxfp4_aws", "fprop": "bf16"}}]


def ends(untils: list[str], total_steps: int | None = None, tokens_per_step: int | None = None) -> tuple[int, ...]:
    return make_schedule(parse_precision({"schedule": [{"until": until} for until in untils]}).schedule, total_steps, tokens_per_step).ends


@pytest.mark.parametrize(
    "text, value, unit",
    [
        ("5%", 0.05, "share"),
        ("200 steps", 200, "steps"),
        ("1 step", 1, "steps"),
        ("1B tokens", 1e9, "tokens"),
        ("2.5k steps", 2500, "steps"),
    ],
)
def test_a_moment_is_read_as_it_is_written(text: str, value: float, unit: str):
    until = Until.parse(text)
    assert (until.value, until.unit) == (pytest.approx(value, rel=1e-12), unit)


def test_phases_end_where_they_say():
    assert ends(["5%", "90%", "100%"], 200) == (10, 180, 200)
    assert ends(["20 steps", "50%", "100%"], 200) == (20, 100, 200)
    assert ends(["1M tokens", "100%"], 200, tokens_per_step=65536) == (16, 200)
    assert ends(["20 steps", "100%"]) == (20, 2**62)  # its length is not known
    assert ends(["1B tokens", "50%", "100%"], 100) == (2**62, 50, 100)  # tokens are counted in the run
    assert ends(["10%", "100%"], 30) == (3, 30)  # not 4, by the rounding of 0.1
    assert 7 * 1e-2 * 100 > 7  # so the rounding of a share alone would end this phase a step later
    for percent in range(1, 100):
        assert ends([f"{percent}%", "100%"], 100) == (percent, 100)
    assert ends(["7%", "100%"], 100_000) == (7_000, 100_000)
    assert ends(["7.001%", "100%"], 100_000) == (7_001, 100_000)
    assert ends(["0.001%", "100%"], 1_000) == (1, 1_000)  # a begun step counts
    assert ends(["65537 tokens", "100%"], 200, tokens_per_step=65536) == (2, 200)
    schedule = make_schedule(parse_precision({"schedule": THREE}).schedule, 8)
    assert [schedule.phase(step) for step in range(9)] == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert make_schedule(parse_precision("bf16").schedule, 8).phase(5) == 0
    tokens = make_schedule(parse_precision({"schedule": [{"until": "100 tokens"}, {"until": "4 steps"}, {}]}).schedule, 8)
    assert [tokens.phase(step, 30 * step) for step in range(6)] == [0, 0, 0, 0, 2, 2]
    assert [tokens.phase(step, 60 * step) for step in range(6)] == [0, 0, 1, 1, 2, 2]


def test_a_short_run_skips_phases(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("WARNING", logger="lowprec"):
        assert ends(["100 steps", "100%"], 10) == (10, 10)
    assert "phase 2 never runs" in caplog.text
    schedule = make_schedule(parse_precision({"schedule": [{"until": "1%"}, {"until": "2%"}, {"until": "100%"}]}).schedule, 10)
    assert [schedule.phase(step) for step in range(3)] == [0, 2, 2]


@pytest.mark.parametrize(
    "untils, total_steps, message",
    [
        (["150 steps", "50%", "100%"], 200, "schedule.1.until: phases out of order: 50% is step 100, the phase before ends at step 150"),
        (["100 steps", "50%", "100%"], 200, "schedule.1.until: phases overlap: 100 steps and 50% are both step 100"),
        (["10%", "100%"], None, "schedule.0.until: 10% of how many steps"),
    ],
)
def test_errors_that_show_only_in_the_run_are_refused(untils: list[str], total_steps: int | None, message: str):
    with pytest.raises(UserError) as caught:
        ends(untils, total_steps)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "schedule, message",
    [
        ([{"until": "50%"}, {"until": "20%"}, {"until": "100%"}], "phases out of order: number 2 ends at 20%, the one before it at 50%"),
        ([{"until": "20%"}, {"until": "20%"}, {"until": "100%"}], "phases 1 and 2 overlap: both end at 20%"),
        ([{"until": "20%"}, {"until": "90%"}], "the last phase ends at 90%: say what comes after it"),
        ([{"until": "20 stpes"}, {}], "schedule.0.until: expected a share, steps or tokens"),
        ([{"until": 20}, {}], "schedule.0.until: expected a share, steps or tokens"),
        ([{"until": "120%"}], "schedule.0.until: 120% is after the end of the run"),
        ([{"untl": "20%"}, {}], "schedule.0.untl: unknown key; did you mean 'until'?"),
        (
            [{"until": "20%", "recipe": "fp8_blokwise"}, {}],
            "schedule.0.recipe: unknown recipe 'fp8_blokwise'; did you mean 'fp8_blockwise'",
        ),
    ],
)
def test_wrong_phases_are_one_line(schedule: list[dict[str, Any]], message: str):
    with pytest.raises(UserError) as caught:
        LowPrecisionCallback({"schedule": schedule})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class Recipes(TrainerCallback):
    """A callback that notes the recipe of each layer in each step's forward pass."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.note(model)

    on_pre_optimizer_step = on_substep_end

    def note(self, model: Any) -> None:
        self.seen.append({name: module.recipe.name for name, module in model.named_modules() if isinstance(module, LowPrecisionLinear)})


def test_each_phase_trains_in_its_recipe(tmp_path: Path):
    rules = [{"modules": r".*\.o_proj", "recipe": "fp8_blockwise"}, {"modules": r".*\.k_proj", "recipe": "none"}]
    callback, recipes = LowPrecisionCallback({"recipe": "mxfp4_aws", "rules": rules, "schedule": THREE}), Recipes()
    trainer = small_trainer(tmp_path, callback, recipes, max_steps=8, gradient_accumulation_steps=2)
    optimizer_state = []
    trainer.train()
    q, o = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
    healing = "mxfp4_aws(fprop=bf16)"
    assert [seen[q] for seen in recipes.seen] == ["bf16"] * 4 + ["mxfp4_aws"] * 8 + [healing] * 4
    assert {seen[o] for seen in recipes.seen} == {"fp8_blockwise"}  # rules hold in every phase
    assert not any("k_proj" in name for name in recipes.seen[0])
    state = trainer.optimizer.state[trainer.model.get_submodule(q).weight]
    optimizer_state.append(int(state["step"]))
    assert optimizer_state == [8]  # the run went through all phases
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["event"]) for event in events] == [(2, "phase"), (6, "phase")]
    assert "mxfp4_aws x 10, fp8_blockwise x 2" in events[0]["reason"]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["totals"]["recipes"] == {healing: 10, "fp8_blockwise": 2}
    assert [record["phase"] for record in trainer.state.log_history if "loss" in record] == [1, 1, 2, 2, 2, 2, 3, 3]


def test_phases_may_have_rules_of_their_own(tmp_path: Path):
    rules = [{"modules": ".*", "recipe": "mxfp8"}]
    callback, recipes = LowPrecisionCallback({"rules": rules, "schedule": [{"until": "1 step", "rules": []}, {}]}), Recipes()
    small_trainer(tmp_path, callback, recipes, max_steps=2).train()
    assert [set(seen.values()) for seen in recipes.seen] == [{"bf16", "as it is"}, {"mxfp8"}]  # only the rule converts the head


def test_a_schedule_of_one_recipe_changes_nothing(tmp_path: Path):
    """A change of phase does not change the state that recipes keep."""
    for recipe in ("mxfp4_aws", "fp8_delayed"):
        plain = small_trainer(tmp_path, LowPrecisionCallback(recipe), max_steps=6)
        plain.train()
        phases = small_trainer(tmp_path, LowPrecisionCallback({"recipe": recipe, "schedule": [{"until": "50%"}, {}]}), max_steps=6)
        phases.train()
        assert losses(phases) == losses(plain)


def test_the_state_of_all_phases_is_there_from_the_start(tmp_path: Path):
    trainer = small_trainer(tmp_path, LowPrecisionCallback({"schedule": [{"until": "50%", "recipe": "none"}, {"recipe": "fp8_delayed"}]}))
    before = [name for name, _ in trainer.model.named_buffers()]
    assert sum("amax_history" in name for name in before) == 14 * 6
    trainer.train()
    assert [name for name, _ in trainer.model.named_buffers()] == before


def test_a_phase_compiles_once(tmp_path: Path):
    """One compilation for all blocks, in each phase; none when a phase's recipe comes again."""
    model, counter = tiny_llama(), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    for block in model.model.layers:
        block.compile(backend=counter)

    class Count(TrainerCallback):
        graphs: list[int] = []  # noqa: RUF012

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.graphs.append(counter.frame_count)

    precision = {"schedule": [{"until": "25%", "recipe": "bf16"}, {"until": "75%", "recipe": "mxfp8"}, {"recipe": "bf16"}]}
    trainer = small_trainer(tmp_path, LowPrecisionCallback(precision, compiled=True), Count(), model=model, max_steps=8)
    trainer.train()
    assert Count.graphs == [1, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("text", ["1234567 tokens", "1.5B tokens", "7.25%", "12.3456789%", "123456789 steps"])
def test_the_end_of_a_phase_reads_back_the_same(text: str):
    until = Until.parse(text)
    assert Until.parse(str(until)) == until
