"""Runs that are killed and resume, and the same runs without an interruption: tests of resuming on GPUs compare the two.

A resumed run equals an uninterrupted one bit for bit, since both use deterministic kernels (`trainer.full_determinism`, which is
torch.use_deterministic_algorithms). Without them, the backward of attention sums in an order that differs from run to run.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STEPS, SAVED, KILLED, OVERFLOWS = 12, 5, 8, 4
"""A fp16 loop has a gradient in step OVERFLOWS that is infinite only in the last rank's part of one weight."""
SCALING = {"init_scale": 1024, "growth_interval": 3}
"""The scale grows in the run, and the checkpoint after step 5 holds the number of steps since it last grew."""

# `lowprec`, which kills itself in step KILLED + 1 on request: a kill from outside would come too late or too early, depending on the GPU.
_COMMAND = """
import os, signal, sys
from transformers import Trainer
from lowprec.cli.main import main

killed, *arguments = sys.argv[1:]
if killed != "never":
    step = Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == int(killed):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    Trainer.training_step = training_step
main(arguments)
"""

_LOOP = """
import json, os, signal, sys
from pathlib import Path
import torch
from accelerate import Accelerator, DataLoaderConfiguration, FullyShardedDataParallelPlugin, skip_first_batches
from torch.utils.data import DataLoader
from tests.builders import tiny_llama
from lowprec.training.accelerate import controller, prepare
from lowprec.training.optim.adamw import OptimizerConfig, build, prepare_weights

killed, folder, mixed_precision = sys.argv[1:]
folder, steps, saved = Path(folder), STEPS, SAVED
torch.use_deterministic_algorithms(True)
accelerator = Accelerator(
    mixed_precision=mixed_precision,
    fsdp_plugin=FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    ),
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
)
rank, ranks = accelerator.process_index, accelerator.num_processes
model = tiny_llama(vocab_size=256, hidden_size=256, intermediate_size=512, num_attention_heads=4).to(accelerator.device)
# Without mixed precision the weights are bf16.
kept = OptimizerConfig(weights="bf16", moments="8bit") if mixed_precision == "no" else OptimizerConfig()
prepare_weights(model, kept)
optimizer = build(kept, model.parameters(), lr=1e-3)
rows = torch.randint(0, 256, (64, 1), generator=torch.Generator().manual_seed(1)) + torch.arange(128) % 256
loader = DataLoader(list(rows % 256), batch_size=4 // ranks, shuffle=True)
rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
precision = {
    "schedule": [
        {"until": "25%", "recipe": "bf16"},
        {"until": f"{7 * 4 * 128} tokens", "recipe": "fp8_delayed"},  # 7 steps, over all ranks
        {"recipe": "mxfp4_aws"},
    ],
    "skip_slow": False,
    "guard": {"snapshot_every": 4, "warmup": 4, "window": 8},
    "loss_scaling": SCALING,
}
model, optimizer, loader, rates = prepare(
    accelerator, model, optimizer, loader, rates, precision=precision, steps=steps, directory=folder
)
assert accelerator.is_fsdp2 and type(model.model.layers[0].mlp.up_proj.weight).__name__ == "DTensor"
first = 0
if killed == "resume":
    accelerator.load_state(str(folder / "checkpoint"))
    first = saved
    loader = skip_first_batches(loader, first)
for step, batch in enumerate(loader, first + 1):
    if killed == str(step - 1):
        os.kill(os.getpid(), signal.SIGKILL)
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    if step == OVERFLOWS and rank == ranks - 1 and mixed_precision == "fp16":
        model.model.layers[1].mlp.up_proj.weight.grad.to_local()[0, 0] = torch.inf
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    rates.step()
    optimizer.zero_grad()
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    record = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "rate": float(rates.get_last_lr()[0])}
    record |= controller(accelerator).scalars()
    with open(folder / ("metrics.jsonl" if rank == 0 else f"metrics-{rank}.jsonl"), "a") as file:
        file.write(json.dumps(record) + "\\n")
    if step == saved:
        accelerator.save_state(str(folder / "checkpoint"))
    if step == steps:
        break
assert controller(accelerator).tokens_seen.total == steps * 4 * 128
assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16 if mixed_precision == "no" else torch.float32}
weights = [parameter.full_tensor().double().sum().item() for parameter in model.parameters()]
if rank == 0:
    (folder / "result.json").write_text(json.dumps({"weights": weights}))
torch.distributed.destroy_process_group()
"""


def processes(number: int) -> tuple[str, ...]:
    return "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)


FSDP2 = ("trainer.fsdp=true", "trainer.fsdp_config={version: 2, reshard_after_forward: true}")


@dataclass(frozen=True)
class Case:
    """A run by `launcher`: `lowprec train` with the overrides `arguments`, or the loop above with the mixed precision `arguments`."""

    arguments: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    loop: bool = False

    @property
    def scaled(self) -> bool:
        return any("fp16" in argument for argument in self.arguments)


