"""Tests that need two CUDA devices: ranks that talk through NCCL, under FSDP2 and DDP, are killed, resume, and equal one device alone."""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowprec.recipe.state import is_state
from lowprec.training.checkpoint.files import checkpoints, step_of
from lowprec.training.checkpoint.manifest import damage, has_manifest, write_manifest
from tests.gpu.killed_runs import FSDP2, Case, check_ends_again, check_equal, processes, records, start, start_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

LAUNCHED = ("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp2.yaml")
SHARDED = "trainer.fsdp_config={version: 2, reshard_after_forward: true, state_dict_type: SHARDED_STATE_DICT}"
HALF = "trainer.per_device_train_batch_size=4"
CASES = {
    "launched": Case(("precision.recipe=fp8_blockwise", HALF), LAUNCHED),
    "fsdp-fp16": Case(("precision.recipe=fp16", *FSDP2, HALF), processes(2)),
    "sharded": Case(("precision.recipe=mxfp4_aws", "trainer.fsdp=true", SHARDED, HALF), processes(2)),
    "ddp": Case(("precision.recipe=fp8_delayed", "optimizer.moments=8bit", HALF), processes(2)),
    "offloaded": Case(
        ("precision={recipe: fp8_blockwise, guard: {snapshot_every: 4, warmup: 4, window: 8}}", HALF),
        (*LAUNCHED, "--fsdp_offload_params", "true"),
    ),
    "weights": Case(("precision.recipe=mxfp4_aws", "optimizer={weights: bf16, moments: 8bit}", *FSDP2, HALF), processes(2)),
    "loop-fp16": Case(("fp16",), processes(2), loop=True),
    "loop-bf16": Case(("bf16",), processes(2), loop=True),
}
ALONE = {
    "launched": Case(("precision.recipe=fp8_blockwise",)),
    "fsdp-fp16": Case(("precision.recipe=fp16",)),
    "sharded": Case(("precision.recipe=mxfp4_aws",)),
    "ddp": Case(("precision.recipe=fp8_delayed", "optimizer.moments=8bit")),
    "offloaded": Case(("precision.recipe=fp8_blockwise",)),
}
"""Runs of one process on one GPU, with the same rows in every step as those of `CASES`."""


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    names = {item.callspec.params["name"] for item in request.session.items if "runs" in getattr(item, "fixturenames", ())}
    with start_all({name: CASES[name] for name in CASES if name in names}, tmp_path_factory) as futures:
        yield futures


@pytest.fixture(scope="module")
def alone(runs: dict[str, Future], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """Yield the future of each run of `ALONE`: its folder and its output. The runs share the GPUs side by side."""
    with ThreadPoolExecutor(len(ALONE)) as pool:
        folders = {name: tmp_path_factory.mktemp("alone") / name for name in ALONE if name in runs}
        yield {name: pool.submit(lambda name=name: (folders[name], start(ALONE[name], folders[name]))) for name in folders}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_resumes_bit_for_bit(runs: dict[str, Future], name: str):
    whole, resumed = runs[name].result()
    check_equal(CASES[name], whole, resumed)
    if CASES[name].loop:
        check_equal(CASES[name], whole, resumed, "metrics-1.jsonl")


@pytest.mark.parametrize("name", ["sharded"])
def test_an_end_that_a_kill_cut_short_is_done_again(runs: dict[str, Future], name: str):
    check_ends_again(CASES[name], runs[name].result()[1])


class Program:
    """An object whose pickle makes the folder `marker` when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", ["sharded"])
def test_code_in_a_sharded_checkpoint_is_not_executed(runs: dict[str, Future], name: str, tmp_path: Path):
    folder = shutil.copytree(runs[name].result()[0], tmp_path / "resumed")
    for checkpoint in checkpoints(folder):
        (checkpoint / "pytorch_model_fsdp_0" / ".metadata").write_bytes(pickle.dumps(Program(tmp_path / "executed")))
        write_manifest(checkpoint, step_of(checkpoint))
    result = start(CASES[name], folder, "resume")
    assert result.returncode != 0
    assert ".metadata: holds posix.mkdir, which is code, not data" in result.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["loop-fp16", "loop-bf16"])
def test_ranks_decide_alike(runs: dict[str, Future], name: str):
    """The ranks also agree about an overflow that is in one rank's part of a gradient."""
    whole, _ = runs[name].result()
    keys = ("step", "loss_scale", "skipped_steps", "phase", "guard_recoveries", "guard_raised_layers")
    first, second = (
        [[record.get(key) for key in keys] for record in records(whole, file)] for file in ("metrics.jsonl", "metrics-1.jsonl")
    )
    assert first == second
    losses = [[record["loss"] for record in records(whole, file)] for file in ("metrics.jsonl", "metrics-1.jsonl")]
    assert losses[0] != losses[1]  # the ranks train on different rows


@pytest.mark.parametrize("name", ALONE)
def test_two_train_as_one_on_their_rows(runs: dict[str, Future], alone: dict[str, Future], name: str):
    """The runs agree up to roundings: ranks sum their gradients, FSDP2 gathers 16-bit weights, delayed scales use each rank's own rows."""
    folder, result = alone[name].result()
    assert result.returncode == 0, result.stderr[-4000:]
    assert ("one process trains on one GPU of" in result.stderr) == (torch.cuda.device_count() > 1)
    whole, _ = runs[name].result()
    two, one = ([record["loss"] for record in records(found)] for found in (whole, folder))
    assert len(one) == len(two) == 12
    print(name, [round(a / b - 1, 5) for a, b in zip(two, one, strict=True)])
    assert two[0] == pytest.approx(one[0], rel=5e-4)
    assert two == pytest.approx(one, rel=5e-3)
    first, second = (json.loads((found / "summary.json").read_text()) for found in (whole, folder))
    assert first["val_loss"] == pytest.approx(second["val_loss"], rel=2e-2)


@pytest.mark.parametrize("name", ALONE)
def test_the_finished_model_is_whole(runs: dict[str, Future], name: str):
    """The model has the weights of all ranks under their usual names, without training state, for every kind of checkpoint.

    The checkpoints, and the model, agree with their manifests."""
    whole, resumed = runs[name].result()
    for folder in (*checkpoints(whole), *checkpoints(resumed), whole / "model"):
        assert has_manifest(folder)
        assert damage(folder) is None
    weights, again = (load_file(folder / "model" / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert weights["model.layers.0.mlp.up_proj.weight"].shape == (512, 256)
    assert not [key for key in weights if is_state(key)]
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    assert set(model.state_dict()) - set(weights) <= {"lm_head.weight"}
