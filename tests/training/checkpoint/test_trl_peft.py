"""LowPrecisionCallback in TRL's SFTTrainer, and in the plain Trainer with a PEFT model: their features work as without the callback."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from lowprec import LowPrecisionCallback, convert, revert
from lowprec.nn import LowPrecisionLinear
from lowprec.recipe.state import is_state
from lowprec.training.checkpoint import files as checkpoint_files
from lowprec.training.checkpoint import saving
from lowprec.training.checkpoint.manifest import MANIFEST
from lowprec.training.data.tokenizer import END, byte_tokenizer
from tests.builders import tiny_llama

TEXTS = [f"{number}: " + "the quick brown fox jumps over the lazy dog. " * 2 for number in range(32)]
LORA = peft.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
SETTINGS: dict[str, Any] = {
    "max_steps": 8,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
}


class Generating(TrainerCallback):
    """A callback that continues a text at every evaluation, to see what the model has learnt."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        prompt = torch.tensor([list(b"the quick brown fox ")])
        was_training = model.training
        model.eval()
        self.made.append(model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False))
        model.train(was_training)


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token=END, bos_token=END, pad_token=END)


def llama() -> LlamaForCausalLM:
    return tiny_llama(vocab_size=257, bos_token_id=256, eos_token_id=256, use_cache=True)


def lora_model() -> Any:
    model = llama()
    torch.manual_seed(1)
    return peft.get_peft_model(model, LORA)


def sft(folder: Path, *callbacks: TrainerCallback, precision: Any = "fp8_blockwise", lora: Any = None, **settings: Any) -> SFTTrainer:
    data = Dataset.from_dict({"text": TEXTS})
    args = SFTConfig(output_dir=str(folder), max_length=64, **{**SETTINGS, **settings})
    own = [] if precision is None else [LowPrecisionCallback(precision)]
    return SFTTrainer(
        llama(),
        args,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer(),
        callbacks=[*own, *callbacks],
        peft_config=lora,
    )


def plain(folder: Path, *callbacks: TrainerCallback, precision: Any = "fp8_blockwise", **settings: Any) -> Trainer:
    rows: Any = [{"input_ids": row, "labels": row} for row in (list(text.encode())[:64] for text in TEXTS)]
    args = TrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings})
    return Trainer(lora_model(), args, train_dataset=rows, eval_dataset=rows[:4], callbacks=[LowPrecisionCallback(precision), *callbacks])


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return logged(trainer)


def logged(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def converted(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LowPrecisionLinear)]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    model.eval()
    return model(input_ids=torch.tensor([list(TEXTS[7].encode())[:48]])).logits


EVERYTHING: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "max_steps": 9,
}


def check_everything(trainer: Trainer, generating: Generating, folder: Path) -> None:
    """Check a run with all features of `EVERYTHING`."""
    found = losses(trainer)
    assert len(found) == 9
    assert found[-1] < found[0] - 0.5
    evaluations = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert evaluations == sorted(evaluations, reverse=True)
    assert [made.shape for made in generating.made] == [(1, 25)] * 3
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]
    assert len(converted(trainer.model)) == 14
    plan = json.loads((folder / "plan.json").read_text())
    assert [layer["name"] for layer in plan["layers"] if layer["converted"]] == converted(trainer.model)


def test_supervised_fine_tuning(tmp_path: Path):
    generating = Generating()
    trainer = sft(tmp_path, generating, EarlyStoppingCallback(2), **EVERYTHING)
    check_everything(trainer, generating, tmp_path)
    low = logits(trainer.model)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-9")
    assert converted(loaded) == []
    convert(loaded, "fp8_blockwise")
    assert torch.equal(logits(loaded), low)
    assert revert(loaded) == revert(trainer.model) == 14
    assert not torch.equal(logits(loaded), low)
    assert torch.equal(logits(loaded), logits(trainer.model))


@pytest.mark.parametrize("build", [lambda *given, **settings: sft(*given, lora=LORA, **settings), plain], ids=["SFTTrainer", "Trainer"])
def test_adapters(tmp_path: Path, build: Any):
    generating = Generating()
    trainer = build(tmp_path, generating, EarlyStoppingCallback(2), **EVERYTHING)
    assert all(name.endswith(".base_layer") for name in converted(trainer.model))
    check_everything(trainer, generating, tmp_path)
    assert not (tmp_path / "checkpoint-9" / "model.safetensors").exists()
    trained = trainer.model.get_base_model().state_dict()
    for name, value in llama().state_dict().items():  # the base weights have not changed
        own = name if name in trained else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(trained[own], value), name
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-9")
    convert(loaded, "fp8_blockwise")
    assert torch.equal(logits(loaded), logits(trainer.model))


def test_early_stopping(tmp_path: Path):
    """With a learning rate of 0 the loss does not fall, so the second evaluation stops the run."""
    settings = EVERYTHING | {"eval_steps": 1, "save_steps": 1, "learning_rate": 0.0, "save_total_limit": 1}
    trainer = sft(tmp_path, EarlyStoppingCallback(1), **settings)
    trainer.train()
    assert trainer.state.global_step == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]  # the best checkpoint