@contextmanager
def start_all(cases: dict[str, Case], folders: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """Yield the futures of each run's folders (`whole_and_resumed`). The runs share the GPUs side by side, which changes no bit."""
    with ThreadPoolExecutor(2 * len(cases)) as pool:
        yield {name: pool.submit(whole_and_resumed, case, folders.mktemp(name), pool) for name, case in cases.items()}


def whole_and_resumed(case: Case, folder: Path, pool: ThreadPoolExecutor) -> tuple[Path, Path]:
    """Return the folders of an uninterrupted run and of one that is killed and resumes."""
    whole = pool.submit(start, case, folder / "whole", "never")
    killed = start(case, folder / "resumed", str(KILLED))
    assert killed.returncode != 0
    assert (folder / "resumed" / "metrics.jsonl").exists(), killed.stderr[-4000:]
    assert [record["step"] for record in records(folder / "resumed")] == list(range(1, KILLED + 1)), killed.stderr[-4000:]
    resumed = start(case, folder / "resumed", "resume")
    for result in (whole.result(), resumed):
        assert result.returncode == 0, result.stderr[-4000:]
    return folder / "whole", folder / "resumed"


def start(case: Case, folder: Path, killed: str = "never") -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    script = folder.parent / f"{folder.name}-{killed}.py"
    if case.loop:
        values = {"STEPS": STEPS, "SAVED": SAVED, "SCALING": SCALING, "OVERFLOWS": OVERFLOWS}
        script.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()) + _LOOP)
        arguments = [killed, str(folder), *case.arguments]
    else:
        script.write_text(_COMMAND)
        arguments = ["never" if killed == "resume" else killed, "train", "configs/llama-tiny-cpu.yaml", *_overrides(case, folder)]
        arguments += ["trainer.resume_from_checkpoint=true"] if killed == "resume" else []
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # cuBLAS needs this before its first deterministic product; every run has it, so that all use the same algorithms.
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(script.with_suffix(".compiled"))  # each run chooses its kernels, as on a new machine
    command = [sys.executable, *case.launcher, str(script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def _overrides(case: Case, folder: Path) -> list[str]:
    corpus = folder.parent / f"{folder.name}-corpus"
    corpus.mkdir(exist_ok=True)
    for number in range(40):
        (corpus / f"{number:02d}.txt").write_text(f"document {number}: " + "the quick brown fox jumps over the lazy dog. " * (20 + number))
    return [
        f"data.source={corpus}",
        f"data.cache_dir={folder.parent / f'{folder.name}-cache'}",
        "data.validation_fraction=0.2",
        f"trainer.output_dir={folder}",
        f"trainer.max_steps={STEPS}",
        f"trainer.save_steps={SAVED}",
        "trainer.logging_steps=1",
        "trainer.learning_rate=1e-3",
        "trainer.warmup_steps=2",
        "trainer.full_determinism=true",
        "precision.skip_slow=false",
        f"precision.loss_scaling={json.dumps(SCALING)}",
        *case.arguments,
    ]


def check_ends_again(case: Case, folder: Path) -> None:
    """Assert that a run of the command whose result is lost has the same one when it resumes, as after a kill in its end."""
    summary, weights = folder / "summary.json", folder / "model" / "model.safetensors"
    before, bits = json.loads(summary.read_text()), weights.read_bytes()
    summary.unlink()
    shutil.rmtree(weights.parent)
    result = start(case, folder, "resume")
    assert result.returncode == 0, result.stderr[-4000:]
    after = json.loads(summary.read_text())
    assert {key: after[key] for key in ("steps", "val_loss", "recoveries")} == {
        key: before[key] for key in ("steps", "val_loss", "recoveries")
    }
    assert weights.read_bytes() == bits
    again = start(case, folder, "resume")
    assert again.returncode != 0
    assert "the run is finished" in again.stderr


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    lines = (folder / name).read_text().splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


def _without_times(found: list[dict[str, Any]]) -> list[str]:
    """Return the fields that do not depend on the clock, as text, because a NaN norm equals itself only as text."""
    keys = ("step", "loss", "grad_norm", "loss_scale", "skipped_steps", "phase", "rate", "guard_recoveries")
    return [json.dumps({key: record[key] for key in keys if key in record}) for record in found]


def check_equal(case: Case, whole: Path, resumed: Path, name: str = "metrics.jsonl") -> None:
    """Assert equal losses, gradients and loss scales in every step, equal weights or validation loss in the end, and a falling loss."""
    expected, found = _without_times(records(whole, name)), _without_times(records(resumed, name))
    assert len(expected) == STEPS
    if case.loop:  # nothing cuts a loop's file back to the checkpoint
        del found[SAVED:KILLED]
    assert found == expected
    result = "result.json" if case.loop else "summary.json"
    first, second = (json.loads((folder / result).read_text()) for folder in (whole, resumed))
    assert first.get("weights") == second.get("weights")
    assert first.get("val_loss") == second.get("val_loss")
    assert first.keys() & {"weights", "val_loss"}
    losses = [record["loss"] for record in records(whole, name)]
    assert losses[-1] < losses[0] - 0.3
    scales = [record.get("loss_scale") for record in records(whole, name)]
    if case.scaled:
        assert len(set(scales)) > 2  # the scale grew in the run, so the checkpoint must hold it
    else:
        assert set(scales) == {None}
    if case.loop and case.scaled:
        skipped = [record["skipped_steps"] for record in records(whole, name)]
        assert skipped == [int(step >= OVERFLOWS) for step in range(1, STEPS + 1)]
        assert scales[OVERFLOWS - 1] == scales[OVERFLOWS - 2] / 2
