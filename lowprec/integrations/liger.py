"""Liger's Triton kernels in a Hugging Face model: which apply, and why the others do not.

The method. Outside of GEMMs and attention a decoder is bound by memory: RMSNorm, SwiGLU, rotary
embedding, and above all the loss, whose logits [tokens, vocabulary] are the largest tensor of the
step. Liger (Hsu et al., "Liger Kernel", arXiv 2410.10989) fuses each of these;
`fused_linear_cross_entropy` never writes the logits to memory at all. Three things limit their use
here:

    - A compiled block needs none of the three small kernels. TorchInductor fuses the same
      operations, across their borders too, and a Triton kernel from outside is a wall to it. Liger
      0.8.5's RMSNorm even fails in a block compiled by PyTorch 2.11.
    - `fused_linear_cross_entropy` multiplies by lm_head.weight itself and never calls lm_head. If
      that is a low-precision layer, Liger would bypass it in silence; so it is left off.
    - Liger patches more than the model: besides the instance it replaces classes and functions in
      transformers' module. What can be undone is (see `apply_liger`); the rotary embedding is a
      function of the module that all of its models share.

`plan_liger` decides and changes nothing; `apply_liger` does what that plan says.
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
    """One of Liger's kernels, used or not, and why."""

    name: str
    used: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {'liger' if self.used else 'no'}, {self.reason}"


@dataclass(frozen=True, kw_only=True)
class LigerPlan:
    """The choice for each kernel of `KERNELS`, in that order."""

    kernels: tuple[KernelChoice, ...]

    @property
    def applied(self) -> tuple[str, ...]:
        """The names of the kernels in use."""
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
    """Which of Liger's kernels `apply_liger` would use, with the reasons. Changes nothing.

    model: a transformers model. mode: "off", "auto" (use what applies) or "on" (UserError if
    nothing does). compiled_blocks: whether the decoder blocks are, or will be, compiled.
    head_is_low_precision: whether lm_head computes in low precision.
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
    """Use Liger's kernels in `model`, in place, as `plan_liger` (which see) decides; returns that
    plan.

    Only this instance changes, but for `rope`: that replaces a function in the model's module of
    transformers, for every model of that architecture in the process. Call it before the blocks are
    compiled.
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
    return LigerPlan(
        kernels=tuple(KernelChoice(name=name, used=False, reason=reason) for name in KERNELS)
    )


def _obstacle(model: nn.Module, device_type: str) -> str | None:
    """What keeps every kernel away, if anything."""
    if device_type != "cuda":
        return f"Liger's kernels need CUDA, not {device_type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return f"Liger is not installed: {INSTALL}"
    model_type = _model_type(model)
    if model_type not in _liger_functions():
        return f"Liger has no kernels for the model type '{model_type}'"
    if not type(model).__module__.startswith("transformers.models."):
        return f"Liger patches transformers' own classes, and {type(model).__name__} is not one of them"
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
    model_type = _model_type(model)
    parameter = inspect.signature(_liger_functions()[model_type]).parameters.get(name)
    if parameter is None:
        return f"Liger has none for the model type '{model_type}'"
    if parameter.default is False:
        # So marked where the architecture differs from what the kernel computes.
        return f"Liger leaves it off for the model type '{model_type}'"
    if name == "fused_linear_cross_entropy":
        return _why_not_fused_loss(model, head_is_low_precision)
    if compiled_blocks:
        if name == "rms_norm" and _torch_version() < (2, 12):
            return "left to the compiler: Liger 0.8.5's fails in a block compiled by PyTorch < 2.12 ('float' object has no attribute 'to')"
        return "left to the compiler, which fuses it with its neighbours"
    activation = getattr(_text_config(model), "hidden_act", None)
    if name == "swiglu" and activation not in ("silu", "swish"):
        return f"the activation of this model is {activation}, not silu"
    return None


def _why_not_fused_loss(model: nn.Module, head_is_low_precision: bool) -> str | None:
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Module):
        return f"{type(model).__name__} has no lm_head"
    if head_is_low_precision:
        return "lm_head is a low-precision layer, and this kernel reads lm_head.weight directly, bypassing the layer"
    if type(head) is not nn.Linear:
        return f"lm_head is a {type(head).__name__}, and this kernel reads lm_head.weight directly, bypassing the layer"
    if head.bias is not None:
        return "lm_head has a bias, which this kernel leaves out"
    if getattr(_text_config(model), "pretraining_tp", 1) > 1:
        return "the kernel does not support pretraining_tp > 1"
    return None


def _patch(model: nn.Module, names: tuple[str, ...]) -> None:
    """Call Liger's function for this model type, then undo what it changed outside of the instance
    (but for rope)."""
    function = _liger_functions()[_model_type(model)]
    options = {
        name: False
        for name, p in inspect.signature(function).parameters.items()
        if isinstance(p.default, bool)
    }
    options |= dict.fromkeys(names, True)

    module, cls = sys.modules[type(model).__module__], type(model)
    before, forward = dict(vars(module)), cls.__dict__.get("forward")
    function(model=model, **options)

    for name, value in before.items():
        # Classes for models that are built later; the instance itself is patched through its own
        # modules.
        if isinstance(value, type) and vars(module)[name] is not value:
            setattr(module, name, value)
    patched: Any = cls.__dict__.get("forward")
    if patched is not forward:
        # Some model types have the loss patched into the class: move it to the instance.
        if forward is None:
            del cls.forward
        else:
            setattr(cls, "forward", forward)  # noqa: B010  (a plain assignment is taken for a method override)
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
    # Liger's entry point _apply_liger_kernel_to_instance only logs an unknown model type, so its
    # table is read instead.
    from liger_kernel.transformers import monkey_patch

    return dict(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN)
