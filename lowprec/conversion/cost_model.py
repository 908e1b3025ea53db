"""Compare the cost of a layer with bf16's, to decide whether FP8 pays on a Hopper GPU.

GEMM backends say what a layer costs with their products (`GemmBackend.cost`, `gemm/cost.py`).
`auto` keeps a layer in high precision if the model shows no gain for it. In eager code a layer
takes as long as the GPU or the host, whichever is slower; in compiled code the host runs ahead and
does not count. On another host than the measured one, the threshold of eager code is another.
"""

from dataclasses import dataclass

from lowprec.gemm import BACKENDS, Cost, LayerShape
from lowprec.gemm.cost import bf16_cost

SMALLEST = 1.0
"""Modelled speed-up below which FP8 does not pay. Among the measured layers
(tests/conversion/test_cost_model.py) three have 0.95 to 0.97 where the model gives 0.98; no layer
for which the model gives a gain is slower than in bf16."""

TOKENS = 2048
"""Default number of tokens in a forward pass."""


@dataclass(frozen=True, kw_only=True)
class Payoff:
    """The modelled speed-up of one layer over bf16, and its limit in words."""

    speedup: float
    limit: str

    @property
    def pays(self) -> bool:
        """Flag: the layer is at least as fast as in bf16."""
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
    """Return the speed-up of an FP8 layer with N outputs and K inputs, by the fastest of the
    backends that state a cost.

    Args:
        wgrad_kind: kind of the scales of wgrad's x (OperandSpec.kind): 1x128, 128x128, tensor or
            row; "" if that product is in bf16.
        tokens: M of a forward pass; None: `TOKENS`.
        compiled: whether the model is compiled, so that the host runs ahead.
        fprop_kind: kind of the scales of fprop's x; None: as wgrad's, or "row" if that has none.
    """
    layer = LayerShape(
        M=tokens or TOKENS,
        N=N,
        K=K,
        fprop_kind=(wgrad_kind or "row") if fprop_kind is None else fprop_kind,
        wgrad_kind=wgrad_kind,
    )
    costs = (backend.cost(layer) for backend in BACKENDS.values())
    fastest = min((cost for cost in costs if cost is not None), key=lambda cost: cost.device)
    return against_bf16(fastest, layer, compiled=compiled)


def against_bf16(cost: Cost, layer: LayerShape, *, compiled: bool) -> Payoff:
    """Return the speed-up over bf16 of `layer`, which has this cost."""
    bf16 = bf16_cost(layer)
    if compiled:
        speedup = bf16.device / cost.device
    else:
        speedup = max(bf16.device, bf16.host) / max(cost.device, cost.host)
    if not compiled and cost.device < cost.host:
        return Payoff(speedup=speedup, limit="the host can't ask for its kernels as fast")
    return Payoff(speedup=speedup, limit="quantising takes more than the products save")
