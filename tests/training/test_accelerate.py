"""A training loop of one's own on Accelerate, with `lowprec.training.accelerate.prepare` in place of `accelerator.prepare`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedType, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

from lowprec import UserError
from lowprec.nn import LowPrecisionLinear
from lowprec.training.accelerate import _find, controller, prepare
from lowprec.training.optim.loss_scaling import LossScaleError
from tests.builders import prose, tiny_llama
from tests.processes import ROOT, run, run_ranks

LAYER = "model.layers.1.mlp.down_proj"
GUARD = {"snapshot_every": 2, "warmup": 4, "window": 8}
STEPS = 9


@pytest.fixture(autouse=True)
def fresh_state():
    """Reset Accelerate's state, which belongs to the process."""
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Loop:
    """A run as a new process would build it; `train` is an ordinary loop."""

    def __init__(
        self,
        precision: Any,
        *,
        accumulate: int = 1,
        scaler: bool = False,
        fused: bool = False,
        steps: int | None = STEPS,
        **settings: Any,
    ) -> None:
        _forget()
        seeded = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=1)
        self.accelerator: Any = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, dataloader_config=seeded)
        if scaler:  # Accelerate makes one on a GPU only
            self.accelerator.scaler = torch.amp.GradScaler("cpu")
        self.module = tiny_llama()
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3, fused=fused)
        loader: Any = DataLoader(prose(60), batch_size=2, shuffle=True)  # pyright: ignore[reportArgumentType]
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.prepared = prepare(self.accelerator, self.module, optimizer, loader, rates, precision=precision, steps=steps, **settings)
        self.model, self.optimizer, self.loader, self.rates = self.prepared
        self.controller = controller(self.accelerator)
        self.losses: list[float] = []
        self.seen: list[dict[str, Any]] = []
        """Recipe of the forward pass and scalars after the step, for every batch."""

    def load(self, checkpoint: Path, batches: int) -> None:
        self.accelerator.load_state(str(checkpoint))
        self.loader = skip_first_batches(self.loader, batches)

    def train(self, until: int, begin: int = 0, after: Callable[[int], None] = lambda batch: None) -> "Loop":
        """Train on batches `begin` + 1 to `until`, counted from the start of the run. `after` is called with the number of each."""
        for batch, inputs in enumerate(self.loader, begin + 1):
            layer = self.module.get_submodule(LAYER)
            recipe = layer.recipe.name if isinstance(layer, LowPrecisionLinear) else None
            with self.accelerator.accumulate(self.model):
                loss = self.model(**inputs).loss
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.rates.step()
                self.optimizer.zero_grad()
            self.losses.append(loss.item())
            self.seen.append({"recipe": recipe, "rate": self.rates.get_last_lr()[0], **self.controller.scalars()})
            after(batch)
            if batch == until:
                break
        return self

    def poison(self, *batches: int) -> None:
        """Make the gradient of one layer's weight NaN in these batches, counted from now."""
        count = 0

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return gradient * torch.nan if count in batches else gradient

        self.module.get_submodule(LAYER).weight.register_hook(hook)


def test_prepare_returns_its_arguments_in_order():
    loop = Loop("fp8_blockwise")
    assert [type(part).__name__ for part in loop.prepared] == [
        "LlamaForCausalLM",
        "AcceleratedOptimizer",
        "DataLoaderShard",
        "AcceleratedScheduler",
    ]
    assert loop.model is loop.module
    held = [parameter for group in loop.optimizer.param_groups for parameter in group["params"]]
    assert all(mine is own for mine, own in zip(held, loop.module.parameters(), strict=True))
    assert isinstance(loop.module.get_submodule(LAYER), LowPrecisionLinear)
    assert loop.controller.plan is not None
    assert loop.controller.plan.totals()["recipes"] == {"fp8_blockwise": 14}
    loop.train(8)
    assert loop.losses[-1] < loop.losses[0] - 0.1
    assert loop.seen[-1]["rate"] == pytest.approx(1e-3 / 9)


def test_a_scheduler_may_be_made_after_preparing():
    loop = Loop("fp8_blockwise")
    loop.rates = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: 1 / (1 + step))
    loop.train(3)
    assert _find(loop.accelerator).step == 3


