"""Measurements of what low precision does to a model while it trains."""

from lowprec.observe.called import Calls
from lowprec.observe.probe import LayerProbe, Probe, sqnr_scalars

__all__ = ["Calls", "LayerProbe", "Probe", "sqnr_scalars"]
