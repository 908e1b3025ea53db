"""Liger's Triton kernels in a Hugging Face model, with a reason for each kernel that is not used.

The method. Outside GEMMs and attention, a decoder is bound by memory: RMSNorm, SwiGLU, rotary
embedding, and above all the loss, whose logits [tokens, vocabulary] are the largest tensor of the
step. Liger (Hsu et al., "Liger Kernel", arXiv 2410.10989) fuses each of these, and
`fused_linear_cross_entropy` never writes the logits to memory. Three things limit their use here:

    - A compiled block needs none of the three small kernels. TorchInductor fuses the same
      operations, and it fuses them with their neighbours too, which it cannot do with a Triton
      kernel from outside. Liger 0.8.5's RMSNorm even fails in a block compiled by PyTorch 2.11.
    - `fused_linear_cross_entropy` multiplies by lm_head.weight itself and never calls lm_head. It
      would silently bypass a low-precision lm_head, so it is not used with one.
    - Liger patches more than the model: besides the instance, it replaces classes and functions in
      transformers' module. `apply_liger` undoes this except for the rotary embedding, which is a
      function of the module that all models of that architecture share.

`plan_liger` decides and changes nothing; `apply_liger` carries out that plan.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn

from lowprec.errors import UserError

Mode = Literal["auto", "on", "off"]

KERNELS = ("rope", "rms_norm", "swiglu", "fused_linear_cross_entropy")
INSTALL = "pip install 'lowprec[liger]'"


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """One of Liger's kernels, used or not, with the reason."""

    name: str
    """Name of the kernel, one of `KERNELS`."""
    used: bool
    """Flag: the kernel is used."""
    reason: str
    """Reason for using or not using it."""

    def __str__(self) -> str:
        return f"{self.name}: {'liger' if self.used else 'no'}, {self.reason}"


@dataclass(frozen=True, kw_only=True)
class LigerPlan:
    """The choice for each kernel of `KERNELS`, in that order."""

    kernels: tuple[KernelChoice, ...]

    @property
    def applied(self) -> tuple[str, ...]:
        """Names of the kernels in use."""
        return tuple(kernel.name for kernel in self.kernels if kernel.used)

    def __str__(self) -> str:
        return "\n".join(map(str, self.kernels))


def plan_liger(
    model: nn.Module,
    mode: Mode,
    *,
    device_type: str,
    compiled_blocks: bool,
    head_is_low_precision: bool,
) -> LigerPlan:
    """Return the kernels that `apply_liger` would use, with the reasons. Changes nothing.

    Args:
        model: a transformers model.
        mode: "off", "auto" (use the kernels that apply) or "on" (UserError if no kernel applies).
        device_type: type of the device that trains, such as "cuda".
        compiled_blocks: True if the decoder blocks are, or will be, compiled.
        head_is_low_precision: True if lm_head computes in low precision.
    """
    if mode not in ("auto", "on", "off"):
        raise UserError(f"kernels.liger: expected 'auto', 'on' or 'off', got {mode!r}")
    if mode == "off":
        return _none("kernels.liger: off")
    if (obstacle := _obstacle(model, device_type)) is not None:
        if mode == "on":
            raise UserError(f"kernels.liger: on, but {obstacle}")
        return _none(obstacle)
    chosen = [_choose(name, model, compiled_blocks, head_is_low_precision) for name in KERNELS]
    plan = LigerPlan(kernels=tuple(chosen))
    if mode == "on" and not plan.applied:
        raise UserError(
            "kernels.liger: on, but no kernel applies "
            f"({'; '.join(f'{k.name}: {k.reason}' for k in chosen)})"
        )
    return plan


def apply_liger(
    model: nn.Module,
    mode: Mode,
    *,
    device_type: str,
    compiled_blocks: bool,
    head_is_low_precision: bool,
) -> LigerPlan:
    """Put Liger's kernels into `model`, in place, and return the plan.

    The arguments are those of `plan_liger`. Only this instance changes, with one exception:
    `rope` replaces a function in the model's module of transformers, for every model of that
    architecture in the process. Call this before the blocks are compiled.
    """
    plan = plan_liger(
        model,
        mode,
        device_type=device_type,
        compiled_blocks=compiled_blocks,
        head_is_low_precision=head_is_low_precision,
    )
    if plan.applied:
        _patch(model, plan.applied)
    return plan


def _none(reason: str) -> LigerPlan:
    """Return a plan that uses no kernel, for one reason."""
    return LigerPlan(
        kernels=tuple(KernelChoice(name=name, used=False, reason=reason) for name in KERNELS)
    )


