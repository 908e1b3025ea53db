"""Notes on which converted layers are called, for `lowprec.observe.Calls`.

Every converted layer calls `note_call(self)` first in its forward. A note changes nothing that is
computed, and compiled code contains no trace of it:

- In eager code, a layer is added to each running watch.
- When torch.compile traces a layer, `_note_trace` runs once, at the time of tracing. So there is no
  guard on whether somebody watches, nothing is compiled anew, and a step costs nothing more.
  Compiled code of one block serves the other blocks too, whose layers are then never traced.
"""

import weakref
from typing import Any

import torch
from torch import nn

traced: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The layers that torch.compile has traced a call of, in this process."""


class CallNotes:
    """The layers that eager code has called between `start` and `stop`."""

    def __init__(self) -> None:
        self.seen: set[nn.Module] = set()

    def start(self) -> None:
        """Note calls from now on, until `stop`, or until nobody holds the notes any longer."""
        self.stop()
        self.seen = set()
        _running.append(weakref.ref(self))

    def stop(self) -> None:
        """Note no more calls. `seen` stays."""
        _running[:] = [other for other in _running if other() not in (self, None)]


_running: list[weakref.ref[CallNotes]] = []


def note_call(layer: nn.Module) -> None:
    """Note that `layer` is called."""
    if torch.compiler.is_dynamo_compiling():
        from torch._dynamo.comptime import comptime

        comptime(_note_trace)
        return
    for reference in _running:
        if (notes := reference()) is not None:
            notes.seen.add(layer)


def _note_trace(context: Any) -> None:
    """Note the layer of the `note_call` that is being traced. `context` is torch's
    ComptimeContext."""
    variable = context.get_local("layer")
    # The variable of a module that is traced into holds the module itself.
    traced.add(variable._i_will_not_complain_if_bc_breaks_VariableTracker().value)
