"""Low-precision layers."""

from lowprec.nn.histories import share_histories
from lowprec.nn.linear import LowPrecisionLinear

__all__ = ["LowPrecisionLinear", "share_histories"]