def test_checkpointing_changes_nothing(tmp_path: Path):
    kept = losses(sft(tmp_path, max_steps=3))
    assert losses(sft(tmp_path, max_steps=3, gradient_checkpointing=True)) == kept
    assert losses(sft(tmp_path, max_steps=3, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})) == kept


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path):
    """The order of fp32 sums changes gradients by about 1e-6. Adam divides each by its own size, also those near zero."""
    whole = losses(sft(tmp_path, precision="fp32", max_steps=3))
    halves = losses(sft(tmp_path, precision="fp32", max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    assert halves == pytest.approx(whole, rel=1e-4)


def test_fp32_trains_as_without_the_callback(tmp_path: Path):
    assert losses(sft(tmp_path, precision="fp32", max_steps=3)) == pytest.approx(
        losses(sft(tmp_path, precision=None, max_steps=3)), rel=1e-5
    )


SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}


def assert_resumed(first: Trainer, again: Trainer, step: int) -> None:
    """Check that `again`, which resumed after `step`, is the same run as `first`, bit for bit."""
    assert logged(again)[step:] == logged(first)[step:]
    buffers = dict(first.model.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in again.model.named_buffers())


@pytest.mark.parametrize("precision", ["fp8_delayed", "mxfp4_quartet"])
@pytest.mark.parametrize("place", ["here", "elsewhere", "renamed"])
def test_a_resumed_run_of_adapters_is_the_same_run(precision: str, place: str, tmp_path: Path):
    """PEFT's checkpoints lack the buffers of the layers beneath; recipe state lies beside the adapters."""
    first = plain(tmp_path, precision=precision, **SAVES)
    first.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / "lowprec_state.safetensors").is_file()
    if place == "renamed":
        checkpoint = checkpoint.rename(tmp_path / "kept")
    again = plain(tmp_path if place == "here" else tmp_path / "other", precision=precision, **SAVES)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_resumed(first, again, 3)


class Killed(BaseException):
    """An exception that stands for a kill."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_the_end_of_a_checkpoint_of_adapters(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint that is written in place is complete once the Trainer's state is written. Recipe state is written before that."""
    monkeypatch.setattr(saving, "_saves_as_known", lambda trainer: False)
    whole = plain(tmp_path / "whole", precision="fp8_delayed", **SAVES)
    whole.train()
    write = TrainerState.save_to_json

    def killed(self: TrainerState, path: str) -> None:
        if when == "after":
            write(self, path)
        raise Killed

    trainer = plain(tmp_path, precision="fp8_delayed", **SAVES)
    monkeypatch.setattr(TrainerState, "save_to_json", killed)
    with pytest.raises(Killed):
        trainer.train()
    monkeypatch.setattr(TrainerState, "save_to_json", write)
    assert checkpoint_files.is_whole(tmp_path / "checkpoint-3") is (when == "after")
    if when == "after":
        again = plain(tmp_path, precision="fp8_delayed", **SAVES)
        again.train(resume_from_checkpoint=True)
        assert_resumed(whole, again, 3)


def test_adapters_go_back_to_a_checkpoint_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The run goes back to it although it has written newer ones."""
    saves = SAVES | {"save_steps": 1}
    plain(tmp_path / "first", precision="fp8_delayed", **saves).train()
    guard = {"data": "replay", "warmup": 2, "window": 8}
    again = plain(tmp_path / "second", precision={"recipe": "fp8_delayed", "guard": guard}, **saves)
    callback = next(each for each in again.callback_handler.callbacks if isinstance(each, LowPrecisionCallback))
    weight = next(parameter for name, parameter in again.model.named_parameters() if "up_proj.lora_B" in name)
    breaks = iter([False] * 2 + [True] + [False] * 9)
    weight.register_hook(lambda gradient: gradient * torch.nan if next(breaks) else gradient)
    callback.train(again, str(tmp_path / "first" / "checkpoint-3"))
    assert callback.controller.recoveries == 1
    assert (tmp_path / "second" / "checkpoint-4").is_dir()
    assert again.state.global_step == 6
    assert not [record for record in caplog.records if "begin anew" in record.message]


def test_adapters_of_a_finished_run_are_saved_alone(tmp_path: Path):
    trainer = plain(tmp_path, precision="fp8_delayed", **SAVES)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / "lowprec_state.safetensors").exists()
    merged = copy.deepcopy(trainer.model).merge_and_unload()
    assert not any(map(is_state, merged.state_dict()))
    merged.save_pretrained(tmp_path / "merged")
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) <= set(llama().state_dict())
    trainer.model.train()
    trainer.model(input_ids=torch.tensor([list(TEXTS[0].encode())]))
    assert any(map(is_state, trainer.model.state_dict()))
    assert any(map(is_state, trainer.model.get_base_model().state_dict()))


def test_adapters_without_recipe_state_resume_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    saves = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    plain(tmp_path, precision="fp8_delayed", **saves).train()
    for name in ("lowprec_state.safetensors", MANIFEST):  # as a program without the callback saves them
        (tmp_path / "checkpoint-3" / name).unlink()
    plain(tmp_path, precision="fp8_delayed", **saves).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert any("begin anew" in record.message for record in caplog.records)
