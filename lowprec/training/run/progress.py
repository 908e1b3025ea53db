"""Callbacks that report a run's progress: throughput, metrics.jsonl and the progress bar."""

import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowprec.files import to_json
from lowprec.training.file_names import METRICS
from lowprec.training.run.machine import peak_flops


def rows_per_step(args: TrainingArguments, state: TrainerState) -> int:
    """Return the number of sequences in a whole optimizer step, over all ranks."""
    batch = args.train_batch_size
    if args.auto_find_batch_size and state.train_batch_size:
        batch = state.train_batch_size  # the Trainer may have halved it
    return batch * args.gradient_accumulation_steps * args.world_size


class ThroughputCallback(TrainerCallback):
    """A callback that adds the throughput to the Trainer's logs.

    It adds `tokens_per_second`, over the steps since the last log, and `mfu`, the operations as a
    share of the devices' bf16 peak, if the peak is known. It must come before the callbacks that
    show the logs.
    """

    def __init__(self, seq_len: int, flops_per_token: float | None = None) -> None:
        self.seq_len = seq_len
        self.flops_per_token = flops_per_token
        self.peak = peak_flops()
        self._step = 0
        self._time = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step = state.global_step
        self._time = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or state.global_step <= self._step:
            return
        now = time.perf_counter()
        rows = rows_per_step(args, state)
        logs["tokens_per_second"] = (
            (state.global_step - self._step) * rows * self.seq_len / (now - self._time)
        )
        if self.peak and self.flops_per_token and not args.use_cpu:
            logs["mfu"] = (
                logs["tokens_per_second"] * self.flops_per_token / (self.peak * args.world_size)
            )
        self._step = state.global_step
        self._time = now


class MetricsCallback(TrainerCallback):
    """A callback that appends every log to <output_dir>/metrics.jsonl.

    A line is {"step": ..., "loss": ..., ...}. Floats have all their digits.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and state.is_world_process_zero:
            with open(Path(str(args.output_dir)) / METRICS, "a", encoding="utf-8") as file:
                file.write(to_json({"step": state.global_step, **logs}) + "\n")


class ProgressBar(TrainerCallback):
    """A callback that shows one line: step, loss, tokens/s and the time that is left."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            # Seconds between updates: a log file gets few lines.
            interval = 0.1 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                mininterval=interval,
                dynamic_ncols=True,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._bar is None or not logs:
            return
        shown = {}
        if "loss" in logs:
            shown["loss"] = f"{logs['loss']:.3f}"
        if "tokens_per_second" in logs:
            shown["tok/s"] = f"{logs['tokens_per_second']:,.0f}"
        if "loss_scale" in logs:
            shown["scale"] = f"{logs['loss_scale']:g}"
        if shown:
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
