"""Decide whether a class of linear layers multiplies plainly: y = x . w^T + bias and nothing else.

nn.Linear, its subclasses that inherit its forward, and transformers' Conv1D do. A forward of a
subclass's own is proven in two ways, without the layer's weights:

* its code is a straight line: it has no loop and no branch (except on a bias of None), it stores
  nothing outside its local variables, and it uses no names but those of products (`_WORDS`). So
  every call does what any other does.
* one call on the meta device, in training and in eval(), in fp32 and in bf16, is a product of the
  input and the weight plus the bias, and no other operation of torch (`_Trace`).
"""

import dis
import inspect
from abc import ABC, ABCMeta
from functools import cache
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowprec.nn.known import is_conv1d, known_class
from lowprec.nn.linear import OWN_ATTRIBUTES, LowPrecisionLinear
from lowprec.recipe.state import HISTORIES, ROUNDING_STATE

_COOPERATIVE = {"forward", "reset_parameters", "extra_repr", "from_linear"}
"""Names that a class may define as LowPrecisionLinear does: methods that call those of the layer's
own class, or replace them where the result is the same, and one that the class keeps."""

_INTERCEPTING = {
    *("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__"),
    *("weight", "bias"),
}
"""Names of methods and properties that can change what a call computes without the forward."""


def why_not_plain(linear: nn.Module) -> str | None:
    """Return why a linear layer, of nn.Linear or Conv1D or a subclass, can't get the forward of a
    LowPrecisionLinear; None if it can."""
    kind = type(linear)
    base = known_class("transformers.pytorch_utils:Conv1D") if is_conv1d(linear) else nn.Linear
    assert base is not None
    if kind is base:
        return None
    return (
        _why_not_subclass(kind, base)
        or _own_name(linear)
        or _why_not_forward(kind, base, linear.bias is not None)
    )


@cache
def _why_not_subclass(kind: type, base: type) -> str | None:
    """Return why a class can't be combined with LowPrecisionLinear; None if it can."""
    standard = {*base.__mro__, ABC, Generic}
    own = [cls for cls in kind.__mro__ if cls not in standard]
    if type(kind) not in (type, ABCMeta) or any("__init_subclass__" in vars(cls) for cls in own):
        return f"{kind.__name__} does not allow a subclass without a side effect"
    if any(vars(cls).get("__slots__") for cls in own):
        return f"{kind.__name__} has __slots__, so its objects can't change their class"
    defined = {name for cls in own for name in vars(cls)}
    if changed := sorted(_INTERCEPTING & defined):
        return f"{kind.__name__} has a {changed[0]} of its own"
    if taken := sorted((_names() - _COOPERATIVE) & defined):
        return f"{kind.__name__} has a '{taken[0]}' of its own, a name that a converted layer uses"
    return None


@cache
def _names() -> frozenset[str]:
    """Return the names that a LowPrecisionLinear uses."""
    methods = (name for name in vars(LowPrecisionLinear) if not name.startswith("__"))
    return frozenset((*methods, *OWN_ATTRIBUTES, ROUNDING_STATE, *HISTORIES)) - {"_apply"}


def _own_name(linear: nn.Module) -> str | None:
    """Return why the attributes of a layer stand in the way; None if they don't."""
    held = {*linear.__dict__, *linear._buffers, *linear._modules, *linear._parameters}
    if taken := sorted((_names() - _COOPERATIVE) & held):
        kind = type(linear).__name__
        return f"this {kind} has a '{taken[0]}' of its own, a name that a converted layer uses"
    return None


@cache
def _why_not_forward(kind: Any, base: Any, has_bias: bool) -> str | None:
    """Return why the forward of a class is not known to multiply plainly; None if it is."""
    if kind.forward is base.forward or (base is nn.Linear and _is_product(kind, has_bias)):
        return None
    name = "nn.Linear" if base is nn.Linear else base.__name__
    return f"{kind.__name__} is a subclass of {name} with a forward of its own"


def _is_product(kind: Any, has_bias: bool) -> bool:
    """Return whether the forward of a subclass of nn.Linear is a plain product."""
    own = kind.__mro__[: kind.__mro__.index(nn.Linear)]
    forwards = [vars(cls)["forward"] for cls in own if "forward" in vars(cls)]
    if not all(map(inspect.isfunction, forwards)):
        return False
    given = inspect.signature(forwards[0]).parameters.values()
    if len(given) != 2 or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in given):
        return False
    return all(map(_is_straight, forwards)) and all(
        _multiplies(kind, dtype, has_bias, training)
        for dtype in (torch.float32, torch.bfloat16)
        for training in (True, False)
    )


