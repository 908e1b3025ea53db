"""Whether FP8 pays for a linear layer on a Hopper GPU: forward and backward modelled by counting,
with rates measured there.

    products     6 M N K operations; wgrad contracts tokens, and in FP8 it is the slower third
    quantising   x, g and the weight, read once and written in two directions: 4 bytes an element
    kernels      6 in FP8 and 3 in bf16, with a few microseconds each to start and to end
    the host     asking for them takes longer than small ones run; compiled models ask ahead, so there it does not count

`auto` leaves a layer in high precision for which this gives no gain. The constants are of one H100
and its host; benchmarks/payoff_grid.py compares it with measured layers (docs/experiments.md).
Another host moves the threshold of eager code.
"""

from dataclasses import dataclass

SMALLEST = 1.0
"""Modelled speed-up below which FP8 does not pay. Of the layers measured (tests/test_payoff.py) the
model gives three 0.98 that have 0.95 to 0.97; none to which it gives a gain is slower than in
bf16."""

TOKENS = 2048
"""What a forward pass is taken to have if nobody says."""

_BF16, _FP8_BLOCKS, _FP8_ROWS, _FP8_WHOLE = 700e12, 1080e12, 930e12, 1250e12
"""Operations a second: bf16; 1x128 by 128x128; 1x128 by 1x128; per tensor or row."""
_BYTES, _WHOLE_BYTES = 2.6e12, 1.2e12
"""Bytes a second of the quantisers, and of those with scales per tensor or row, which read
twice."""
_KERNEL = 6e-6
_HOST_BF16, _HOST_FP8 = 0.27e-3, 0.65e-3
"""Seconds that eager code takes to ask for one layer's forward and backward."""


@dataclass(frozen=True, kw_only=True)
class Payoff:
    """The modelled speed-up over bf16 of one layer, and what limits it."""

    speedup: float
    limit: str

    @property
    def pays(self) -> bool:
        return self.speedup >= SMALLEST


def payoff(
    N: int,
    K: int,
    wgrad_kind: str,
    tokens: int | None = None,
    compiled: bool = False,
    *,
    fprop_kind: str | None = None,
) -> Payoff:
    """The speed-up of a layer with N outputs and K inputs.

    Args:
        wgrad_kind: the kind of scales of wgrad's x (OperandSpec.kind): 1x128, 128x128, tensor or
            row; "" for bf16 operands there.
        tokens: M of a forward pass; None: `TOKENS`.
        compiled: whether the model is compiled, so that the host runs ahead.
        fprop_kind: the kind of scales of fprop's x, if that is not wgrad's.
    """
    M = tokens or TOKENS
    product = 2 * M * N * K
    whole = (wgrad_kind if fprop_kind is None else fprop_kind) in ("tensor", "row", "")
    blocks = _FP8_WHOLE if whole else _FP8_BLOCKS
    wgrad = {"1x128": _FP8_ROWS, "": _BF16}.get(wgrad_kind, blocks)
    quantising = (6 if whole else 4) * (M * (N + K) + N * K) / (_WHOLE_BYTES if whole else _BYTES)
    fp8 = 2 * product / blocks + product / wgrad + quantising + 6 * _KERNEL
    bf16 = 3 * product / _BF16 + 3 * _KERNEL
    by_device = bf16 / fp8
    if compiled:
        return Payoff(speedup=by_device, limit="quantising takes more than the products save")
    by_host = max(bf16, _HOST_BF16) / max(fp8, _HOST_FP8)
    limit = (
        "the host can't ask for its kernels as fast"
        if fp8 < _HOST_FP8
        else "quantising takes more than the products save"
    )
    return Payoff(speedup=by_host, limit=limit)
