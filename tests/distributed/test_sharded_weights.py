"""Sharded weights: tensor parallelism is refused before and after the conversion; FSDP2 shards a Conv1D and a layer of a user's class."""

import json
from pathlib import Path

import pytest

from tests.processes import run_ranks

_SCRIPT = """
import json, os, sys
from collections import OrderedDict
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.pytorch_utils import Conv1D
import lowprec
from lowprec.nn import LowPrecisionLinear

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
found = {}

class Mine(nn.Linear):
    pass

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(up=nn.Linear(64, 128), down=nn.Linear(128, 64), rest=nn.Linear(64, 64)))

def parallel(model):
    return parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})

def outcome(function):
    try:
        return function()
    except Exception as error:
        return [type(error).__name__, str(error)]

def plan_of(model, precision="mxfp8"):
    return {layer.name: [layer.converted, layer.blocked, layer.reason] for layer in lowprec.convert(model, precision).layers}

split = parallel(mlp())
found["planned"] = plan_of(split)
found["strict"] = outcome(lambda: plan_of(split, {"recipe": "mxfp8", "strict": True}))
alone = mlp()  # the layers that stay are trained as they are without any parallelism
inputs, g = (torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
for model in (split, alone):
    y = model.down(model.up(inputs))
    (y.to_local() if hasattr(y, "to_local") else y).backward(g)
found["gradients"] = {
    name: float((getattr(split, name).weight.grad.full_tensor() - (whole := getattr(alone, name).weight.grad)).norm() / whole.norm())
    for name in ("up", "down")
}
later = mlp()
lowprec.convert(later, "mxfp8")
parallel(later)
found["later"] = outcome(lambda: later.up(torch.ones(4, 64)).shape)
both = parallel(mlp())
fully_shard(both, mesh=mesh["dp"])
found["both"] = plan_of(both)

def blocks():
    torch.manual_seed(0)
    first, second = nn.Sequential(Conv1D(128, 64), nn.GELU(), Conv1D(64, 128)), nn.Sequential(Mine(64, 128), nn.GELU())
    return nn.Sequential(first, second, nn.Sequential(nn.Linear(128, 64)))

def gradients(model, x):
    model(x).square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}

x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
one, two = blocks(), blocks()
for model in (one, two):
    lowprec.convert(model, "fp8_blockwise")
for part in (two[0], two[1], two[2][0]):  # the last one is a layer
    fully_shard(part)
fully_shard(two)
found["changed"] = []
for recipe in ("fp8_blockwise", "mxfp8", "fp32"):  # converted anew while they are sharded
    for model in (one, two):
        found["changed"].append(all(converted for converted, *_ in plan_of(model, recipe).values()))
    whole, mine = gradients(one, x), gradients(two, x.chunk(world)[rank])
    found[recipe] = max(float((mine[name] - g).norm() / g.norm()) for name, g in whole.items())
found["kinds"] = [isinstance(two[0][0], Conv1D), isinstance(two[1][0], Mine), isinstance(two[2][0], LowPrecisionLinear)]
found["revert"] = outcome(lambda: lowprec.revert(two))
if rank == 0:
    json.dump(found, open(sys.argv[1], "w"))
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("sharded") / "found.json"
    run_ranks(_SCRIPT, Path(out).parent, str(out), processes=2)
    return json.loads(out.read_text())


REASON = "its weight is a DTensor, as tensor parallelism makes: low precision does not run under tensor parallelism yet"


def test_weights_of_tensor_parallelism_stay_and_strict_says_so(found: dict):
    for planned in (found["planned"], found["both"]):
        assert planned["up"] == planned["down"] == [False, True, REASON]
    assert found["planned"]["rest"][0]
    assert found["strict"] == ["UserError", f"precision.strict: up can't be converted: {REASON}"]
    assert max(found["gradients"].values()) < 1e-6


def test_tensor_parallelism_after_the_conversion_is_refused_in_the_forward(found: dict):
    assert found["later"] == ["UserError", f"recipe mxfp8 can't run: {REASON}"]


def test_layers_of_other_classes_train_under_fsdp2_through_the_recipes_of_a_run(found: dict):
    assert all(found["changed"])
    assert found["kinds"] == [True, True, True]
    assert max(found[recipe] for recipe in ("fp8_blockwise", "mxfp8", "fp32")) < 1e-5


def test_a_sharded_layer_is_not_reverted(found: dict):
    kind, message = found["revert"]
    assert kind == "UserError"
    assert "its class has become FSDPLowPrecisionLinear since its conversion" in message
