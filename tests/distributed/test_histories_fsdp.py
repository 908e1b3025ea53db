"""Delayed scaling on two ranks: both scale by the amaxes of both ranks, so the histories in the checkpoint, of one rank, serve both."""

import json
from pathlib import Path

from tests.processes import run_ranks

_SCRIPT = """
import copy, json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from lowprec.nn import share_histories
from tests.builders import prose, tiny_llama
from lowprec.training.control import controller as controlling
from lowprec.training.control.controller import PrecisionController

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
rows = [row["input_ids"] for row in prose(100)]
own, shared = [], []

def watched(model):
    histories = {name: buffer for name, buffer in model.named_buffers() if "amax_history" in name}
    own.append({name: history.tolist() for name, history in histories.items()})
    share_histories(model)
    shared.append({name: history.tolist() for name, history in histories.items()})

controlling.share_histories = watched

def begin():
    model = tiny_llama()
    controller = PrecisionController({"recipe": "fp8_delayed"})
    controller.convert(model, "cpu")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return controller, model, torch.optim.AdamW(model.parameters(), lr=3e-3)

def train(controller, model, optimizer, first, last):
    controller.start(model, optimizer, step=first, total_steps=8)
    losses = []
    for step in range(first, last):
        controller.before_step(step)
        for part in range(2):
            batch = torch.stack(rows[8 * step + 4 * rank + 2 * part :][:2])
            loss = model(input_ids=batch, labels=batch).loss
            (loss / 2).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        controller.after_step(step + 1)
    return losses

controller, model, optimizer = begin()
train(controller, model, optimizer, 0, 3)
saved = [copy.deepcopy(get_state_dict(model, optimizer, options=whole))]  # on rank 0 alone, as a checkpoint in one file is
assert bool(saved[0][0]) == (rank == 0)
dist.broadcast_object_list(saved)
expected = train(controller, model, optimizer, 3, 8)

controller, model, optimizer = begin()
weights, moments = saved[0]
set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=StateDictOptions(full_state_dict=True))
resumed = train(controller, model, optimizer, 3, 8)
(folder / f"{rank}.json").write_text(json.dumps({"expected": expected, "resumed": resumed, "own": own[:8], "shared": shared[:8]}))
dist.barrier()
os._exit(0)
"""


def test_ranks_scale_alike_and_resume_from_one_ranks_buffers(tmp_path: Path):
    run_ranks(_SCRIPT, tmp_path, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["shared"] == second["shared"]
    for step, (one, two) in enumerate(zip(first["own"], second["own"], strict=True)):
        assert one != two  # the ranks train on other rows
        assert len(one) == 14 * 6  # both operands of three GEMMs
        for name in one:
            assert first["shared"][step][name] == [max(pair) for pair in zip(one[name], two[name], strict=True)]
    for rank in (first, second):
        assert rank["resumed"] == rank["expected"]
    assert first["expected"] != second["expected"]
