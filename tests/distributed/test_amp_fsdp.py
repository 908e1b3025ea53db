"""Loss scaling in two processes: if a gradient overflows in one process, both skip the step."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run, run_ranks

_SCRIPT = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from lowprec.training.optim.loss_scaling import LossScalingConfig
from lowprec.training.amp import Amp
from lowprec.training.optim.loss_scaling import LossScaler
from lowprec.training.optim.adamw import OptimizerConfig, build, prepare_weights

torch.set_num_threads(1)
out = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()


def train(kind):
    torch.manual_seed(0)
    # Half of the first weight is large enough for quantised moments. The last one's 3 rows are uneven shards.
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 3))
    if kind == "fsdp_bf16_8bit":
        prepare_weights(model, OptimizerConfig(weights="bf16"))
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
    if kind == "fsdp_bf16_8bit":
        optimizer = build(OptimizerConfig(weights="bf16", moments="8bit"), model.parameters(), lr=1e-2)
        amp = Amp("bf16", model)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        amp = Amp("fp16", model, loss_scaling=LossScalingConfig(init_scale=1024.0, growth_interval=2))
    x, y = torch.randn(64, 64), torch.randn(64, 3)
    x, y = x.chunk(2)[rank], y.chunk(2)[rank]
    steps = []
    for step in range(8):
        with amp.autocast():
            loss = nn.functional.mse_loss(model(x), y)
        bad = step in (2, 5) and rank == 1 and amp.scaler is not None
        # In DDP rank 1's loss overflows before the gradients are averaged, in FSDP2 a number of its shard afterwards.
        amp.backward(loss * torch.inf if bad and kind == "ddp" else loss)
        if bad and kind == "fsdp":
            model[0].weight.grad.to_local()[0, 0] = torch.inf
        before = local(model)
        info = amp.step(optimizer, max_norm=1.0)
        optimizer.zero_grad()
        changed = any(not torch.equal(now, then) for now, then in zip(local(model), before))
        norm = info.grad_norm.item()
        steps.append({"skipped": info.skipped, "scale": info.loss_scale, "changed": changed, "norm": norm if norm < 1e9 else None})
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    first = optimizer.state[next(model.parameters())]["exp_avg"]
    moments = type(first.to_local() if hasattr(first, "to_local") else first).__name__
    adam_steps = sorted({int(state["step"]) for state in optimizer.state.values()})
    total = sum(weight.detach().double().abs().sum().item() for weight in weights)
    return {"steps": steps, "adam_steps": adam_steps, "moments": moments, "sum": total}


def local(model):
    return [(p.to_local() if hasattr(p, "to_local") else p).detach().clone() for p in model.parameters()]


def unscale_sharded_and_plain():
    layer = fully_shard(nn.Linear(4, 4, bias=False))
    plain, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizers = [torch.optim.SGD([*layer.parameters(), plain], lr=1.0), torch.optim.SGD([idle], lr=1.0)]
    scaler = LossScaler(LossScalingConfig(init_scale=4.0), "cpu")
    scaler.scale(layer(torch.ones(1, 4)).sum() + plain.sum()).backward()
    if rank == 1:
        idle.grad = torch.tensor([torch.inf, 1.0])  # rank 0 has no gradient at all here
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    gradients = [layer.weight.grad.to_local().flatten().tolist(), plain.grad.tolist()]
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return {"gradients": gradients, "plain": plain.tolist(), "idle": idle.tolist(), "skipped": scaler.skipped_steps}


with torch.compiler.set_stance("force_eager"):
    found = {kind: train(kind) for kind in ("fsdp", "ddp", "fsdp_bf16_8bit")}
found["mixed"] = unscale_sharded_and_plain()
json.dump(found, open(f"{out}.{rank}", "w"))
dist.barrier()
dist.destroy_process_group()
# As in test_fsdp.py: Python 3.11's shutdown may kill threads of torch, and with them the process.
os._exit(0)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of each rank."""
    folder = tmp_path_factory.mktemp("amp")
    run_ranks(_SCRIPT, folder, str(folder / "found"))
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_an_overflow_on_one_rank_skips_the_step_on_both(kind: str, ranks: list[dict[str, Any]]):
    for found in (rank[kind] for rank in ranks):
        assert [step["skipped"] for step in found["steps"]] == [step in (2, 5) for step in range(8)]
        assert [step["changed"] for step in found["steps"]] == [step not in (2, 5) for step in range(8)]
        # Doubled after two good steps, halved after a bad one.
        assert [step["scale"] for step in found["steps"]] == [1024, 2048, 1024, 1024, 2048, 1024, 1024, 2048]
        assert found["adam_steps"] == [6]


