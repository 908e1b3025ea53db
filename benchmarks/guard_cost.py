"""Measure the cost of the divergence guard in a training step, and the cost of a snapshot.

python benchmarks/guard_cost.py [PRESET [BATCH [SEQ]]]

Steps with and without the guard run in turns; the first steps of each turn are not timed. On a GPU
the blocks are compiled. A step without the guard does not wait for the device, and a step with the
guard waits once. Transformers' Trainer waits once anyway (`logging_nan_inf_filter`). The first two
snapshots allocate memory and the later ones reuse it, so the later ones count.
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

TURNS = 6
WARMUP = 5
STEPS = 20


def build(preset: str, device: torch.device) -> torch.nn.Module:
    """Return a model of a preset in bf16, in training mode."""
    config = build_config(ModelConfig(preset=preset), 32000)
    config.use_cache = False
    torch.manual_seed(0)
    with device:
        model = build_model(ModelConfig(preset=preset), config, attn_implementation="sdpa")
    return model.to(torch.bfloat16).train()


class Run:
    """A training run whose guard can be switched on and off."""

    def __init__(self, preset: str, batch: int, seq: int, device: torch.device) -> None:
        self.device = device
        self.model = build(preset, device)
        on_gpu = device.type == "cuda"
        self.controller = PrecisionController(
            {"recipe": "fp8_blockwise", "guard": {"snapshot_every": 10**6}},
            tokens=batch * seq,
            compiled=on_gpu,
        )
        print(self.controller.convert(self.model, device).summary())
        compile_blocks(self.model, "blocks" if on_gpu else "off", device.type)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=on_gpu)
        self.tokens = torch.randint(self.model.config.vocab_size, (batch, seq), device=device)
        self.done = 0

    def set_guard(self, on: bool) -> None:
        """Switch the guard on or off."""
        if on:
            self.controller.start(self.model, self.optimizer, step=self.done)
        else:
            self.controller.stop()

    def milliseconds(self, *, guarded: bool, steps: int) -> float:
        """Run `steps` steps and return the time of one step in ms."""
        start = time.perf_counter()
        for _ in range(steps):
            if guarded:
                self.controller.before_step(self.done)
            self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
            if guarded:
                self.controller.after_step(self.done)
        synchronize(self.device)
        return 1e3 * (time.perf_counter() - start) / steps


def snapshot_times(run: Run) -> list[float]:
    """Return the times of five snapshots in ms."""
    snapshots = Snapshots(keep=2)
    times = []
    for step in range(5):
        synchronize(run.device)
        start = time.perf_counter()
        snapshots.take(step, run.model, run.optimizer)
        synchronize(run.device)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    preset, batch, seq = (sys.argv[1:] + ["llama-350m", "16", "1024"][len(sys.argv) - 1 :])[:3]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(preset, int(batch), int(seq), device)
    run.milliseconds(guarded=False, steps=WARMUP)
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(TURNS):
        for guarded in (False, True) if turn % 2 == 0 else (True, False):
            run.set_guard(guarded)
            run.milliseconds(guarded=guarded, steps=WARMUP)
            times[guarded].append(run.milliseconds(guarded=guarded, steps=STEPS))
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    print(
        f"{preset}, {parameters / 1e6:.0f} M parameters, {batch} x {seq} tokens, {device}, torch "
        f"{torch.__version__}"
    )
    for guarded, name in ((False, "without"), (True, "with the guard")):
        print(
            f"step {name}: {median(times[guarded]):.2f} ms, of "
            f"{', '.join(f'{t:.2f}' for t in sorted(times[guarded]))}"
        )
    taken = snapshot_times(run)
    print(
        f"a snapshot: {median(taken[2:]):.0f} ms; the first two, which allocate their memory: "
        f"{taken[0]:.0f} and {taken[1]:.0f} ms"
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
