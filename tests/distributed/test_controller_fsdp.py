"""Two processes under FSDP2 change their precision by phases, and by a breach that one rank sees. The ranks measure different errors."""

import json
import math
from pathlib import Path

from lowprec.observe.called import BYPASSED
from tests.processes import run_ranks

_SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import LlamaMLP
from tests.builders import prose, tiny_llama
from lowprec.training.control.controller import PrecisionController

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()


class Reading(LlamaMLP):
    # No rank calls up_proj, and only one calls gate_proj.

    def forward(self, x):
        up, gate = (self.get_submodule(name) for name in ("up_proj", "gate_proj"))
        return self.down_proj(self.act_fn(gate(x) if rank else linear(x, gate.weight)) * linear(x, up.weight))

model = tiny_llama()
model.model.layers[0].mlp.__class__ = Reading
controller = PrecisionController({
    "recipe": "mxfp4_aws",
    "schedule": [{"until": "4 steps", "recipe": "bf16"}, {}],
    "guard": {"snapshot_every": 3, "warmup": 3, "window": 8, "sqnr_floor": 3.0},
    "probe_every": 8,
})
controller.convert(model, "cpu")
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
controller.start(model, optimizer, total_steps=20, main=rank == 0, directory=Path(sys.argv[1]))
layer, step, losses, rows = model.model.layers[1].mlp.up_proj, 0, [], [row["input_ids"] for row in prose(200)]

def poison(module, args, output):
    if rank == 1 and step == 12:
        output.register_hook(lambda g: g * torch.nan)

layer.register_forward_hook(poison)
for step in range(20):
    controller.before_step(step)
    batch = torch.stack(rows[8 * step + 4 * rank :][:4])
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    controller.after_step(step + 1)
    losses.append(loss.item())
weight = layer.weight.full_tensor()
result = {
    "events": controller.events,
    "losses": losses,
    "recipes": [layer.recipe.name, model.model.layers[0].mlp.up_proj.recipe.name],
    "weight": [weight.isfinite().all().item(), weight.double().sum().item()],
    "uncalled": controller.state_dict()["uncalled"],
    "sharded": type(layer.weight).__name__,
    "sqnr": controller.recovery.sqnr,
    "own": {name: min(probe.sqnr_x, probe.sqnr_w, probe.sqnr_g) for name, probe in controller.probed.items()},
}
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(result))
dist.barrier()
os._exit(0)
"""


def test_ranks_decide_alike(tmp_path: Path):
    run_ranks(_SCRIPT, tmp_path, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["events"] == second["events"]
    assert first["uncalled"] == second["uncalled"] == {"model.layers.0.mlp.up_proj": BYPASSED}
    assert [event["step"] for event in first["events"] if event["event"] == "uncalled"] == [1]
    assert first["weight"] == second["weight"]
    assert first["weight"][0]
    assert first["sharded"] == "DTensor"
    assert [event["step"] for event in first["events"] if event["event"] == "phase"] == [4]
    breaches = [event for event in first["events"] if event["event"] == "breach"]
    assert breaches[0]["step"] == 13
    assert breaches[0]["layers"][0] == "model.layers.1.mlp.up_proj"
    assert first["recipes"][0] in ("fp8_blockwise", "bf16")
    assert first["recipes"][1] == "mxfp4_aws"
    assert first["losses"][-1] < first["losses"][0] - 0.5
    own = [rank["own"] for rank in (first, second)]
    assert first["sqnr"] == second["sqnr"] == {name: min(found.get(name, math.inf) for found in own) for name in own[0] | own[1]}
    assert first["own"] != second["own"]
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert told == first["events"]  # only the first rank writes events
