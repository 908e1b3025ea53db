"""Model what a linear layer costs on a Hopper GPU: forward and backward, by counting, with measured
rates.

    products     6 M N K operations; wgrad contracts tokens, and in FP8 it is the slowest of three
    quantising   x, g and w are read once and written in two directions: 4 bytes an element
    kernels      6 in FP8 and 3 in bf16, with a few microseconds each to start and to end
    the host     eager code takes longer to ask for the kernels than small ones run

The rates are of one H100 and its host; benchmarks/payoff_grid.py compares the model with measured
layers (docs/experiments.md).
"""

from dataclasses import dataclass

_BF16 = 700e12
"""Operations a second in bf16."""
_FP8_BLOCKS = 1080e12
"""Operations a second in FP8 with scales of 1x128 by 128x128."""
_FP8_ROWS = 930e12
"""Operations a second in FP8 with scales of 1x128 by 1x128."""
_FP8_WHOLE = 1250e12
"""Operations a second in FP8 with scales per tensor or per row."""
_BYTES = 2.6e12
"""Bytes a second of the quantisers with scales of blocks."""
_WHOLE_BYTES = 1.2e12
"""Bytes a second of the quantisers with scales per tensor or per row, which read twice."""
_KERNEL = 6e-6
"""Seconds that one kernel takes to start and to end."""
_HOST_BF16 = 0.27e-3
"""Seconds that eager code takes to ask for a layer's forward and backward in bf16."""
_HOST_FP8 = 0.65e-3
"""The same in FP8."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The sizes of a linear layer's products, and the scales of its input x."""

    M: int
    """Number of tokens in a forward pass."""
    N: int
    """Number of outputs."""
    K: int
    """Number of inputs."""
    fprop_kind: str
    """Kind of the scales of x in fprop (OperandSpec.kind): 1x128, 128x128, tensor or row; "" if x
    is not in FP8."""
    wgrad_kind: str
    """Kind of the scales of x in wgrad."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The modelled time of a layer's forward and backward, with new codes of x, g and w."""

    device: float
    """Seconds that the GPU works."""
    host: float
    """Seconds that eager code takes to ask for the kernels."""


def bf16_cost(layer: LayerShape) -> Cost:
    """Return what `layer` costs in bf16."""
    return Cost(device=3 * _operations(layer) / _BF16 + 3 * _KERNEL, host=_HOST_BF16)


def fp8_cost(layer: LayerShape) -> Cost:
    """Return what `layer` costs if x, w and g are in FP8 in fprop and dgrad. wgrad may be in
    bf16."""
    M = layer.M
    N = layer.N
    K = layer.K
    product = _operations(layer)
    whole = layer.fprop_kind in ("tensor", "row")
    rate = _FP8_WHOLE if whole else _FP8_BLOCKS
    wgrad_rate = {"1x128": _FP8_ROWS, "": _BF16}.get(layer.wgrad_kind, rate)
    elements = M * (N + K) + N * K
    quantising = 6 * elements / _WHOLE_BYTES if whole else 4 * elements / _BYTES
    device = 2 * product / rate + product / wgrad_rate + quantising + 6 * _KERNEL
    return Cost(device=device, host=_HOST_FP8)


def _operations(layer: LayerShape) -> int:
    """Return the operations of one of the three products."""
    return 2 * layer.M * layer.N * layer.K
