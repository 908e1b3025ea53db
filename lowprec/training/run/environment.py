"""Environment variables that change what a run computes. The configuration rules.

Accelerate and torch read settings from the environment that a run has in its configuration, and
that its plan shows. `accelerate launch` sets some of them. A variable that says the same as the
configuration is fine. One that contradicts it is overruled, and a line says so, or refused, if it
works below what a program can set.
"""

import logging
import os

from transformers import TrainingArguments

from lowprec.errors import UserError
from lowprec.training.log import show_log

logger = logging.getLogger("lowprec")

_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
"""Variables that hand the training over to another engine -> its name."""

_CPU_MATH = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
"""Variables by which products of fp32 matrices on a CPU are computed in another format."""

_TF32 = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
"""Variables by which products of fp32 matrices on a GPU are computed in TF32 (1), or never (0)."""

_NO_COMPILER = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
"""Variables that turn torch.compile off."""


def rule_environment(args: TrainingArguments, device_type: str, *, compiled: bool = False) -> None:
    """Overrule the variables that contradict the configuration of a run, and log each of them.

    Args:
        args: Arguments of the Trainer, whose `mixed_precision` is set.
        device_type: Type of the device of the run.
        compiled: Flag: the run compiles the blocks of its model.
    Raises:
        UserError: a variable can't be overruled.
    """
    _refuse(args, device_type, compiled=compiled)
    chosen = {"fp16": args.fp16, "bf16": args.bf16, "no": True}
    wanted = next(name for name, is_chosen in chosen.items() if is_chosen)
    args.mixed_precision = wanted
    _overrule("ACCELERATE_MIXED_PRECISION", wanted, "trainer.bf16 and trainer.fp16")
    if not args.torch_compile:
        _overrule("ACCELERATE_DYNAMO_BACKEND", "no", "compile")


def _overrule(variable: str, wanted: str, setting: str) -> None:
    """Give a variable that is set the value that a run wants. "no" is what `accelerate launch` sets
    if nobody asks for anything, so it contradicts nothing."""
    value = os.environ.get(variable)
    if value is None:
        return
    os.environ[variable] = wanted
    if value.lower() in ("no", wanted):
        return
    show_log()
    logger.warning(
        "%s=%s is overruled by the configuration: %s (%s)", variable, value, wanted, setting
    )


def _refuse(args: TrainingArguments, device_type: str, *, compiled: bool) -> None:
    for variable, engine in _ENGINES.items():
        if _is_on(variable):
            raise UserError(
                f"{variable}={os.environ[variable]}: a run does not train by {engine}; unset it, "
                "or launch with a file of configs/accelerate"
            )
    if args.device.type != device_type:
        raise UserError(
            f"device: the run is on {device_type}, and the environment chooses {args.device.type} "
            "(ACCELERATE_USE_CPU, ACCELERATE_TORCH_DEVICE); unset the variable, or say "
            f"device={args.device.type}"
        )
    for variable in _CPU_MATH if device_type == "cpu" else ():
        if os.environ.get(variable, "STRICT").upper() not in ("", "STRICT"):
            raise UserError(
                f"{variable}={os.environ[variable]}: products of fp32 would have another format "
                "than the plan says; unset it"
            )
    for variable in _TF32 if device_type == "cuda" else ():
        value = os.environ.get(variable)
        if (value == "1" and not args.tf32) or (value == "0" and args.tf32):
            raise UserError(
                f"{variable}={value} contradicts trainer.tf32; unset it, or say "
                f"trainer.tf32={'true' if value == '1' else 'false'}"
            )
    for variable in _NO_COMPILER if compiled or args.torch_compile else ():
        if _is_on(variable):
            raise UserError(
                f"{variable}={os.environ[variable]}: nothing would be compiled; unset it, or say "
                "compile=off"
            )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")
