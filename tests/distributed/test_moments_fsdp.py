"""Optimizers with low-precision moments in two processes: the contents of FSDP2's checkpoints, and resuming from them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowprec.training.optim.adamw import OptimizerConfig, build
from tests.processes import run_ranks

# [33, 256]: whole blocks in a row, uneven shards. [64, 33]: blocks cross rows, uneven shards, so fp32. [128, 64]: likewise, even shards.
SHAPES = ((256, 33), (33, 64), (64, 128), (128, 8))
CASES = (("fp32", "8bit"), ("bf16", "8bit"), ("bf16", "4bit"), ("bf16", "bf16"))

_SCRIPT = """
import json, os, sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_state_dict, set_model_state_dict, set_optimizer_state_dict, set_state_dict
)
from torch.distributed.fsdp import fully_shard
from lowprec.training.optim.adamw import OptimizerConfig, build, prepare_weights

torch.set_num_threads(1)
folder = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()


def fresh(config):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*shape) for shape in SHAPES))
    prepare_weights(model, config)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model, build(config, model.parameters(), lr=1e-2, betas=(0.9, 0.95))


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(16, 256, generator=torch.Generator().manual_seed(2 * step + rank)).to(next(model.parameters()).dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def local(model):
    return [parameter.to_local().detach().clone() for parameter in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def run(weights, moments):
    config = OptimizerConfig(weights=weights, moments=moments)
    model, optimizer = fresh(config)
    train(model, optimizer, range(3))
    name = f"{folder}/{weights}-{moments}"
    whole = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(whole, name)
    sharded = get_state_dict(model, optimizer)
    dcp.save({"model": sharded[0], "optimizer": sharded[1]}, checkpoint_id=name + "-sharded")
    train(model, optimizer, range(3, 6))
    found = {"kinds": [type(optimizer.state[p]["exp_avg"].to_local()).__name__ for p in model.parameters()]}
    for way in ("broadcast", "read by all", "sharded"):
        again, optimizer = fresh(config)
        if way == "sharded":
            parts = get_state_dict(again, optimizer)
            state = {"model": parts[0], "optimizer": parts[1]}
            dcp.load(state, checkpoint_id=name + "-sharded")
            set_state_dict(again, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        else:
            broadcast = way == "broadcast"
            held = ({}, {}) if broadcast and rank else torch.load(name, weights_only=True)
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
            set_model_state_dict(again, held[0], options=options)
            set_optimizer_state_dict(again, optimizer, held[1], options=options)
        first = local(again)
        train(again, optimizer, range(3, 6))
        found[way] = [same(local(again), local(model)), same(first, local(again))]
    return found


with torch.compiler.set_stance("force_eager"):
    found = {f"{weights} {moments}": run(weights, moments) for weights, moments in CASES}
json.dump(found, open(f"{folder}/found.{rank}", "w"))
dist.barrier()
dist.destroy_process_group()
# As in test_fsdp.py: Python 3.11's shutdown may kill threads of torch, and with them the process.
os._exit(0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the results and checkpoints of both ranks."""
    folder = tmp_path_factory.mktemp("moments")
    run_ranks(f"SHAPES, CASES = {SHAPES}, {CASES}\n{_SCRIPT}", folder, str(folder))
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("way", ["broadcast", "read by all", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_a_sharded_run_resumes_bit_for_bit(case: tuple[str, str], way: str, ranks: list[dict[str, Any]]):
    """The checkpoint is read by the first rank and broadcast (Accelerate on several GPUs), read by every rank (on one GPU), or sharded."""
    for rank in ranks:
        equal, untrained = rank[" ".join(case)][way]
        assert equal
        assert not untrained


@pytest.mark.parametrize(("case", "kind"), [(CASES[0], "OptimState8bit"), (CASES[2], "OptimState4bit"), (CASES[3], "Tensor")])
def test_moments_are_of_the_same_kind_on_both_ranks(case: tuple[str, str], kind: str, ranks: list[dict[str, Any]]):
    kinds = [kind, "Tensor", "Tensor", "Tensor", kind, "Tensor", "Tensor", "Tensor"]  # weight, bias, weight, ...
    assert [rank[" ".join(case)]["kinds"] for rank in ranks] == [kinds, kinds]


@pytest.mark.parametrize("case", CASES[:2])
def test_the_gathered_state_is_that_of_one_process(case: tuple[str, str], folder: Path):
    """Names, shapes and dtypes are equal, and all are plain tensors."""
    weights, moments = case
    _, gathered = torch.load(folder / "-".join(case), weights_only=True)
    model = nn.Sequential(*(nn.Linear(*shape) for shape in SHAPES)).to(torch.bfloat16 if weights == "bf16" else torch.float32)
    optimizer = build(OptimizerConfig(weights=weights, moments=moments), model.parameters(), betas=(0.9, 0.95))  # pyright: ignore[reportArgumentType]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    mine = optimizer.state_dict()["state"]
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if name == "1.weight":  # quantised here, but not in uneven shards, because its blocks would cross their bounds
            continue
        theirs = gathered["state"][name]
        expected = {key: (value.shape, value.dtype) for key, value in mine[number].items()}
        assert {key: (value.shape, value.dtype) for key, value in theirs.items()} == expected
        assert {type(value) for value in theirs.values()} == {torch.Tensor}
        quantised = parameter.shape in ((33, 256), (128, 64))
        assert set(theirs) == ({"step", *QUANTISED} if quantised else {"step", "exp_avg", "exp_avg_sq"})


QUANTISED = {f"{moment}.{part}" for moment in ("exp_avg", "exp_avg_sq") for part in ("codes", "scale")}
