"""Tests that need a CUDA device: killed runs that resume, under AMP and FSDP2; the guard; phases of compiled blocks."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from lowprec import LowPrecisionCallback
from lowprec.distributed.processes import use_one_gpu
from lowprec.integrations.compile import compile_blocks
from lowprec.training.amp import Amp
from lowprec.training.optim.loss_scaling import LossScalingConfig
from tests.builders import tiny_llama
from tests.gpu.killed_runs import FSDP2, Case, check_ends_again, check_equal, processes, records, start_all

pytestmark = pytest.mark.gpu

LAYER = "model.layers.1.mlp.down_proj"
CASES = {
    "fp16": Case(("precision.recipe=fp16",)),
    "fp8-fp16": Case(("precision.recipe=fp8_blockwise", "trainer.fp16=true")),
    "bf16": Case(("precision.recipe=bf16",)),
    "compiled": Case(("precision.recipe=fp8_blockwise", "compile=blocks")),
    "fsdp-fp16": Case(("precision.recipe=fp16", *FSDP2), processes(1)),
    "fsdp-bf16": Case(("precision.recipe=fp8_blockwise", *FSDP2), processes(1)),
    "fsdp-8bit": Case(("precision.recipe=bf16", "optimizer.moments=8bit", *FSDP2), processes(1)),
    "fsdp-weights": Case(("precision.recipe=fp8_blockwise", "optimizer={weights: bf16, moments: 8bit}", *FSDP2), processes(1)),
    "loop-fp16": Case(("fp16",), processes(1), loop=True),
    "loop-bf16": Case(("bf16",), processes(1), loop=True),
    "loop-weights": Case(("no",), processes(1), loop=True),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    names = {item.callspec.params["name"] for item in request.session.items if "runs" in getattr(item, "fixturenames", ())}
    with start_all({name: CASES[name] for name in names}, tmp_path_factory) as futures:
        yield futures


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_resumes_bit_for_bit(runs: dict[str, Future], name: str):
    """The runs are the Trainer by `lowprec train`, also under FSDP2, and an Accelerate loop under FSDP2."""
    check_equal(CASES[name], *runs[name].result())


@pytest.mark.parametrize("name", ["fp16", "fsdp-bf16"])
def test_an_end_that_a_kill_cut_short_is_done_again(runs: dict[str, Future], name: str):
    check_ends_again(CASES[name], runs[name].result()[1])


@pytest.mark.parametrize("name", ["fsdp-fp16", "fsdp-bf16", "fsdp-weights", "loop-fp16", "loop-bf16", "loop-weights"])
def test_the_loss_is_not_rounded_to_16_bits_under_fsdp2(runs: dict[str, Future], name: str):
    whole, _ = runs[name].result()
    losses = torch.tensor([record["loss"] for record in records(whole)])
    dtype = torch.float16 if CASES[name].scaled else torch.bfloat16
    assert (losses != losses.to(dtype).float()).all()


@pytest.mark.parametrize(("name", "dtype"), [("fsdp-weights", torch.bfloat16), ("fsdp-8bit", torch.float32)])
def test_weights_have_the_requested_dtype_under_fsdp2(runs: dict[str, Future], name: str, dtype: torch.dtype):
    whole, _ = runs[name].result()
    for folder in (whole / "model", whole / "checkpoint-10"):
        assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {dtype}


def _llama(use: str = "cuda") -> Any:
    return tiny_llama(vocab_size=256, hidden_size=256, intermediate_size=512, num_attention_heads=4).to(torch.device(use))


def _trainer(folder: Path, model: Any, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(64)[:, None] + torch.arange(128)) % 256]
    settings = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "report_to": "none", "logging_steps": 1, **settings}
    args = TrainingArguments(output_dir=str(folder), disable_tqdm=True, save_strategy="no", **settings)
    use_one_gpu(args)
    return Trainer(model, args, train_dataset=rows, callbacks=list(callbacks))  # pyright: ignore[reportArgumentType]


class NaNGradient(TrainerCallback):
    """Makes the gradient of one layer's weight NaN in the step after `step` steps."""

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
        """Notes the tensors of the snapshots before the run ends and frees their memory."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            snapshots = callback.controller.recovery.snapshots._snapshots
            held[:] = [part for snapshot in snapshots for tensor in snapshot.held().values() for part in tensor.parts]

    trainer = _trainer(tmp_path, model, callback, NaNGradient(model, 16), Look(), bf16=True, max_steps=30)
    trainer.train()
    breach, back, raised = callback.controller.events
    assert (breach["step"], breach["layers"][0]) == (17, LAYER)
    assert back["reason"].startswith("weights and optimizer of step 15")
    assert raised["layers"] == [f"{LAYER}: {recipe} -> {'bf16' if recipe == 'fp8_blockwise' else 'fp8_blockwise'}"]
    on_device = [part for part in held if part.dim()]  # AdamW counts its steps in scalars on the host
    assert len(on_device) > 3 * 20
    assert all(part.is_pinned() for part in on_device)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] + 0.3 < losses[17] < losses[0] - 1  # the model continues to learn from the state of step 15


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_amp_has_the_scales_of_torchs_grad_scaler(max_norm: float | None):
    """torch lets the fused optimizer look for overflows itself; two gradients overflow, and growing finds the limit."""
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
    # The backward of attention may sum in any order here, and Adam's first steps are the signs of gradients near zero: in a step a weight
    # may move in the other direction by as much as the rate.
    assert (mine[2] - theirs[2]).abs().max() <= 2 * 1e-3 * len(batches)
    assert torch.nn.functional.cosine_similarity(mine[2].flatten(), theirs[2].flatten(), dim=0) > 0.99


def test_compiled_blocks_are_compiled_once_more_for_a_phase(tmp_path: Path):
    """One compilation serves all blocks; a recipe that comes again in a later phase needs none."""
    model = _llama()
    compile_blocks(model, "blocks", "cuda")
    graphs: list[int] = []
    start = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - start)

    ends = {"25%": "bf16", "50%": "fp8_blockwise", "75%": "mxfp4", "100%": "bf16"}
    schedule = [{"until": until, "recipe": recipe} for until, recipe in ends.items()]
    callback = LowPrecisionCallback({"schedule": schedule, "skip_slow": False}, compiled=True)
    trainer = _trainer(tmp_path, model, callback, Count(), bf16=True, max_steps=8)
    trainer.train()
    assert graphs == [1, 1, 2, 2, 3, 3, 3, 3]
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0] - 0.5
