"""`lowprec train`: the files of a run, resuming, and refusals."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.processes import ROOT, lowprec, run, start
from tests.runs import CONFIG, SMALL, losses, make_corpus, overrides, read_metrics, wandb_history


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


def _train(corpus: Path, *, cwd: Path = ROOT, **settings: object) -> subprocess.CompletedProcess[str]:
    return lowprec("train", str(CONFIG), *overrides(corpus, **settings), cwd=cwd, check=True)


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Train twelve steps with checkpoints at 6 and 12, in a directory that the run chose; return the directory and the process."""
    cwd = tmp_path_factory.mktemp("cwd")
    result = _train(corpus, cwd=cwd, trainer__max_steps=12, trainer__save_steps=6)
    return cwd / "runs" / "llama-tiny-cpu" / "001", result


def test_the_files_and_output_of_a_run(finished: tuple[Path, subprocess.CompletedProcess[str]]):
    run, result = finished
    summary = json.loads((run / "summary.json").read_text())
    assert {"val_loss", "bits_per_byte", "tokens_per_second", "peak_memory_bytes", "steps", "wall_s", "recipe"} <= set(summary)
    assert summary["recipe"] == "fp8_blockwise"
    assert summary["steps"] == 12
    assert summary["peak_memory_bytes"] > 50e6
    assert 0 < summary["val_loss"] < 5.55  # ln 257 is the loss of a uniform guess
    assert summary["tokens_per_second"] == pytest.approx(12 * 4 * 64 / summary["wall_s"])
    plan = json.loads((run / "plan.json").read_text())
    assert plan["totals"]["emulated"] == 7
    assert {part["name"] for part in plan["parts"]} == {"autocast", "attention", "liger", "compile"}
    assert (run / "checkpoint-6" / "model.safetensors").is_file()
    assert (run / "checkpoint-12" / "tokenizer.json").is_file()
    assert list(losses(run)) == list(range(1, 13))
    # The output for the user: the plan, the bar with loss and tokens/s, the result.
    assert "7 of 8 linear layers converted" in result.stderr
    assert "loss=" in result.stderr
    assert "tok/s=" in result.stderr
    assert "bits per byte" in result.stdout
    assert "runs/llama-tiny-cpu/001" in result.stdout


def test_bits_per_byte_are_the_loss_over_the_text(finished: tuple[Path, subprocess.CompletedProcess[str]], corpus: Path):
    """With the byte tokenizer every predicted token is one byte, except the separators."""
    import math

    from lowprec.training.data import DataConfig, load_data

    run, _ = finished
    summary = json.loads((run / "summary.json").read_text())
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    validation = load_data(DataConfig(**data)).validation
    predicted = [label for row in range(len(validation)) for label in validation[row]["labels"][1:].tolist()]
    in_bytes = sum(label < 256 for label in predicted)
    assert in_bytes < len(predicted)
    assert summary["bits_per_byte"] == pytest.approx(summary["val_loss"] * len(predicted) / math.log(2) / in_bytes, rel=1e-9)


def test_the_validation_loss_is_the_models_own(corpus: Path, tmp_path: Path):
    """It does not depend on the training loss. The learning rate is 0, so both models stay the same."""
    found = []
    for smoothing in (0.0, 0.3):
        output = tmp_path / str(smoothing)
        settings = {"trainer__max_steps": 1, "trainer__learning_rate": 0.0, "trainer__label_smoothing_factor": smoothing}
        _train(corpus, trainer__output_dir=str(output), trainer__logging_steps=1, **settings)
        found.append((losses(output)[1], json.loads((output / "summary.json").read_text())["val_loss"]))
    (loss, validation), (smoothed, again) = found
    assert smoothed != loss
    assert again == validation


def test_the_resolved_configuration_repeats_the_run(finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path):
    run, _ = finished
    again = tmp_path / "again"
    lowprec("train", str(run / "config.yaml"), f"trainer.output_dir={again}", check=True)
    assert losses(again) == losses(run)


def test_numbers_go_up_and_no_run_is_overwritten(corpus: Path, tmp_path: Path):
    for number in ("001", "002"):
        _train(corpus, cwd=tmp_path, trainer__max_steps=1)
        assert (tmp_path / "runs" / "llama-tiny-cpu" / number / "summary.json").is_file()


