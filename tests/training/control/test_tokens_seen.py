"""The tokens that a run trains on are counted, and phases in tokens end by the count."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from lowprec import LowPrecisionCallback, UserError
from lowprec.training.control.controller import PrecisionController
from lowprec.training.control.tokens_seen import TokensSeen, compare_first_pass, count_tokens
from tests.builders import counting, small_trainer, tiny_llama
from tests.processes import run_ranks


def schedule(tokens: int) -> dict[str, Any]:
    return {"schedule": [{"until": f"{tokens} tokens", "recipe": "bf16"}, {"recipe": "mxfp8"}]}


class Phases(TrainerCallback):
    """A callback that notes the phase of each step, and the tokens that the Trainer has counted before it."""

    def __init__(self, callback: LowPrecisionCallback) -> None:
        self.callback = callback
        self.seen: list[tuple[int, int]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append((self.callback.controller.phase, self.callback.controller.tokens_seen.total or 0))


def phases(
    folder: Path, tokens: int, declared: int | None = None, trainer: type[Trainer] = Trainer, **arguments: Any
) -> list[tuple[int, int]]:
    """Train, check that each step's phase is the one of the tokens before it, and return the phases and tokens."""
    callback = LowPrecisionCallback(schedule(tokens), tokens=declared)
    notes = Phases(callback)
    made = small_trainer(folder, callback, notes, include_num_input_tokens_seen="all", **arguments)
    made.__class__ = trainer
    made.train()
    assert all(phase == (seen >= tokens) for phase, seen in notes.seen)
    assert callback.controller.tokens_seen.total == made.state.num_input_tokens_seen
    return notes.seen


@pytest.mark.parametrize("declared", [None, 128, 4096, 7])
def test_a_phase_ends_when_its_tokens_have_been_seen(declared: int | None, tmp_path: Path):
    """A pass has 4 x 32 tokens, whatever is declared."""
    seen = phases(tmp_path, 512, declared, max_steps=6)
    assert seen == [(0, 0), (0, 128), (0, 256), (0, 384), (1, 512), (1, 640)]


def test_accumulation_and_a_last_batch_that_is_smaller(tmp_path: Path):
    """10 rows are batches of 4, 4 and 2 rows: two steps an epoch."""
    seen = phases(tmp_path, 600, 128, data=counting(10), max_steps=5, gradient_accumulation_steps=2)
    assert seen == [(0, 0), (0, 256), (0, 320), (0, 576), (1, 640)]


class ShortOfMemory(Trainer):
    """A Trainer that has memory for two rows."""

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            model(**inputs)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(model, inputs, *args)


def test_a_batch_size_that_the_trainer_has_halved(tmp_path: Path):
    seen = phases(tmp_path, 192, 128, ShortOfMemory, auto_find_batch_size=True, max_steps=5)
    assert seen == [(0, 0), (0, 64), (0, 128), (1, 192), (1, 256)]


def test_a_resumed_run_goes_on_counting(tmp_path: Path):
    saves: dict[str, Any] = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    callback = LowPrecisionCallback(schedule(384))
    notes = Phases(callback)
    small_trainer(tmp_path, callback, notes, **saves).train(resume_from_checkpoint=None)
    again = LowPrecisionCallback(schedule(384), tokens=1)
    later = Phases(again)
    small_trainer(tmp_path, again, later, **saves).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert later.seen == notes.seen[2:] == [(0, 256), (1, 384), (1, 512)]


def test_a_checkpoint_without_the_count():
    """It was written by a run without phases in tokens."""
    controller = PrecisionController(schedule(512), tokens=16)
    model = tiny_llama()
    controller.convert(model)
    controller.start(model, torch.optim.AdamW(model.parameters()), step=3, tokens_per_step=128)
    assert controller.tokens_seen.total == 384
    controller.forget()
    with pytest.raises(UserError, match="the checkpoint does not say how many tokens its steps had"):
        controller.start(model, torch.optim.AdamW(model.parameters()), step=3)


def test_what_counts():
    ids, floats = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, 4)
    model = nn.Identity()
    assert count_tokens(model, (), {"attention_mask": torch.ones(1, 1), "input_ids": ids}) == 16
    assert count_tokens(model, (), {"input_ids": None, "inputs_embeds": floats}) == 16
    assert count_tokens(model, (floats,), {}) == 16
    assert count_tokens(model, (ids[0],), {}) == 8
    assert count_tokens(model, (), {"labels": None}) == 0
    seen = TokensSeen()
    seen.begin(0, None)
    seen.watch(model)
    seen.begin_step()
    model(ids)
    model.eval()(ids)
    with torch.no_grad():
        model.train()(ids)
    seen.end_step()
    seen.detach()
    model(ids)
    seen.end_step()
    assert (seen.total, seen.take_first(), seen.take_first()) == (16, 16, None)


@pytest.mark.parametrize(
    "declared, seen, warns", [(128, 128, False), (128, 65, False), (128, 64, True), (128, 256, True), (None, 5, False)]
)
def test_a_wrong_number_is_one_line(declared: int | None, seen: int, warns: bool, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="lowprec"):
        compare_first_pass(seen, declared, lambda tokens: "")
    assert [f"tokens={declared} was declared, but the first pass has {seen}" in record.message for record in caplog.records] == [
        True
    ] * warns


def test_another_plan_is_one_line(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="lowprec"):
        compare_first_pass(90, None, lambda tokens: "all" if tokens is None else "none")
    (record,) = caplog.records
    assert "with tokens=90 it is: none" in record.message


def test_ranks_with_batches_of_their_own_agree(tmp_path: Path):
    """Ranks see 32 and 64 tokens a step. All end the phase after the step in which 200 are reached together."""
    run_ranks(RANKS, tmp_path)


RANKS = """
import torch, torch.distributed as dist
from lowprec.training.control.controller import PrecisionController
from tests.builders import tiny_llama

dist.init_process_group("gloo")
model = tiny_llama()
controller = PrecisionController({"schedule": [{"until": "200 tokens", "recipe": "bf16"}, {"recipe": "mxfp8"}]})
controller.convert(model)
controller.start(model, torch.optim.AdamW(model.parameters()))
seen = []
for step in range(4):
    controller.before_step(step)
    seen.append(controller.phase)
    model(input_ids=torch.zeros(1 + dist.get_rank(), 32, dtype=torch.int64))
    controller.after_step(step + 1)
assert seen == [0, 0, 0, 1], seen
assert controller.state_dict()["tokens_seen"] == 4 * 96
dist.destroy_process_group()
"""
