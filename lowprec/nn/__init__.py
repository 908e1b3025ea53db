"""Low-precision layers."""

from lowprec.nn.linear import LowPrecisionLinear

__all__ = ["LowPrecisionLinear"]
