"""Quantisation errors of a model's converted layers, measured in single training steps.

    probe = Probe(model)
    with probe.sampling():          # one ordinary step: forward, backward
        model(**batch).loss.backward()
    probe.layers                    # {name: LayerProbe}

x and w are measured as fprop quantises them, g, the gradient of the layer's output, as dgrad does:
transformed where the recipe transforms them, and by the scales that the layer takes. Nothing else
changes: what is measured are copies, draws of stochastic rounding have a key of their own, amax
histories are read from a clone, so a probed step computes the same bits. Outside of sampled steps
nothing is hooked.

Compiled blocks do not run hooks that came after their compilation. A sampled step therefore runs
eagerly (`torch.compiler.set_stance`), without compiling anything anew; it costs an eager step, and
its sums may be rounded differently from a compiled one's.

Of a layer that runs several times in a step (gradient accumulation, activation checkpointing, which
repeats the forward) the first time counts. Of the experts of a mixture it is the one with the most
tokens. Layers of Transformer Engine's are not measured: their codes are made out of sight.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowprec.nn import LowPrecisionLinear, experts
from lowprec.nn.experts import ExpertProjection
from lowprec.quant import OperandSpec, quantize
from lowprec.recipe.state import history_name

SAMPLE = 1 << 20
"""Elements of an operand to measure at most, in whole rows."""
ROWS = 128
"""Rows are taken in multiples of this, so that blocks stay whole; at least as many, however long
they are."""

_OPERANDS = {"x": ("fprop", "a"), "w": ("fprop", "b"), "g": ("dgrad", "a")}


@dataclass(frozen=True, kw_only=True)
class LayerProbe:
    """Of one layer's operands x [M, K], w [N, K] and g [M, N], in one step.

    `sqnr` is the signal-to-quantisation-noise ratio 20 log10(|t| / |t - q(t)|) [dB]: infinite where
    nothing is lost, as of an operand that the recipe leaves as it arrives, and of a gradient that
    never came; NaN where the operand or its quantised form is not finite. `underflow` is the share
    of values that are not zero but quantise to it, `saturated` that of values cut to the format's
    largest, or turned into infinity by a format that overflows (fp16).
    """

    sqnr_x: float = math.inf
    sqnr_w: float = math.inf
    sqnr_g: float = math.inf
    underflow_x: float = 0.0
    underflow_w: float = 0.0
    underflow_g: float = 0.0
    saturated_x: float = 0.0
    saturated_w: float = 0.0
    saturated_g: float = 0.0


class Probe:
    """See the module.

    Args:
        model: converted, wrapped (DDP, FSDP2) or not; which of its layers are converted is asked
            anew at each `begin`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, LayerProbe] = {}
        """What the last sampled step showed: layers that ran in training mode, in the model's
        order."""
        self._handles: list[RemovableHandle] = []
        self._stance: Any = None
        self._found: dict[str, dict[str, Tensor]] = {}

    @property
    def armed(self) -> bool:
        """Between `begin` and `end`."""
        return bool(self._handles)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """`begin`, and `end` in the end; after an error the hooks are removed and `layers` stays as
        it was."""
        self.begin()
        try:
            yield
            self.end()
        finally:
            self._disarm()

    def cancel(self) -> None:
        """Remove the hooks of a step that was begun, and forget what they saw."""
        self._disarm()
        self._found = {}

    def begin(self) -> None:
        """Hook into the layers: the step that follows is measured. If a step was begun already, it
        is begun anew."""
        self._disarm()
        self._found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, LowPrecisionLinear):
                self._watch(name, module)
            elif experts.is_converted(module):
                for stack, projection in experts.projections_of(module).items():
                    self._watch(f"{name}.{stack}".lstrip("."), projection)
        # Who has not imported the compiler has compiled nothing, and importing it takes seconds.
        if self._handles and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")

    def _watch(self, name: str, module: LowPrecisionLinear | ExpertProjection) -> None:
        found = self._found[name] = {}
        before, after = _measure_inputs(found), self._watch_gradient(found)
        before.knows_gates = after.knows_gates = True  # see swiglu.is_hooked
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after))

    def end(self) -> dict[str, LayerProbe]:
        """Remove the hooks and read the results, the one synchronisation with the device. Returns
        `layers`."""
        self._disarm()
        found = {name: operands for name, operands in self._found.items() if operands}
        rows = [row for operands in found.values() for row in operands.values()]
        values = iter(
            torch.stack([row.to(rows[0].device) for row in rows]).tolist() if rows else ()
        )
        self.layers = {
            name: _layer_probe({operand: next(values) for operand in operands})
            for name, operands in found.items()
        }
        self._found = {}
        return self.layers

    def _disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def _watch_gradient(self, found: dict[str, Tensor]) -> Any:
        """A forward hook. The first output that has a gradient is not always the first one:
        reentrant checkpointing makes that without."""
        watched = False

        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            nonlocal watched
            if watched or not output.requires_grad or not module.training or not output.numel():
                return
            watched = True
            rows = _busiest(args[1])[1] if isinstance(module, ExpertProjection) else slice(None)
            self._handles.append(output.register_hook(lambda g: _keep(found, "g", g[rows], module)))

        return hook


