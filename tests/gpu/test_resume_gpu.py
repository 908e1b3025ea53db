"""What needs a CUDA device: runs that are killed and go on, under AMP and FSDP2; the guard; phases of compiled blocks.

A run that goes on equals one that nothing interrupted bit for bit, since both take deterministic kernels (`trainer.full_determinism`, which
is torch.use_deterministic_algorithms): without, the backward of attention adds up in an order that differs from run to run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lowprec.config import LossScalingConfig
from lowprec.kernels.compile import compile_blocks
from trainers import LowPrecisionCallback
from trainers.amp import Amp

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
STEPS, SAVED, KILLED = 12, 5, 8
SCALING = {"init_scale": 1024, "growth_interval": 3}
"""The scale grows in the run, and steps since it last did so are part of the checkpoint after step 5."""
LAYER = "model.layers.1.mlp.down_proj"

# `lowprec`, killed in step KILLED + 1 if it is told so: a kill from outside comes too late or too early on one GPU or another.
_COMMAND = """
import os, signal, sys
from transformers import Trainer
from trainers.cli import main

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
from transformers import LlamaConfig, LlamaForCausalLM
from trainers.accelerate import controller, prepare

killed, folder, mixed_precision = sys.argv[1:]
folder, steps, saved = Path(folder), STEPS, SAVED
torch.use_deterministic_algorithms(True)
torch.manual_seed(0)
accelerator = Accelerator(
    mixed_precision=mixed_precision,
    fsdp_plugin=FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    ),
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
)
config = LlamaConfig(vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, use_cache=False)
model = LlamaForCausalLM(config).to(accelerator.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
rows = torch.randint(0, 256, (64, 1), generator=torch.Generator().manual_seed(1)) + torch.arange(128) % 256
loader = DataLoader(list(rows % 256), batch_size=4, shuffle=True)
rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
precision = {
    "schedule": [
        {"until": "25%", "recipe": "bf16"},
        {"until": "7 steps", "recipe": "fp8_delayed"},
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
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    rates.step()
    optimizer.zero_grad()
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    record = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "rate": rates.get_last_lr()[0]}
    record |= controller(accelerator).scalars()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\\n")
    if step == saved:
        accelerator.save_state(str(folder / "checkpoint"))
    if step == steps:
        break
weights = [parameter.full_tensor().double().sum().item() for parameter in model.parameters()]
(folder / "result.json").write_text(json.dumps({"weights": weights}))
torch.distributed.destroy_process_group()
"""

TRAINED = {
    "fp16": ["precision.recipe=fp16"],
    "fp8-fp16": ["precision.recipe=fp8_blockwise", "trainer.fp16=true"],
    "bf16": ["precision.recipe=bf16"],
    "fsdp-fp16": ["precision.recipe=fp16", "fsdp"],
    "fsdp-bf16": ["precision.recipe=fp8_blockwise", "fsdp"],
    "loop-fp16": ["fp16"],
    "loop-bf16": ["bf16"],
}
"""Runs by name: overrides, with "fsdp" for the settings of that; or the mixed precision of an Accelerate loop under FSDP2."""


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """Each selected test's run, whole and resumed (`_whole_and_resumed`). They take their turns on the GPU while they start, side by side,
    which changes no bit."""
    names = [item.callspec.params["name"] for item in request.session.items if item.name.startswith("test_a_killed_run")]
    with ThreadPoolExecutor(2 * len(names)) as pool:
        yield {name: pool.submit(_whole_and_resumed, name, tmp_path_factory.mktemp(name), pool) for name in names}


def _whole_and_resumed(name: str, folder: Path, pool: ThreadPoolExecutor) -> tuple[Path, Path]:
    """The folders of a run that nothing interrupts and of one that is killed and goes on."""
    whole = pool.submit(_start, name, folder / "whole", "never")
    killed = _start(name, folder / "resumed", str(KILLED))
    assert killed.returncode != 0
    assert [record["step"] for record in _records(folder / "resumed")] == list(range(1, KILLED + 1)), killed.stderr[-4000:]
    resumed = _start(name, folder / "resumed", "resume")
    for result in (whole.result(), resumed):
        assert result.returncode == 0, result.stderr[-4000:]
    return folder / "whole", folder / "resumed"


def _start(name: str, folder: Path, killed: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    launcher = [sys.executable]
    if name.startswith(("fsdp", "loop")):
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    script = folder.parent / f"{folder.name}-{killed}.py"
    if name.startswith("loop"):
        values = {"STEPS": STEPS, "SAVED": SAVED, "SCALING": SCALING}
        script.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()) + _LOOP)
        arguments = [killed, str(folder), *TRAINED[name]]
    else:
        script.write_text(_COMMAND)
        arguments = ["never" if killed == "resume" else killed, "train", "configs/llama-tiny-cpu.yaml", *_overrides(name, folder)]
        arguments += ["trainer.resume_from_checkpoint=true"] if killed == "resume" else []
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    # Deterministic products of cuBLAS want this before the first of them; every run has it, so that all take the same algorithms.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return subprocess.run([*launcher, str(script), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=140)


def _overrides(name: str, folder: Path) -> list[str]:
    corpus = folder.parent / f"{folder.name}-corpus"
    corpus.mkdir(exist_ok=True)
    for number in range(40):
        (corpus / f"{number:02d}.txt").write_text(f"document {number}: " + "the quick brown fox jumps over the lazy dog. " * (20 + number))
    fsdp = ["trainer.fsdp=true", "trainer.fsdp_config={version: 2, reshard_after_forward: true}"]
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
        *(override for setting in TRAINED[name] for override in (fsdp if setting == "fsdp" else [setting])),
    ]


def _records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


def _told(records: list[dict[str, Any]]) -> list[str]:
    """What does not depend on the clock, as text: a norm that is NaN equals itself there."""
    keys = ("step", "loss", "grad_norm", "loss_scale", "skipped_steps", "phase", "rate", "guard_recoveries")
    return [json.dumps({key: record[key] for key in keys if key in record}) for record in records]


@pytest.mark.parametrize("name", TRAINED)
def test_a_killed_run_goes_on_bit_for_bit(runs: dict[str, Future], name: str):
    """In the Trainer by `lowprec train`, there under FSDP2, and in an Accelerate loop under FSDP2: losses, gradients, loss scales."""
    whole, resumed = runs[name].result()
    expected, records = _told(_records(whole)), _told(_records(resumed))
    assert len(expected) == STEPS
    if name.startswith("loop"):  # whose file nobody cuts back to the checkpoint
        del records[SAVED:KILLED]
    assert records == expected
    result = "result.json" if name.startswith("loop") else "summary.json"
    first, second = (json.loads((folder / result).read_text()) for folder in (whole, resumed))
    assert first.get("weights") == second.get("weights")
    assert first.get("val_loss") == second.get("val_loss")
    assert first.keys() & {"weights", "val_loss"}
    losses = [record["loss"] for record in _records(whole)]
    assert losses[-1] < losses[0] - 0.3
    scales = [record.get("loss_scale") for record in _records(whole)]
    if name.endswith("fp16"):
        assert len(set(scales)) > 2  # it grew in the run, so that a checkpoint has something to forget
    else:
        assert set(scales) == {None}


def _llama(use: str = "cuda") -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, use_cache=False, **shape)).to(use)


def _trainer(folder: Path, model: Any, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(64)[:, None] + torch.arange(128)) % 256]
    settings = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "report_to": "none", "logging_steps": 1, **settings}
    args = TrainingArguments(output_dir=str(folder), disable_tqdm=True, save_strategy="no", **settings)
    return Trainer(model, args, train_dataset=rows, callbacks=list(callbacks))  # pyright: ignore[reportArgumentType]


class NaNGradient(TrainerCallback):
    """The gradient of one layer's weight is NaN in the step after some number of steps."""

    def __init__(self, model: Any, step: int) -> None:
        self.step, self.active = step, False
        model.get_submodule(LAYER).weight.register_hook(lambda gradient: gradient * torch.nan if self.active else gradient)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.active = state.global_step == self.step


@pytest.mark.parametrize("recipe", ["fp8_blockwise", "mxfp4"])
def test_the_guard_goes_back_to_a_snapshot_in_pinned_memory(recipe: str, tmp_path: Path):
    model = _llama()
    guard = {"snapshot_every": 5, "warmup": 8, "window": 16}
    callback = LowPrecisionCallback({"recipe": recipe, "skip_slow": False, "guard": guard})
    held: list[torch.Tensor] = []

    class Look(TrainerCallback):
        """Before the run is over, and the snapshots' memory is free."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            snapshots = callback.controller._snapshots._snapshots
            held[:] = [part for snapshot in snapshots for tensor in snapshot.held().values() for part in tensor.parts]

    trainer = _trainer(tmp_path, model, callback, NaNGradient(model, 16), Look(), bf16=True, max_steps=30)
    trainer.train()
    breach, back, raised = callback.controller.events
    assert (breach["step"], breach["layers"][0]) == (17, LAYER)
    assert back["reason"].startswith("weights and optimizer of step 10")
    assert raised["layers"] == [f"{LAYER}: {recipe} -> {'bf16' if recipe == 'fp8_blockwise' else 'fp8_blockwise'}"]
    on_device = [part for part in held if part.dim()]  # AdamW counts its steps in scalars on the host
    assert len(on_device) > 3 * 20
    assert all(part.is_pinned() for part in on_device)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] + 0.3 < losses[17] < losses[0] - 1  # from the state of step 10 it learns on


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_amp_has_the_scales_of_torchs_grad_scaler(max_norm: float | None):
    """With a fused optimizer, which torch lets look for overflows itself; two gradients overflow, and growing finds the limit."""
    scaling = LossScalingConfig(init_scale=2.0**14, growth_interval=2)
    batches = torch.randint(0, 256, (12, 4, 64), generator=torch.Generator().manual_seed(1)).cuda()

    def train(own: bool) -> tuple[list[float], list[bool], torch.Tensor]:
        model = _llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        overflows = False
        model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf if overflows else gradient)
        amp = Amp("fp16", model, loss_scaling=scaling)
        torchs = torch.amp.GradScaler("cuda", init_scale=scaling.init_scale, growth_interval=scaling.growth_interval)
        scales, skipped = [], []
        for step, batch in enumerate(batches):
            overflows = step in (3, 7)
            before = [parameter.detach().clone() for parameter in model.parameters()]
            with amp.autocast():
                loss = model(input_ids=batch, labels=batch).loss
            if own:
                amp.backward(loss)
                info = amp.step(optimizer, max_norm=max_norm)
                scales.append(info.loss_scale)
            else:
                torchs.scale(loss).backward()
                torchs.unscale_(optimizer)
                if max_norm is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                torchs.step(optimizer)
                torchs.update()
                scales.append(torchs.get_scale())
            optimizer.zero_grad()
            untouched = all(torch.equal(mine, old) for mine, old in zip(model.parameters(), before, strict=True))
            assert not own or info.skipped == untouched
            skipped.append(untouched)
        steps = optimizer.state[model.lm_head.weight]["step"]
        assert int(steps) == len(batches) - sum(skipped)
        return scales, skipped, model.lm_head.weight.detach().float()

    mine, theirs = train(own=True), train(own=False)
    assert mine[:2] == theirs[:2]
    assert mine[1][3]
    assert mine[1][7]
    assert not mine[1][0]
    assert len(set(mine[0])) > 2
    # The attention's backward is free to sum in any order here, and Adam's first steps are the signs of gradients about zero: a weight may
    # move the other way by as much as the rate in each step.
    assert (mine[2] - theirs[2]).abs().max() <= 2 * 1e-3 * len(batches)
    assert torch.nn.functional.cosine_similarity(mine[2].flatten(), theirs[2].flatten(), dim=0) > 0.99


def test_compiled_blocks_are_compiled_once_more_for_a_phase(tmp_path: Path):
    """One compilation serves all blocks; none is needed when a phase's recipe comes again."""
    model = _llama()
    compile_blocks(model, "blocks", "cuda")
    graphs: list[int] = []
    start = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - start)

    schedule = [{"until": "25%", "recipe": "bf16"}, {"until": "75%", "recipe": "fp8_blockwise"}, {"recipe": "bf16"}]
    callback = LowPrecisionCallback({"schedule": schedule, "skip_slow": False}, compiled=True)
    trainer = _trainer(tmp_path, model, callback, Count(), bf16=True, max_steps=8)
    trainer.train()
    assert graphs == [1, 1, 2, 2, 2, 2, 2, 2]
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0] - 0.5
