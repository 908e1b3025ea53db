"""SwiGLU fused with the quantisation of its result: down_proj's kernel computes silu(gate) * up as
it quantises it, so the product is never written to memory.

    h = silu(gate(x)) * up(x)
    y = down(h)

If h were written and read again, this would move 4 more bytes for each element, beside the 6 bytes
that are needed, and take memory for h. The backward is a kernel of its own (`swiglu_kernel.py`).

A model's MLP is recognised by its source: the forward of its class is exactly this formula on its
gate_proj, up_proj, down_proj and act_fn, as in Llama, Mistral and Qwen. The module stays the same
object; its class becomes a subclass with the fused forward.
"""

import inspect
import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.nn.known import known_class

_FORMULA = "self.down_proj(self.act_fn(self.gate_proj(x))*self.up_proj(x))"


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dgate, dup) of h = silu(gate) * up.

    They are computed in fp32 and rounded once. All tensors have one shape and dtype.
    """
    if (
        dh.is_cuda
        and not torch.compiler.is_compiling()
        and all(t.is_contiguous() for t in (dh, gate, up))
    ):
        from lowprec.nn import swiglu_kernel

        return swiglu_kernel.backward(dh, gate, up)
    dh_wide = dh.float()
    gate_wide = gate.float()
    sigmoid = torch.sigmoid(gate_wide)
    silu = gate_wide * sigmoid
    dgate = dh_wide * up.float() * (sigmoid + silu * (1 - sigmoid))
    return dgate.to(gate.dtype), (dh_wide * silu).to(up.dtype)


class _Fused:
    """A mix-in with the fused forward of an MLP.

    It runs the plain formula if down_proj is no longer a layer that takes a gate (an adapter may
    have wrapped it), or if hooks read the input of down_proj.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x)), [..., H] -> [..., H]."""
        if getattr(type(self.down_proj), "takes_gate", False) and not is_hooked(self.down_proj):
            return self.down_proj(self.up_proj(x), times_silu_of=self.gate_proj(x))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # pickle can't find the class itself by its name.
        return _new_fused, (type(self).unfused,), self.__getstate__()


def is_hooked(module: nn.Module) -> bool:
    """Return True if a module has hooks that read its input and do not expect a gate beside it.

    A hook that has the attribute `knows_gates` set expects one.
    """
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(not getattr(hook, "knows_gates", False) for hook in hooks)


def _new_fused(kind: type) -> nn.Module:
    """Return an empty object of the fused class of `kind`, which unpickling fills."""
    made: Any = _fused_class(kind)
    return made.__new__(made)


@cache
def _fused_class(kind: type) -> type:
    """Return the subclass of `kind` with the fused forward."""
    return type(kind.__name__, (_Fused, kind), {"__module__": kind.__module__, "unfused": kind})


def is_swiglu(module: nn.Module) -> bool:
    """Return True if a module computes down_proj(act_fn(gate_proj(x)) * up_proj(x)) with SiLU, and
    nothing else."""
    activation = type(getattr(module, "act_fn", None))
    return (
        activation in (nn.SiLU, known_class("transformers.activations:SiLUActivation"))
        and "forward" not in module.__dict__
        and _has_formula(type(module))
    )


@cache
def _has_formula(kind: type) -> bool:
    """Return True if the source of a class's forward is `_FORMULA`, returned directly or through
    one name."""
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    body = re.sub(r"\s", "", source.partition("):" if "->" not in source else ":\n")[2])
    names = re.fullmatch(rf"(\w+)={re.escape(_FORMULA)}return\1", body)
    return names is not None or body == f"return{_FORMULA}"


def fuse(module: nn.Module) -> None:
    """Give a module the fused forward, in place.

    Args:
        module: one for which `is_swiglu` holds and whose down_proj is a LowPrecisionLinear.
    """
    module.__class__ = _fused_class(type(module))


def unfuse(module: nn.Module) -> None:
    """Undo `fuse`; do nothing to another module."""
    if isinstance(module, _Fused):
        module.__class__ = type(module).unfused  # pyright: ignore[reportAttributeAccessIssue]


def is_fused(module: nn.Module) -> bool:
    """Return True if `fuse` has given the module its forward."""
    return isinstance(module, _Fused)
