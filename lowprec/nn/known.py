"""Classes of other libraries, known by identity and without an import of the library.

A class of a library that nobody has imported has no objects, so the library is looked up among the
imported modules. A user's class of the same name is another class.
"""

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


def known_class(path: str) -> type | None:
    """Return the class at `path`, "package.module:Class"; None if its module is not imported."""
    module, _, name = path.partition(":")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def is_a(thing: Any, *paths: str) -> bool:
    """Return whether `thing` is an object of one of the classes at `paths`."""
    return any(isinstance(thing, kind) for path in paths if (kind := known_class(path)))


def is_conv1d(module: Any) -> bool:
    """Return whether a module is transformers' Conv1D, the linear layer of GPT-2, or a subclass."""
    return is_a(module, "transformers.pytorch_utils:Conv1D")


def is_plain(tensor: Any) -> bool:
    """Return whether a tensor is torch's own, not one of a class that another part of torch or
    another library has made."""
    return type(tensor) in (Tensor, nn.Parameter, UninitializedParameter)


def is_dtensor(tensor: Any) -> bool:
    """Return whether a tensor is sharded over ranks, by FSDP2 or by tensor parallelism."""
    return is_a(tensor, "torch.distributed.tensor:DTensor")


def is_fsdp2(module: Any) -> bool:
    """Return whether `fully_shard` has made a module a unit of FSDP2."""
    return is_a(module, "torch.distributed.fsdp:FSDPModule")