def _is_straight(forward: Any) -> bool:
    """Return whether the code of a function is a straight line that uses only `_WORDS`."""
    code = forward.__code__
    if {*code.co_names, *code.co_freevars} - _WORDS:
        return False
    last = ""
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        asks_for_bias = last == "bias" and name.endswith(("_NONE", "_NOT_NONE"))
        jumps = instruction.opcode in (*dis.hasjrel, *dis.hasjabs)
        if jumps and not asks_for_bias and name != "JUMP_FORWARD":
            return False
        if name == "PUSH_EXC_INFO":
            return False
        if name.startswith(("STORE_", "DELETE_")) and not name.startswith("STORE_FAST"):
            return False
        if name == "LOAD_GLOBAL" and not _is_torchs(instruction.argval, forward.__globals__):
            return False
        last = instruction.argval
    return True


_WORDS = {
    *("torch", "nn", "functional", "F", "super", "__class__", "Linear", "forward"),
    *("linear", "matmul", "mm", "addmm", "add", "t", "T", "mT", "transpose"),
    *("weight", "bias", "to", "type_as", "dtype"),
}
"""All names that the code of a plain forward may use."""


def _is_torchs(name: str, names: dict[str, Any]) -> bool:
    """Return whether a global name of a function is a part of torch, or super()."""
    if name not in names:
        return name == "super"
    found = names[name]
    module = found.__name__ if inspect.ismodule(found) else getattr(found, "__module__", None)
    return str(module).partition(".")[0] == "torch"


def _multiplies(kind: Any, dtype: torch.dtype, has_bias: bool, training: bool) -> bool:
    """Return whether one call of a class's forward computes the product and nothing else."""
    stand_in: Any = kind.__new__(kind)
    nn.Module.__init__(stand_in)
    stand_in._parameters["weight"] = nn.Parameter(_meta(5, 4, dtype=dtype))
    stand_in._parameters["bias"] = nn.Parameter(_meta(5, dtype=dtype)) if has_bias else None
    stand_in.__dict__["training"] = training
    x = _meta(3, 4, dtype=dtype)
    trace = _Trace(x, stand_in.weight, stand_in.bias)
    try:
        with trace:
            result = kind.forward(stand_in, x)
    except Exception:  # the user's code may raise anything
        return False
    return not trace.has_stranger and trace.role(result) == ("xw+b" if has_bias else "xw")


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Trace(TorchFunctionMode):
    """A mode that follows x, w and b through operations of torch, and knows what each result is:
    "x", "w", "b", "wt" for w^T, "xw" for x . w^T, and "xw+b"."""

    def __init__(self, x: Tensor, w: Any, b: Any) -> None:
        super().__init__()
        self.known: dict[int, tuple[str, Any]] = {}
        self.has_stranger = False
        """Flag: an operation was no part of a plain product."""
        for role, tensor in (("x", x), ("w", w), ("b", b)):
            self._know(tensor, role)

    def _know(self, tensor: Any, role: str) -> None:
        if tensor is not None:
            self.known[id(tensor)] = role, tensor  # held, so that its id is not given out again

    def role(self, thing: Any) -> str | None:
        """Return what a result is; None if it is unknown."""
        return self.known.get(id(thing), (None, None))[0]

    def _argument(self, value: Any) -> Any:
        """Return the role of a tensor; another value as it is."""
        return self.role(value) or "unknown" if isinstance(value, Tensor) else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or self.role(result) is not None:
            return result  # a dtype, or a cast that changes nothing
        name = getattr(func, "__name__", repr(func))
        if name == "__get__":  # a property, such as T
            name = func.__self__.__name__
        arguments = tuple(self._argument(value) for value in (*args, *kwargs.values()))
        made = _MADE.get((name, *arguments)) if all(map(_is_hashable, arguments)) else None
        if made is None:
            self.has_stranger = True
        else:
            self._know(result, made)
        return result


def _is_hashable(value: Any) -> bool:
    return isinstance(value, str | int | None)


_MADE = {
    ("linear", "x", "w"): "xw",
    ("linear", "x", "w", None): "xw",
    ("linear", "x", "w", "b"): "xw+b",
    **{(name, "x", "wt"): "xw" for name in ("matmul", "__matmul__", "mm")},
    ("addmm", "b", "x", "wt"): "xw+b",
    **{(name, "xw", "b"): "xw+b" for name in ("add", "__add__", "add_", "__iadd__")},
    **{(name, "b", "xw"): "xw+b" for name in ("add", "__add__")},
    **{(name, "w"): "wt" for name in ("t", "T", "mT")},
    **{("transpose", "w", *axes): "wt" for axes in ((0, 1), (1, 0), (-1, -2), (-2, -1))},
}
"""The parts of a plain product: the result of each operation on such arguments."""
