"""Notes on which converted layers are called, for `lowprec.observe.Calls`.

Every converted layer calls `note_call(self)` first in its forward. A note changes nothing that is
computed, and compiled code contains no trace of it:

- In eager code, a layer is added to the set of each running watch.
- When torch.compile traces a layer, `_note_trace` runs once, at the time of tracing. So there is no
  guard on whether somebody watches, nothing is compiled anew, and a step costs nothing more.
  Compiled code of one block serves the other blocks too, whose layers are then never traced.
"""

from typing import Any
from weakref import WeakSet

import torch
from torch import nn

traced: WeakSet[nn.Module] = WeakSet()
"""The layers that torch.compile has traced a call of, in this process."""

_watches: list[set[nn.Module]] = []


def note_call(layer: nn.Module) -> None:
    """Note that `layer` is called."""
    if torch.compiler.is_dynamo_compiling():
        from torch._dynamo.comptime import comptime

        comptime(_note_trace)
    else:
        for seen in _watches:
            seen.add(layer)


def start_noting(seen: set[nn.Module]) -> None:
    """Add the layers that eager code calls to `seen` from now on."""
    stop_noting(seen)
    _watches.append(seen)


def stop_noting(seen: set[nn.Module]) -> None:
    """End `start_noting`. It may be called twice."""
    # By identity: two sets with the same layers are equal.
    _watches[:] = [other for other in _watches if other is not seen]


def _note_trace(context: Any) -> None:
    """Note the layer of the `note_call` that is being traced. `context` is torch's
    ComptimeContext."""
    variable = context.get_local("layer")
    # The variable of a module that is traced into holds the module itself.
    traced.add(variable._i_will_not_complain_if_bc_breaks_VariableTracker().value)
