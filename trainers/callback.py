"""LowPrecisionCallback: low precision in an ordinary transformers.Trainer.

    trainer = Trainer(model, args, ..., callbacks=[LowPrecisionCallback("fp8_blockwise")])

The callback converts the model when the Trainer hands it over, at the end of its own construction: the model is on its device then, and
no optimizer holds its parameters yet.
"""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import lowprec
from lowprec.config import parse_precision
from lowprec.plan import PartPlan, Plan

logger = logging.getLogger("lowprec")

PLAN_FILE = "plan.json"


def show_log() -> None:
    """Let the "lowprec" logger write to stderr, unless the program has set up logging: a user should see what was converted."""
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
        logger.propagate = False


class LowPrecisionCallback(TrainerCallback):
    """Converts the Trainer's model, logs the plan, writes it to `<output_dir>/plan.json`, and logs fp16's dynamic loss scale.

    Args:
        precision: a recipe name, a mapping, a YAML path, a Recipe or a PrecisionConfig.
        parts: what else the plan should show (attention, kernels, ...).
        tokens: of a forward pass on one device, if known; it decides which layers FP8 pays for (see `lowprec.convert`).
        compiled: whether the model's blocks are compiled, if the Trainer's `torch_compile` does not say so.
    Raises:
        lowprec.UserError (a ValueError): the precision is wrong; at once where that can be seen without the model.
    """

    def __init__(self, precision: Any, *, parts: Iterable[PartPlan] = (), tokens: int | None = None, compiled: bool = False) -> None:
        self.precision = parse_precision(precision)
        self.tokens, self.compiled = tokens, compiled
        self.parts = tuple(parts)
        self.plan: Plan | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        compiled = self.compiled or bool(args.torch_compile)
        plan = lowprec.convert(model, self.precision, device=args.device, tokens=self.tokens, compiled=compiled)
        self.plan = plan.with_parts(self.parts)
        if state.is_world_process_zero:
            show_log()
            logger.info("%s", self.plan)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.plan is not None:
            self.plan.save(Path(args.output_dir) / PLAN_FILE)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        # The Trainer reaches its GradScaler through the optimizer that Accelerate wrapped.
        scaler = getattr(optimizer, "scaler", None)
        if scaler is None or logs is None or "loss" not in logs:
            return
        logs["loss_scale"] = scaler.get_scale()
        if state.log_history:
            state.log_history[-1]["loss_scale"] = logs["loss_scale"]