def _obstacle(model: nn.Module, device_type: str) -> str | None:
    """Return the reason why no kernel can be used, or None."""
    if device_type != "cuda":
        return f"Liger's kernels need CUDA, not {device_type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return f"Liger is not installed: {INSTALL}"
    model_type = _model_type(model)
    if model_type not in _liger_functions():
        return f"Liger has no kernels for the model type '{model_type}'"
    if not type(model).__module__.startswith("transformers.models."):
        name = type(model).__name__
        return f"Liger patches transformers' own classes, and {name} is not one of them"
    return None


def _choose(
    name: str, model: nn.Module, compiled_blocks: bool, head_is_low_precision: bool
) -> KernelChoice:
    reason = _why_not(name, model, compiled_blocks, head_is_low_precision)
    if reason is not None:
        return KernelChoice(name=name, used=False, reason=reason)
    if name == "rope":
        where = type(model).__module__
        return KernelChoice(
            name=name,
            used=True,
            reason=f"fused; replaces the function in {where} for the whole process",
        )
    if name == "fused_linear_cross_entropy":
        return KernelChoice(
            name=name,
            used=True,
            reason="the logits are never written to memory; in training no logits come back",
        )
    return KernelChoice(name=name, used=True, reason="fused; patched in this instance only")


def _why_not(
    name: str, model: nn.Module, compiled_blocks: bool, head_is_low_precision: bool
) -> str | None:
    """Return the reason why one kernel is not used, or None."""
    model_type = _model_type(model)
    parameter = inspect.signature(_liger_functions()[model_type]).parameters.get(name)
    if parameter is None:
        return f"Liger has none for the model type '{model_type}'"
    if parameter.default is False:
        # Liger's default is False where the architecture differs from what the kernel computes.
        return f"Liger leaves it off for the model type '{model_type}'"
    if name == "fused_linear_cross_entropy":
        return _why_not_fused_loss(model, head_is_low_precision)
    if compiled_blocks:
        if name == "rms_norm" and _torch_version() < (2, 12):
            return (
                "left to the compiler: Liger 0.8.5's fails in a block compiled by PyTorch < 2.12 "
                "('float' object has no attribute 'to')"
            )
        return "left to the compiler, which fuses it with its neighbours"
    activation = getattr(_text_config(model), "hidden_act", None)
    if name == "swiglu" and activation not in ("silu", "swish"):
        return f"the activation of this model is {activation}, not silu"
    return None


def _why_not_fused_loss(model: nn.Module, head_is_low_precision: bool) -> str | None:
    """Return the reason why `fused_linear_cross_entropy` is not used, or None."""
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Module):
        return f"{type(model).__name__} has no lm_head"
    bypass = "this kernel reads lm_head.weight directly, bypassing the layer"
    if head_is_low_precision:
        return f"lm_head is a low-precision layer, and {bypass}"
    if type(head) is not nn.Linear:
        return f"lm_head is a {type(head).__name__}, and {bypass}"
    if head.bias is not None:
        return "lm_head has a bias, which this kernel leaves out"
    if getattr(_text_config(model), "pretraining_tp", 1) > 1:
        return "the kernel does not support pretraining_tp > 1"
    return None


def _patch(model: nn.Module, names: tuple[str, ...]) -> None:
    """Call Liger's function for this model type, then undo its changes outside the instance (except
    for rope)."""
    function = _liger_functions()[_model_type(model)]
    options = {
        name: False
        for name, p in inspect.signature(function).parameters.items()
        if isinstance(p.default, bool)
    }
    options |= dict.fromkeys(names, True)

    cls = type(model)
    module = sys.modules[cls.__module__]
    before = dict(vars(module))
    forward = cls.__dict__.get("forward")
    function(model=model, **options)

    for name, value in before.items():
        # Liger replaces classes for models that are built later. This instance is patched through
        # its own modules, so the classes can be restored.
        if isinstance(value, type) and vars(module)[name] is not value:
            setattr(module, name, value)
    patched: Any = cls.__dict__.get("forward")
    if patched is not forward:
        # For some model types Liger patches the loss into the class. Move it to the instance.
        if forward is None:
            del cls.forward
        else:
            # Type checkers take a plain assignment for a method override.
            setattr(cls, "forward", forward)  # noqa: B010
        model.forward = MethodType(patched, model)


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


@cache
def _liger_functions() -> dict[Any, Callable[..., None]]:
    # We read Liger's table, because its entry point _apply_liger_kernel_to_instance only logs an
    # unknown model type.
    from liger_kernel.transformers import monkey_patch

    return dict(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN)