@pytest.mark.parametrize("kind", ["fsdp", "ddp", "fsdp_bf16_8bit"])
def test_both_ranks_end_with_the_same(kind: str, ranks: list[dict[str, Any]]):
    assert ranks[0][kind]["sum"] == ranks[1][kind]["sum"]
    assert [step["norm"] for step in ranks[0][kind]["steps"]] == [step["norm"] for step in ranks[1][kind]["steps"]]


def test_the_norm_is_that_of_all_shards(ranks: list[dict[str, Any]]):
    """FSDP2 and DDP train the same model on the same data; each rank's fp16 gradients are the same, and only fp32 sums differ in order."""
    sharded, whole = ([step["norm"] for step in ranks[0][kind]["steps"]] for kind in ("fsdp", "ddp"))
    assert sharded[:2] == pytest.approx(whole[:2], rel=1e-5)
    assert sharded[2] is None
    assert whole[2] is None


def test_bf16_weights_with_8_bit_moments_train_when_sharded(ranks: list[dict[str, Any]]):
    assert all(step["changed"] for rank in ranks for step in rank["fsdp_bf16_8bit"]["steps"])
    assert ranks[0]["fsdp_bf16_8bit"]["adam_steps"] == [8]
    assert ranks[0]["fsdp_bf16_8bit"]["moments"] == "OptimState8bit"


def test_sharded_plain_and_missing_gradients_under_one_scaler(ranks: list[dict[str, Any]]):
    for found in (rank["mixed"] for rank in ranks):
        assert found["gradients"] == [[1.0] * 8, [1.0, 1.0]]  # unscaled on both ranks
        assert found["plain"] == [0.0, 0.0]
        assert found["idle"] == [1.0, 1.0]  # both ranks skipped its step
        assert found["skipped"] == 1


_LOADED = """
import copy, json, os, sys
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from tests.builders import tiny_llama
from lowprec.training.optim.loss_scaling import prepare_to_load

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/store", rank=0, world_size=1)
Accelerator(cpu=True)
batch, whole = torch.arange(64).repeat(2).view(4, 32), StateDictOptions(full_state_dict=True)

def build(seed):
    model = tiny_llama(seed)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024, growth_interval=3)
    return model, AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), scaler=scaler), scaler

def step(model, optimizer, scaler):
    loss = model(input_ids=batch, labels=batch).loss
    scaler.scale(loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), scaler.get_scale()

first = build(0)
for _ in range(4):
    step(*first)
model, optimizer, scaler = first
weights, scale = copy.deepcopy(model.state_dict()), copy.deepcopy(scaler.state_dict())
moments = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=whole))
expected = [step(*first) for _ in range(5)]
outcomes = []
for prepared in (False, True):
    model, optimizer, scaler = again = build(7)
    model.load_state_dict(weights)
    if prepared:
        prepare_to_load(scaler, "cpu")
    try:
        set_optimizer_state_dict(model, optimizer, moments, options=whole)
    except AssertionError as error:
        outcomes.append(str(error))
        continue
    scaler.load_state_dict(scale)
    outcomes.append([step(*again) for _ in range(5)] == expected)
print(json.dumps(outcomes))
sys.stdout.flush()
os._exit(0)
"""


def test_a_sharded_optimizer_is_loaded_beside_its_scaler(tmp_path: Path):
    """The state is loaded as transformers does under FSDP2. Without a scale that fails; with one the run continues bit for bit."""
    process = run("-c", _LOADED, str(tmp_path))
    assert process.returncode == 0, process.stderr[-3000:]
    without, prepared = json.loads(process.stdout.splitlines()[-1])
    assert "_scale is None" in without
    assert prepared is True
