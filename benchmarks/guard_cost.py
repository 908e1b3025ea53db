"""What the divergence guard costs a training step: its watch over loss and gradients, and a
snapshot.

python benchmarks/guard_cost.py [PRESET [BATCH [SEQ]]]

Steps with and without the watch, in turns; each turn starts with some that are not timed. On a GPU
the blocks are compiled, and no step without the watch waits for the device: the watch does, once.
Transformers' Trainer waits once anyway (`logging_nan_inf_filter`). A snapshot is timed when it has
memory of an older one to write to, as all after the first two have.
"""

import sys
import time
from statistics import median

import torch

from lowprec.integrations.compile import compile_blocks
from lowprec.training.control.controller import PrecisionController
from lowprec.training.control.snapshots import Snapshots
from lowprec.training.run.config import ModelConfig
from lowprec.training.run.models import build_config, build_model

TURNS, WARMUP, STEPS = 6, 5, 20


def main() -> None:
    preset, batch, seq = (sys.argv[1:] + ["llama-350m", "16", "1024"][len(sys.argv) - 1 :])[:3]
    batch, seq = int(batch), int(seq)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = build_config(ModelConfig(preset=preset), 32000)
    config.use_cache = False
    torch.manual_seed(0)
    with device:
        model = (
            build_model(ModelConfig(preset=preset), config, attn_implementation="sdpa")
            .to(torch.bfloat16)
            .train()
        )
    compiled = device.type == "cuda"
    controller = PrecisionController(
        {"recipe": "fp8_blockwise", "guard": {"snapshot_every": 10**6}},
        tokens=batch * seq,
        compiled=compiled,
    )
    print(controller.convert(model, device).summary())
    compile_blocks(model, "blocks" if compiled else "off", device.type)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=compiled)
    tokens = torch.randint(config.vocab_size, (batch, seq), device=device)
    done = 0

    def milliseconds(*, watched: bool, steps: int) -> float:
        """Of a step, over `steps` of them."""
        nonlocal done
        start = time.perf_counter()
        for _ in range(steps):
            if watched:
                controller.before_step(done)
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if watched:
                controller.after_step(done)
        synchronize(device)
        return 1e3 * (time.perf_counter() - start) / steps

    milliseconds(watched=False, steps=WARMUP)
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(TURNS):
        for watched in (False, True) if turn % 2 == 0 else (True, False):
            if watched:
                controller.start(model, optimizer, step=done)
            else:
                controller.stop()
            milliseconds(watched=watched, steps=WARMUP)
            times[watched].append(milliseconds(watched=watched, steps=STEPS))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{preset}, {parameters / 1e6:.0f} M parameters, {batch} x {seq} tokens, {device}, torch "
        f"{torch.__version__}"
    )
    for watched, name in ((False, "without"), (True, "with the guard")):
        print(
            f"step {name}: {median(times[watched]):.2f} ms, of "
            f"{', '.join(f'{t:.2f}' for t in sorted(times[watched]))}"
        )
    snapshots, taken = Snapshots(keep=2), []
    for step in range(5):
        synchronize(device)
        start = time.perf_counter()
        snapshots.take(step, model, optimizer)
        synchronize(device)
        taken.append(1e3 * (time.perf_counter() - start))
    print(
        f"a snapshot: {median(taken[2:]):.0f} ms; the first two, which take their memory: "
        f"{taken[0]:.0f} and {taken[1]:.0f} ms"
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