def test_a_directory_with_another_run_is_refused_then_overwritten_when_told(corpus: Path, tmp_path: Path, refused: Callable[..., str]):
    output = tmp_path / "run"
    _train(corpus, trainer__max_steps=2, trainer__output_dir=str(output))
    (output / "notes.txt").write_text("mine")
    arguments = ["train", str(CONFIG), *overrides(corpus, trainer__max_steps=1, trainer__output_dir=str(output))]
    assert "holds another run" in refused(*arguments)
    assert list(losses(output)) == [1, 2]
    lowprec(*arguments, "trainer.overwrite_output_dir=true", check=True)
    assert list(losses(output)) == [1]
    assert not (output / "checkpoint-2").exists()
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision.recpie=bf16", "precision.recpie: unknown key; did you mean 'recipe'?"),
        ("trainer.max_step=1", "trainer.max_step: unknown key; did you mean 'max_steps'?"),
        ("precision.recipe=fp8_blokwise", "unknown recipe 'fp8_blokwise'; did you mean 'fp8_blockwise'?"),
        ("precision.recipe={base: bf16, fprpo: mxfp4}", "unknown key 'fprpo' in a recipe; did you mean 'fprop'?"),
        ("precision.rules=[{modules: 'q_proj', recipe: bf16}]", "rule 'q_proj' matches none of the 8 linear layers"),
        ("data.source=/nowhere/text.txt", "/nowhere/text.txt"),
        ("data.seq_len=4096", "data.seq_len: 4096 is longer than the model's 2048 positions"),
        ("device=cuda", "device: cuda was asked for, but torch sees no CUDA device"),
        ("trainer.max_steps=ten", "trainer.max_steps: input should be a valid integer"),
        ("data.seq_len=long", "data.seq_len: input should be a valid integer"),
        ("precision.strict=true", "precision.strict: model.layers.0.self_attn.q_proj would run fp8_blockwise emulated on cpu"),
        ("trainer.fp16=true", "trainer.fp16: fp16 autocast with loss scaling needs CUDA"),
        ("kernels.liger=on", "kernels.liger: on, but"),
        ("attention.mask=causal & slidng_window(3)", "lowprec: attention.mask: unknown name 'slidng_window' in"),
        ("model.preset=llama-tinny", "model.preset: unknown preset 'llama-tinny'; did you mean 'llama-tiny'?"),
        ("model.overrides.hiden_size=3", "did you mean 'hidden_size'?"),
        ("trainer.resume_from_checkpoint=true", "trainer.resume_from_checkpoint: no checkpoint in"),
        ("trainer.optim=adamm", "adamm"),
        ("max_steps", "an override is written key=value"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(override: str, message: str, corpus: Path, tmp_path: Path, refused: Callable[..., str]):
    assert message in refused("train", str(CONFIG), *overrides(corpus), override)
    assert not (tmp_path / "runs").exists()  # refused before anything was written


def test_an_empty_corpus_is_refused(tmp_path: Path, refused: Callable[..., str]):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused("train", str(CONFIG), *SMALL, f"data.source={empty}", f"data.cache_dir={tmp_path}")
    (empty / "a.txt").write_text("")
    assert "no text in" in refused("train", str(CONFIG), *SMALL, f"data.source={empty}", f"data.cache_dir={tmp_path}")


def test_killed_and_resumed_is_the_same_run_bit_for_bit(corpus: Path, finished: tuple[Path, object], tmp_path: Path):
    """A run is killed by SIGKILL after a checkpoint; the resumed run's losses equal those of an uninterrupted run."""
    whole, output = finished[0], tmp_path / "killed"
    arguments = ["train", str(CONFIG), *overrides(corpus, trainer__max_steps=12, trainer__save_steps=6, trainer__output_dir=str(output))]
    process = start("-m", "lowprec", *arguments)
    try:
        deadline = time.monotonic() + 120
        while not (output / "checkpoint-6" / "trainer_state.json").exists() or len(losses(output)) < 8:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
    assert not (output / "checkpoint-12").exists()
    lowprec(*arguments, "trainer.resume_from_checkpoint=true", check=True)
    assert losses(output) == losses(whole)
    assert len({step for step in losses(output) if step > 6}) == 6
    assert json.loads((output / "summary.json").read_text())["val_loss"] == json.loads((whole / "summary.json").read_text())["val_loss"]


def test_stopped_by_a_signal_and_resumed_as_it_says_is_the_same_run(corpus: Path, finished: tuple[Path, object], tmp_path: Path):
    """The signal comes from outside, at any place of a step."""
    whole, output = finished[0], tmp_path / "stopped"
    process = start("-m", "lowprec", "train", str(CONFIG), *overrides(corpus, trainer__max_steps=12, trainer__output_dir=str(output)))
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or len(losses(output)) < 2:
        assert process.poll() is None, "it ended before the signal"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGUSR1)
    result = process.wait()
    assert result.returncode == 138, result.stderr[-2000:]
    last = result.stderr.splitlines()[-1]
    (saved,) = output.glob("checkpoint-*")
    resume = f"{output}/config.yaml trainer.resume_from_checkpoint=true"
    step = int(saved.name.partition("-")[2])
    assert last == f"lowprec: SIGUSR1: saved {saved} after step {step}; resume by: python -m lowprec train {resume}"
    assert step < 12
    lowprec("train", *resume.split(), check=True)
    assert losses(output) == losses(whole)


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8_delayed", "mxfp4_quartet"])
def test_a_checkpoint_holds_the_state_of_a_recipe(recipe: str, corpus: Path, tmp_path: Path):
    """Draws of stochastic rounding and amax histories continue after resuming as without an interruption, bit for bit."""
    output = tmp_path / "run"
    settings = {"precision__recipe": recipe, "trainer__max_steps": 6, "trainer__save_steps": 3, "trainer__output_dir": str(output)}
    arguments = ["train", str(CONFIG), *overrides(corpus, **settings)]
    lowprec(*arguments, check=True)
    whole = losses(output)
    shutil.rmtree(output / "checkpoint-6")
    (output / "metrics.jsonl").unlink()
    lowprec(*arguments, "trainer.resume_from_checkpoint=true", check=True)
    resumed = losses(output)
    assert set(resumed) == {4, 5, 6}
    assert resumed == {step: whole[step] for step in resumed}


