"""SwiGLU fused with the quantising of its result: silu(gate) * up is read by down_proj's kernels
without ever being written.

    y = down(silu(gate(x)) * up(x))

Written and read again it costs 4 bytes an element more than the 6 that it takes, and its memory.
The backward is a kernel of its own.

A model's MLP is recognised by its source: a class whose forward is exactly that formula on its
gate_proj, up_proj, down_proj and act_fn, as Llama's, Mistral's and Qwen's are. The module stays the
same object; its class becomes a subclass with the fused forward.
"""

import inspect
import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_FORMULA = "self.down_proj(self.act_fn(self.gate_proj(x))*self.up_proj(x))"
_ACTIVATIONS = ("SiLU", "SiLUActivation")


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup) of h = silu(gate) * up, in fp32, rounded once. All of one shape and dtype."""
    if (
        dh.is_cuda
        and not torch.compiler.is_compiling()
        and all(t.is_contiguous() for t in (dh, gate, up))
    ):
        from lowprec.nn import swiglu_kernel

        return swiglu_kernel.backward(dh, gate, up)
    wide, g = dh.float(), gate.float()
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    dgate = wide * up.float() * (sigmoid + silu * (1 - sigmoid))
    return dgate.to(gate.dtype), (wide * silu).to(up.dtype)


class _Fused:
    """The fused forward; the plain one if down_proj has become something else since, wrapped by an
    adapter say, or hooks want its input."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if getattr(type(self.down_proj), "takes_gate", False) and not is_hooked(self.down_proj):
            return self.down_proj(self.up_proj(x), times_silu_of=self.gate_proj(x))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # The class itself can't be found by a name.
        return _new_fused, (type(self).unfused,), self.__getstate__()


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody hooks into a module to see its input, and knows nothing of gates."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(not getattr(hook, "knows_gates", False) for hook in hooks)


def _new_fused(kind: type) -> Any:
    made: Any = _fused_class(kind)
    return made.__new__(made)


@cache
def _fused_class(kind: type) -> type:
    return type(kind.__name__, (_Fused, kind), {"__module__": kind.__module__, "unfused": kind})


def is_swiglu(module: nn.Module) -> bool:
    """Whether a module computes down_proj(act_fn(gate_proj(x)) * up_proj(x)) with SiLU, and nothing
    else."""
    activation = type(getattr(module, "act_fn", None)).__name__
    return (
        activation in _ACTIVATIONS
        and "forward" not in module.__dict__
        and _has_formula(type(module))
    )


@cache
def _has_formula(kind: type) -> bool:
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    body = re.sub(r"\s", "", source.partition("):" if "->" not in source else ":\n")[2])
    names = re.fullmatch(rf"(\w+)={re.escape(_FORMULA)}return\1", body)
    return names is not None or body == f"return{_FORMULA}"


def fuse(module: nn.Module) -> None:
    """Give a module for which `is_swiglu` holds, and whose down_proj is a LowPrecisionLinear, the
    fused forward, in place."""
    module.__class__ = _fused_class(type(module))


def unfuse(module: nn.Module) -> None:
    """Undo `fuse`; nothing for another module."""
    if isinstance(module, _Fused):
        module.__class__ = type(module).unfused  # pyright: ignore[reportAttributeAccessIssue]


def is_fused(module: nn.Module) -> bool:
    return isinstance(module, _Fused)