def _measure_inputs(found: dict[str, Tensor]) -> Any:
    """A forward pre-hook: x as the layer takes it, after autocast and SwiGLU's product, and w."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        if "x" in found or not module.training or not x.numel():
            return
        if isinstance(module, ExpertProjection):
            _, counts, weight, _, transposed = args
            number, rows = _busiest(counts)
            _keep(found, "x", x[rows], module)
            _keep(found, "w", weight[number].t() if transposed else weight[number], module)
            return
        gate: Tensor | None = args[1] if len(args) > 1 else kwargs.get("times_silu_of")
        with torch.no_grad():
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
                x, gate = x.to(dtype), None if gate is None else gate.to(dtype)
            if gate is not None:
                x = nn.functional.silu(gate) * x
            _keep(found, "x", x, module)
            _keep(found, "w", module.weight, module)

    return hook


def _busiest(counts: list[int]) -> tuple[int, slice]:
    """The expert with the most tokens, and where they are."""
    number = max(range(len(counts)), key=lambda expert: counts[expert])
    start = sum(counts[:number])
    return number, slice(start, start + counts[number])


@torch.no_grad()
def _keep(found: dict[str, Tensor], operand: str, t: Tensor, module: Any) -> None:
    gemm, side = _OPERANDS[operand]
    spec = module.recipe.gemm(gemm)
    source = getattr(spec, side)
    if (
        type(t).__name__ == "DTensor"
    ):  # a layer that is a unit of FSDP2 by itself is not gathered yet: its own shard
        t = t.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    t = t.detach().reshape(-1, t.shape[-1])
    if not isinstance(source, OperandSpec) or not t.numel():
        found[operand] = torch.zeros(4, dtype=torch.float64, device=t.device)
        return
    if spec.hadamard is not None:
        t = spec.hadamard.apply(t)
    history = module._buffers.get(history_name(gemm, side))
    found[operand] = _figures(t, source, None if history is None else history.clone())


def _figures(t_RK: Tensor, spec: OperandSpec, history: Tensor | None) -> Tensor:
    """Squares of signal and noise, shares of underflow and saturation: fp64 [4], on t's device."""
    sample, rows = _sample(t_RK, spec)
    key = torch.zeros(2, dtype=torch.int64, device=t_RK.device) if spec.stochastic else None
    q = quantize(sample, spec, key=key, history=history, decoded=True, saturation=True)
    plain, value = sample[:rows].to(torch.float32), q.dequantize()[:rows]
    cut = value.isinf() & plain.isfinite() if q.saturated is None else q.saturated[:rows]
    # fp64 throughout: squares of small gradients leave fp32's range.
    wide = plain.double()
    noise = (wide - value.double()).square_().sum()
    underflow = ((value == 0) & (plain != 0)).double().mean()
    return torch.stack((wide.square_().sum(), noise, underflow, cut.double().mean()))


def _sample(t_RK: Tensor, spec: OperandSpec) -> tuple[Tensor, int]:
    """The leading rows to measure and their number. Where a scale spans all rows, two more rows
    have the extremes of each column."""
    rows = max(ROWS, SAMPLE // t_RK.shape[1] // ROWS * ROWS)
    if rows >= t_RK.shape[0]:
        return t_RK, t_RK.shape[0]
    scaling = spec.scaling
    if scaling is None or (scaling.block[0] != -1 and scaling.scale_format != "e4m3"):
        return t_RK[:rows], rows
    return torch.cat((t_RK[:rows], t_RK.amax(0, keepdim=True), t_RK.amin(0, keepdim=True))), rows


def _layer_probe(operands: dict[str, list[float]]) -> LayerProbe:
    fields = {}
    for operand, (signal, noise, underflow, saturated) in operands.items():
        fields |= {
            f"sqnr_{operand}": _decibels(signal, noise),
            f"underflow_{operand}": underflow,
            f"saturated_{operand}": saturated,
        }
    return LayerProbe(**fields)


def _decibels(signal: float, noise: float) -> float:
    if not math.isfinite(signal) or not math.isfinite(noise):
        return math.nan
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal else -math.inf