def test_wandb_offline_keeps_the_metrics(corpus: Path, tmp_path: Path):
    pytest.importorskip("wandb")
    output = tmp_path / "run"
    _train(corpus, trainer__max_steps=3, trainer__output_dir=str(output), trainer__report_to="wandb", trainer__run_name="tiny")
    (log,) = output.glob("wandb/offline-run-*/run-*.wandb")
    history = wandb_history(log)
    logged = {row["train/global_step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert logged == losses(output)
    assert all(row["train/tokens_per_second"] > 0 for row in history if "train/loss" in row)
    evaluated = [row["eval/bits_per_byte"] for row in history if "eval/bits_per_byte" in row]
    assert evaluated == [json.loads((output / "summary.json").read_text())["bits_per_byte"]]


# TorchInductor takes two minutes for a block's many kernels; tests/nn/test_linear.py compares its code with eager layers.
_TRACED_BLOCKS = """
from functools import partialmethod
from torch import nn
from lowprec.cli.main import main

nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
main()
"""
COMPILED = {"precision__recipe": "fp8_rowwise", "compile": "blocks", "kernels__liger": "off"}


@pytest.mark.parametrize(
    ("settings", "command"),
    [
        ({"precision__recipe": "bf16"}, ("-m", "lowprec")),
        ({"precision__recipe": "mxfp4", "attention__mask": "causal & document"}, ("-m", "lowprec")),
        ({"precision__recipe": "qat_int8dyn_int4", "data__packing": False}, ("-m", "lowprec")),
        (COMPILED, ("-c", _TRACED_BLOCKS)),
        pytest.param(COMPILED, ("-m", "lowprec"), marks=pytest.mark.slow),
        ({"data__tokenizer": "bpe", "data__vocab_size": 300, "trainer__gradient_accumulation_steps": 2}, ("-m", "lowprec")),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else {"-m": "command", "-c": "traced"}[value[0]],
)
def test_settings_train(settings: dict, command: tuple[str, str], corpus: Path, tmp_path: Path):
    output = tmp_path / "run"
    given = overrides(corpus, trainer__max_steps=8, trainer__output_dir=str(output), **settings)
    result = run(*command, "train", str(CONFIG), *given)
    assert result.returncode == 0, result.stderr[-4000:]
    by_step = losses(output)
    assert by_step[8] < by_step[1] - 0.3
    plan = json.loads((output / "plan.json").read_text())
    assert plan["totals"]["emulated"] == 7
    parts = {part["name"]: part["choice"] for part in plan["parts"]}
    assert parts["compile"] == settings.get("compile", "off")
    assert parts["attention"].startswith(settings.get("attention__mask", "causal"))
    assert read_metrics(output)[-1]["eval_loss"] == json.loads((output / "summary.json").read_text())["val_loss"]
