"""Accelerate can read each launch file, and the command in the file's first comment trains."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import OffloadPolicy

from lowprec.config.yaml import load_mapping
from tests import processes
from tests.builders import tiny_llama
from tests.processes import ROOT
from tests.runs import losses, make_corpus, overrides, read_metrics

FOLDER = ROOT / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


def command_of(file: Path) -> list[str]:
    """Return the words of the command in the first comment of a file."""
    comment = [line.removeprefix("#").strip() for line in file.read_text().splitlines() if line.startswith("#")]
    return next(line for line in comment if line.startswith("accelerate launch")).split()


def run(*command: str) -> None:
    result = processes.run("-m", *command, WANDB_MODE="offline", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-4000:]


def small(corpus: Path, output: Path, batch: int) -> list[str]:
    """Return the overrides that cut the shipped configuration down to a run of three steps."""
    settings: dict[str, Any] = {"trainer__max_steps": 3, "trainer__warmup_steps": 0, "trainer__output_dir": str(output)}
    return [*overrides(corpus, **settings), "precision.recipe=fp32", "device=cpu", f"trainer.per_device_train_batch_size={batch}"]


def test_two_processes_on_the_cpu_train_as_one_on_their_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In fp32, the distribution of rows among processes changes only the order of the sums of gradients."""
    corpus, two, one = make_corpus(tmp_path / "corpus"), tmp_path / "two", tmp_path / "one"
    _, _, *arguments = command_of(FOLDER / "cpu.yaml")
    run("accelerate.commands.launch", *arguments, *small(corpus, two, 4), "trainer.save_steps=2")
    run("lowprec", "train", arguments[-1], *small(corpus, one, 8))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (two, one)]
    assert [summary["steps"] for summary in summaries] == [3, 3]
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    norms = [[record["grad_norm"] for record in read_metrics(folder) if "grad_norm" in record] for folder in (two, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert len(read_metrics(two)) == len(read_metrics(one))  # only the main process writes metrics
    assert losses(two)[3] < losses(two)[1]
    # Two processes can't share the rows evenly; no row counts twice.
    assert summaries[0]["val_loss"] == pytest.approx(summaries[1]["val_loss"], rel=1e-6)
    assert summaries[0]["bits_per_byte"] == pytest.approx(summaries[1]["bits_per_byte"], rel=1e-6)
    assert summaries[0]["data"]["validation"]["examples"] % 2 == 1
    # They resume from their checkpoint, here in processes that get from the launch file what the launcher hands to its own.
    resume = f"trainer.resume_from_checkpoint={two / 'checkpoint-2'}"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = prepare_multi_gpu_env(validated(FOLDER / "cpu.yaml"))
    environment = {name: value for name, value in given.items() if name.startswith("ACCELERATE_")}
    command = ("-m", "lowprec", "train", arguments[-1], *small(corpus, tmp_path / "again", 4), resume)
    processes.run_in_ranks(*command, **environment, WANDB_MODE="offline")
    assert losses(tmp_path / "again") == {3: losses(two)[3]}
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["val_loss"] == summaries[0]["val_loss"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_comment_on_top_is_a_command_that_names_the_file_and_a_configuration(file: Path):
    command = command_of(file)
    assert command[:6] == ["accelerate", "launch", "--config_file", str(file.relative_to(ROOT)), "-m", "lowprec"]
    assert command[6] == "train"
    assert (ROOT / command[7]).is_file()


def validated(file: Path) -> Any:
    """Return the arguments that the launcher makes of a file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_every_key(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "no"
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert [key for key in load_mapping(file).get("fsdp_config", {}) if key not in known] == []
    launcher = validated(file)
    expected = {"cpu": (2, True, True, False), "one_gpu": (1, False, False, False), "fsdp2": (2, False, False, True)}
    assert (launcher.num_processes, launcher.use_cpu, launcher.multi_gpu, launcher.use_fsdp) == expected[file.stem]


def test_fsdp2_shards_each_block(monkeypatch: pytest.MonkeyPatch):
    """The launcher sets the processes' environment, of which Accelerate makes the plugin."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, value in prepare_multi_gpu_env(validated(FOLDER / "fsdp2.yaml")).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_offload == OffloadPolicy()  # no offloading
    model = tiny_llama(num_hidden_layers=3)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert wraps is not None
    assert [name for name, module in model.named_modules() if wraps(module)] == ["model.layers.0", "model.layers.1", "model.layers.2"]