def test_steps_and_tokens_that_are_declared_wrong(caplog: pytest.LogCaptureFixture):
    """A pass has 128 tokens. The phase ends after the two steps that have 256."""
    schedule = [{"until": "256 tokens", "recipe": "bf16"}, {"recipe": "mxfp8"}]
    loop = Loop({"schedule": schedule}, tokens=8, steps=3).train(5)
    assert [seen["phase"] for seen in loop.seen] == [1, 2, 2, 2, 2]  # the phase of the next step
    told = [record.message for record in caplog.records if "declared" in record.message]
    assert [message.partition(" was")[0] for message in told] == ["tokens=8", "steps=3"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_phases_change_after_whole_optimizer_steps(accumulate: int, tmp_path: Path):
    tokens = 2 * 64  # tokens in a forward pass
    schedule = [
        {"until": "2 steps", "recipe": "bf16"},
        {"until": f"{4 * accumulate * tokens} tokens", "recipe": "mxfp8"},
        {"until": "66%", "recipe": "fp8_blockwise"},  # 5.94 of 9 steps
        {"recipe": "none"},
    ]
    loop = Loop({"schedule": schedule}, accumulate=accumulate, tokens=tokens, directory=tmp_path).train(8 * accumulate)
    expected = ["bf16"] * 2 + ["mxfp8"] * 2 + ["fp8_blockwise"] * 2 + ["as it is"] * 2
    assert [entry["recipe"] for entry in loop.seen] == [name for name in expected for _ in range(accumulate)]
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert told == loop.controller.events
    assert [(event["step"], event["event"]) for event in told] == [(2, "phase"), (4, "phase"), (6, "phase")]
    # After the last batch of a step, the phase is that of the next step.
    assert [entry["phase"] for entry in loop.seen][accumulate - 1 :: accumulate] == [1, 2, 2, 3, 3, 4, 4, 4]


def test_the_last_batch_of_a_loader_ends_a_step_that_is_not_full():
    """Accelerate applies the gradients of an incomplete step at the end of a loader."""
    loop = Loop({"schedule": [{"until": "1 steps", "recipe": "bf16"}, {"recipe": "mxfp8"}]}, accumulate=20)
    loop.train(30)  # the loader has 30 batches
    assert [entry["recipe"] for entry in loop.seen] == ["bf16"] * 20 + ["mxfp8"] * 10
    assert _find(loop.accelerator).step == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_guard_recovers_from_a_nan_in_one_layer(accumulate: int, tmp_path: Path):
    loop = Loop({"recipe": "mxfp4", "guard": GUARD}, accumulate=accumulate, directory=tmp_path)
    loop.poison(11 * accumulate)
    loop.train(14 * accumulate)
    breach, back, raised = loop.controller.events
    assert (breach["step"], breach["event"]) == (11, "breach")
    assert breach["layers"][0] == LAYER
    assert back["reason"].startswith("weights and optimizer of step 10")  # its loss was healthy
    assert raised["layers"] == [f"{LAYER}: mxfp4 -> fp8_blockwise"]
    assert [entry["recipe"] for entry in loop.seen] == ["mxfp4"] * 11 * accumulate + ["fp8_blockwise"] * 3 * accumulate
    assert all(parameter.isfinite().all() for parameter in loop.module.parameters())
    assert loop.losses[-1] < loop.losses[0] - 0.1
    assert (loop.seen[-1]["guard_recoveries"], loop.seen[-1]["guard_raised_layers"]) == (1, 1)
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 3


# Recipes that keep state: keys and counts of stochastic rounding, and amax histories. A phase begins after step 5.
RESUMED = {
    "schedule": [
        {"until": "3 steps", "recipe": "bf16"},
        {"until": "50%", "recipe": "mxfp4_aws"},
        {"recipe": "fp8_delayed"},
    ],
    "guard": GUARD,
    "loss_scaling": {"init_scale": 1024, "growth_interval": 3},
}
SAVED = (2, 4, 5, 7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """Train without an interruption; return (folder of checkpoints, losses, final state of the model, `seen`, state of the controller)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    loop = Loop(RESUMED, accumulate=2, scaler=True, directory=folder)

    def save(batch: int) -> None:
        if batch in [2 * step for step in SAVED]:
            loop.accelerator.save_state(str(folder / str(batch // 2)))

    loop.train(2 * STEPS, after=save)
    state = {name: value.clone() for name, value in loop.module.state_dict().items()}
    return folder, loop.losses, state, loop.seen, loop.controller.state_dict()


@pytest.mark.parametrize("step", SAVED)
def test_a_resumed_run_continues_bit_for_bit(whole: Any, step: int, tmp_path: Path):
    folder, losses, state, seen, kept = whole
    (tmp_path / "events.jsonl").write_text((folder / "events.jsonl").read_text())
    torch.manual_seed(step)  # other random numbers than in the first run
    loop = Loop(RESUMED, accumulate=2, scaler=True, directory=tmp_path)
    loop.load(folder / str(step), 2 * step)
    loop.train(2 * STEPS, begin=2 * step)
    assert loop.losses == losses[2 * step :]
    assert loop.seen == seen[2 * step :]
    assert loop.controller.state_dict() == kept  # the guard's statistics are included
    mine = loop.module.state_dict()
    assert mine.keys() == state.keys()
    assert all(torch.equal(mine[name], value) for name, value in state.items())
    assert (tmp_path / "events.jsonl").read_text() == (folder / "events.jsonl").read_text()


def test_the_resumed_run_has_state_and_a_scale_that_grows(whole: Any):
    """The test above needs recipes that keep state, and a scale that grows."""
    _, _, state, seen, _ = whole
    assert {entry["recipe"] for entry in seen} == {"bf16", "mxfp4_aws", "fp8_delayed"}
    assert [entry["loss_scale"] for entry in seen[1::2]] == [1024, 1024, 2048, 2048, 2048, 4096, 4096, 4096, 8192]
    assert state[f"{LAYER}.rounding_state"][2] > 0
    assert state[f"{LAYER}.amax_history_fprop_a"].any()


def test_a_raised_layer_stays_raised_when_a_run_resumes(tmp_path: Path):
    loop = Loop({"recipe": "mxfp4", "guard": GUARD}, steps=None)
    loop.poison(7)
    loop.train(8)
    loop.accelerator.save_state(str(tmp_path))
    resumed = Loop({"recipe": "mxfp4", "guard": GUARD}, steps=None)
    assert resumed.module.get_submodule(LAYER).recipe.name == "mxfp4"
    resumed.load(tmp_path, 8)
    assert resumed.module.get_submodule(LAYER).recipe.name == "fp8_blockwise"
    assert resumed.train(9, begin=8).seen[-1]["guard_recoveries"] == 1


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_loss_scaling_skips_are_counted_and_the_floor_holds(fused: bool):
    """An overflow is no breach for the guard. A fused optimizer looks for overflows itself, and Accelerate does not notice them."""
    scaling = {"init_scale": 8, "min_scale": 4}
    loop = Loop({"recipe": "fp16", "loss_scaling": scaling, "guard": True}, scaler=True, fused=fused)
    loop.poison(2, 4, 5)
    loop.train(3)
    assert [entry["loss_scale"] for entry in loop.seen] == [8, 4, 4]
    assert [entry["skipped_steps"] for entry in loop.seen] == [0, 1, 1]
    assert [entry["guard_recoveries"] for entry in loop.seen] == [0, 0, 0]
    assert fused or loop.seen[1]["rate"] == loop.seen[0]["rate"]  # Accelerate's scheduler waits, too
    with pytest.raises(LossScaleError, match=r"the loss scale fell to 2, below its floor 4, at optimizer step 4 \(2 steps skipped\)"):
        loop.train(5, begin=3)


def test_settings_of_loss_scaling_that_have_changed_hold_in_a_resumed_run(tmp_path: Path):
    loop = Loop({"recipe": "fp16", "loss_scaling": {"init_scale": 64, "growth_interval": 1}}, scaler=True).train(2)
    loop.accelerator.save_state(str(tmp_path))
    resumed = Loop({"recipe": "fp16", "loss_scaling": {"init_scale": 8, "growth_factor": 4, "growth_interval": 1}}, scaler=True)
    resumed.load(tmp_path, 2)
    assert resumed.accelerator.scaler.get_scale() == 256
    assert resumed.train(3, begin=2).seen[-1]["loss_scale"] == 1024


def test_a_step_that_makes_the_optimizers_state_is_not_counted():
    """torch.distributed.checkpoint takes such a step with a sharded optimizer that has no state yet."""
    from torch.distributed.checkpoint.state_dict import _init_optim_state

    loop = Loop({"schedule": [{"until": "1 steps", "recipe": "bf16"}, {"recipe": "mxfp8"}]}, scaler=True)
    run = _find(loop.accelerator)
    run._prepare_to_save()
    run._uncounted(lambda: _init_optim_state(loop.optimizer))
    assert loop.optimizer.state
    assert (run.step, loop.controller.phase) == (0, 0)
    assert [entry["recipe"] for entry in loop.train(2).seen] == ["bf16", "mxfp8"]


def _run(precision: Any = "fp8_blockwise", model: Any = None, optimizer: Any = None, change: Any = None, **settings: Any) -> None:
    accelerator = Accelerator(cpu=True)
    if change is not None:
        change(accelerator)
    model = tiny_llama() if model is None else model
    optimizer = torch.optim.SGD(tiny_llama().parameters(), lr=0.1) if optimizer is None else optimizer
    prepare(accelerator, model, optimizer, precision=precision, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp8_blokwise"}, "unknown recipe 'fp8_blokwise'; did you mean 'fp8_blockwise'"),
        ({"steps": True}, "steps: the steps of the run are a whole number from 1, got True"),
        ({"steps": np.float64(9)}, "steps: the steps of the run are a whole number from 1, got np.float64(9.0)"),
        ({"precision": {"guard": {"data": "replay"}}}, "precision.guard.data: replay needs a loop that can go back in its data"),
        ({"precision": {"schedule": [{"until": "5%"}, {}]}}, "precision.schedule.0.until: 5% of how many steps?"),
        ({"model": [torch.nn.Linear(8, 8)]}, "prepare takes one model after the accelerator, got list"),
        ({"optimizer": DataLoader([1])}, "prepare takes the model's optimizer after the model, got DataLoader"),
    ],
)
def test_wrong_input_is_one_line_and_changes_no_model(arguments: dict[str, Any], message: str):
    model = tiny_llama()
    with pytest.raises(UserError) as caught:
        _run(**{"model": model, **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(isinstance(module, LowPrecisionLinear) for module in model.modules())


def test_numbers_of_numpys_are_numbers():
    steps: Any = np.int64(10)
    tokens: Any = np.prod([8, 16])
    loop = Loop({"recipe": "mxfp4", "schedule": [{"until": "50%", "recipe": "bf16"}, {}]}, steps=steps, tokens=tokens)
    assert loop.controller.tokens == 128


def test_fp16_needs_other_weights_and_another_device():
    """Accelerate alone would train in fp32 on a CPU, without a message."""

    def fp16(accelerator: Any) -> None:
        accelerator.state._mixed_precision = "fp16"

    with pytest.raises(UserError, match=r"parameter 'model.embed_tokens.weight' is float16 already; load the model in float32"):
        _run(model=tiny_llama().half(), change=fp16)
    with pytest.raises(UserError, match="mixed_precision: Accelerate has neither fp16 autocast nor loss scaling on cpu; take bf16"):
        _run(change=fp16)


@pytest.mark.parametrize(("kind", "name"), [(DistributedType.DEEPSPEED, "DEEPSPEED"), (DistributedType.FSDP, "FSDP version 1")])
def test_other_ways_to_distribute_are_refused(kind: DistributedType, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    monkeypatch.setattr(Accelerator, "is_fsdp2", False)
    with pytest.raises(UserError, match=f"low precision needs one process, DDP or FSDP2 .*, not {name}"):
        _run()


def test_one_accelerator_has_one_precision():
    with pytest.raises(UserError, match=r"this Accelerator has no precision: call lowprec\.training\.accelerate\.prepare first"):
        controller(Accelerator(cpu=True))
    loop = Loop("fp8_blockwise")
    with pytest.raises(UserError, match="make another Accelerator for another model"):
        prepare(loop.accelerator, tiny_llama(), torch.optim.SGD(loop.module.parameters(), lr=0.1), precision="bf16")


_TWO = """
import json, os, sys
import torch
import torch.distributed as dist
from accelerate import Accelerator
from tests.builders import prose, tiny_llama
from lowprec.training.accelerate import _find, controller, prepare

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = tiny_llama()
layer = model.get_submodule("model.layers.1.mlp.down_proj")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(prose(128), batch_size=2)
precision = {
    "schedule": [{"until": "5 steps", "recipe": "mxfp8"}, {"recipe": "mxfp4"}],
    "guard": {"snapshot_every": 2, "warmup": 4, "window": 8},
}
ddp, optimizer, loader = prepare(accelerator, model, optimizer, loader, precision=precision, directory=sys.argv[1])
rank, batch, losses, phases = accelerator.process_index, 0, [], []
layer.weight.register_hook(lambda gradient: gradient * torch.nan if (rank, batch) == (1, 20) else gradient)
for batch, inputs in enumerate(loader):
    with accelerator.accumulate(ddp):
        loss = ddp(**inputs).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
    phases.append(layer.recipe.name)
weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
both = [torch.empty_like(weights) for _ in range(2)]
dist.all_gather(both, weights)
told = {"kind": type(ddp).__name__, "events": controller(accelerator).events, "phases": phases, "losses": losses}
told |= {"equal": torch.equal(*both), "finite": bool(weights.isfinite().all())}
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(told, file)
dist.barrier()
dist.destroy_process_group()
# Everything is written and both are done; see tests/distributed/test_fsdp.py.
sys.stdout.flush()
os._exit(0)
"""


def test_two_processes_stay_in_step_when_one_of_them_meets_a_nan(tmp_path: Path):
    run_ranks(_TWO, tmp_path, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["kind"] == "DistributedDataParallel"
    assert first["losses"] != second["losses"]  # the ranks have different batches
    assert first["equal"]
    assert first["finite"]
    assert first["events"] == second["events"]
    assert first["phases"] == second["phases"] == ["mxfp8"] * 9 + ["mxfp4"] * 12 + ["fp8_blockwise"] * 11
    phase, breach, back, raised = first["events"]
    assert [event["step"] for event in first["events"]] == [5, 11, 11, 11]
    assert (phase["event"], breach["layers"][0]) == ("phase", LAYER)
    assert back["reason"].startswith("weights and optimizer of step 10")  # its loss was healthy
    assert raised["layers"] == [f"{LAYER}: mxfp4 -> fp8_blockwise"]
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 4  # written once


def test_the_example_resumes_exactly(tmp_path: Path):
    """The second process resumes from the checkpoint that the first one wrote at step 15 of 30."""

    def example(*arguments: str) -> dict[int, str]:
        result = run(str(ROOT / "trainers" / "loop.py"), *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        return {int(step): rest for step, rest in re.findall(r"^step (\d+): loss (.*)$", result.stdout, re.MULTILINE)}

    once, resumed = example(), example("--resume")
    assert list(once) == [5, 10, 15, 20, 25, 30]
    assert list(resumed) == [20, 25, 30]
    assert resumed == {step: once[step] for step in resumed}
    assert float(once[30].split()[0]) < float(once[5].split()[0]) - 0.5
    assert [rest.split("'phase': ")[1][0] for rest in once.values()] == ["1", "2", "2", "2", "2", "2"]


def test_another_size_of_a_step_is_refused_or_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A run of two processes that goes on in one has steps of half the size."""
    Loop("mxfp8", tokens=128).train(1).accelerator.save_state(str(tmp_path))
    saved = json.loads((tmp_path / "lowprec_run.json").read_text())
    assert saved["size_of_a_step"] == {"tokens": 128, "accumulation": 1, "processes": 1}
    with pytest.raises(UserError, match="has 128 tokens, a step of this run 256; resume with 128 tokens"):
        Loop("mxfp8", tokens=128, accumulate=2).load(tmp_path, 1)
    Loop("mxfp8", tokens=64, accumulate=2).load(tmp_path, 1)
    assert not caplog.records
    Loop("mxfp8", accumulate=2).load(tmp_path, 1)
    assert "was 1 forward passes over all processes, here it is 2" in caplog.text
