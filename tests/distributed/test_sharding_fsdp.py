"""FSDP2 in two processes with Accelerate's policy for mixed precision, and with ours."""

import json
import math
from typing import Any

import pytest

from tests.processes import run_ranks

_SCRIPT = """
import json, os, sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import fully_shard
from lowprec.distributed.fsdp2 import sum_in_fp32

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 4, bias=False), nn.Parameter(torch.ones(1))
        nn.init.eye_(self.inner.weight)

    def forward(self, x):
        # Like transformers' losses: upcast first, then average.
        return (self.inner(x).float() * self.scale.float()).sum() / 64 + 2.501


def run(dtype, ours):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision(dtype)
    model = Model()
    assert sum_in_fp32(SimpleNamespace(fsdp_plugin=plugin), model) if ours else True
    fully_shard(model.inner, mp_policy=plugin.mixed_precision_policy)
    fully_shard(model, mp_policy=plugin.mixed_precision_policy)
    value = model(torch.zeros(1, 4)).detach()
    gradients = {}
    for name, x, scale in (("mean", 1.0 if rank == 0 else 2.0**-12, 1.0), ("scaled", 1.0, 2.0**16)):
        (model(torch.full((1, 4), x)).float() * scale).backward()
        gradients[name] = model.inner.weight.grad.full_tensor()[0, 0].item() * 64 / scale
        model.zero_grad()
    return {"dtype": str(value.dtype), "loss": value.item(), **gradients}


found = {f"{dtype} {ours}": run(dtype, ours) for dtype in ("bf16", "fp16") for ours in (False, True)}
if rank == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
dist.barrier()
dist.destroy_process_group()
# As in test_fsdp.py: Python 3.11's shutdown may kill threads of torch, and with them the process.
os._exit(0)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharding")
    run_ranks(_SCRIPT, folder, str(folder / "found.json"))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_loss_is_returned_as_it_was_computed(dtype: str, found: dict[str, Any]):
    assert found[f"{dtype} True"]["dtype"] == "torch.float32"
    assert found[f"{dtype} True"]["loss"] == pytest.approx(2.501, rel=1e-7)
    assert abs(found[f"{dtype} False"]["loss"] - 2.501) > 9e-4


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_gradients_are_summed_over_ranks_in_fp32(dtype: str, found: dict[str, Any]):
    """The gradient is 1 on one rank and 2**-12 on the other."""
    assert found[f"{dtype} True"]["mean"] == (1 + 2**-12) / 2
    assert found[f"{dtype} False"]["mean"] == 0.5


def test_a_loss_that_fp16_scales_overflows_by_itself_under_accelerates_policy_alone(found: dict[str, Any]):
    """torch.amp.GradScaler starts at a scale of 2**16, which is more than fp16's largest number."""
    assert [found[f"{dtype} {ours}"]["scaled"] for dtype in ("bf16", "fp16") for ours in (False, True)] == [1, 1, math.inf, 1]
