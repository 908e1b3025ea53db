"""Quantisation errors of a model's converted layers, measured in single training steps.

    probe = Probe(model)
    with probe.sampling():          # one ordinary step: forward, backward
        model(**batch).loss.backward()
    probe.layers                    # {name: LayerProbe}

The probe quantises x and w as fprop does, and g, the gradient of the layer's output, as dgrad does:
with the recipe's Hadamard transform, if it has one, and with the layer's scales.

A probed step computes the same bits as any other step. The probe measures copies, its draws for
stochastic rounding have a key of their own, and it reads amax histories from a clone. Outside
sampled steps, no hook is installed.

Compiled blocks do not run hooks that were added after their compilation. A sampled step therefore
runs eagerly (`torch.compiler.set_stance`) and recompiles nothing. It costs as much as an eager
step, and its sums may be rounded differently from those of a compiled step.

If a layer runs several times in a step (gradient accumulation; activation checkpointing, which
repeats the forward), the probe measures its first run. Of a mixture of experts, it measures the
expert with the most tokens. It does not measure layers of Transformer Engine, which make their
codes inside the library.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowprec.nn import LowPrecisionLinear, experts
from lowprec.nn.experts import ExpertProjection
from lowprec.nn.known import is_dtensor
from lowprec.quant import OperandSpec, quantize
from lowprec.recipe.state import history_name

SAMPLE = 1 << 20
"""Maximum number of elements that are measured of an operand, in whole rows."""
ROWS = 128
"""Step of the number of measured rows, so that blocks stay whole. At least this many rows are
measured, however long they are."""

# x and w are measured as operands of fprop, g as an operand of dgrad: (gemm, side).
_OPERANDS = {"x": ("fprop", "a"), "w": ("fprop", "b"), "g": ("dgrad", "a")}


@dataclass(frozen=True, kw_only=True)
class LayerProbe:
    """The quantisation errors of one layer's operands x [M, K], w [N, K] and g [M, N] in one step.

    `sqnr` is the signal-to-quantisation-noise ratio 20 log10(|t| / |t - q(t)|) in dB. It is
    infinite if nothing is lost, because the recipe does not quantise the operand or the layer got
    no gradient. It is NaN if the operand or its quantised form is not finite.

    `underflow` is the share of non-zero values that quantise to zero. `saturated` is the share of
    values that are cut to the format's largest, or that become infinity in a format that overflows
    (fp16).
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
    """A probe that measures quantisation errors in single training steps (see the module).

    Args:
        model: a converted model, wrapped (DDP, FSDP2) or not. Each `begin` looks for its converted
            layers again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, LayerProbe] = {}
        """Results of the last sampled step: the layers that ran in training mode, in the model's
        order."""
        self._handles: list[RemovableHandle] = []
        self._stance: AbstractContextManager[Any] | None = None
        self._found: dict[str, dict[str, Tensor]] = {}

    @property
    def armed(self) -> bool:
        """Flag: the hooks are installed, between `begin` and `end`."""
        return bool(self._handles)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Measure the step that runs in this context: `begin` at its start, `end` at its end.

        After an error, the hooks are removed and `layers` stays as it was.
        """
        self.begin()
        try:
            yield
            self.end()
        finally:
            self._disarm()

    def cancel(self) -> None:
        """Remove the hooks of a step that was begun, and discard what they measured."""
        self._disarm()
        self._found = {}

    def begin(self) -> None:
        """Install the hooks that measure the next step. A step already begun starts again."""
        self._disarm()
        self._found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, LowPrecisionLinear):
                self._watch(name, module)
            elif experts.is_converted(module):
                for stack, projection in experts.projections_of(module).items():
                    self._watch(f"{name}.{stack}".lstrip("."), projection)
        # Importing the compiler takes seconds. If nobody imported it, nothing is compiled.
        if self._handles and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")

    def _watch(self, name: str, module: LowPrecisionLinear | ExpertProjection) -> None:
        found: dict[str, Tensor] = {}
        self._found[name] = found
        before = _measure_inputs(found)
        after = self._watch_gradient(found)
        # The hooks handle `times_silu_of`, so SwiGLU stays fused (see swiglu.is_hooked).
        before.knows_gates = True
        after.knows_gates = True
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after))

    def end(self) -> dict[str, LayerProbe]:
        """Remove the hooks, read the results and return `layers`.

        Reading the results is the only synchronisation with the device.
        """
        self._disarm()
        found = {name: operands for name, operands in self._found.items() if operands}
        rows = [row for operands in found.values() for row in operands.values()]
        table = torch.stack([row.to(rows[0].device) for row in rows]).tolist() if rows else []
        values = iter(table)
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
        """Return a forward hook that measures the gradient of the first output that has one.

        This is not always the first output: reentrant checkpointing makes its first without a
        gradient.
        """
        watched = False

        def hook(
            module: LowPrecisionLinear | ExpertProjection, args: tuple[Any, ...], output: Tensor
        ) -> None:
            nonlocal watched
            if watched or not output.requires_grad or not module.training or not output.numel():
                return
            watched = True
            rows = slice(None)
            if isinstance(module, ExpertProjection):
                _, rows = _busiest_expert(args[1])
            self._handles.append(output.register_hook(lambda g: _keep(found, "g", g[rows], module)))

        return hook


def sqnr_scalars(layers: Mapping[str, LayerProbe]) -> dict[str, float]:
    """Return the lowest and the median signal-to-quantisation-noise ratio [dB] of x, w and g over
    the layers: {"sqnr_x_min": ..., "sqnr_x_median": ..., ...}."""
    values = {}
    for name in _OPERANDS:
        found = sorted(getattr(layer, f"sqnr_{name}") for layer in layers.values())
        if found:
            values[f"sqnr_{name}_min"] = found[0]
            values[f"sqnr_{name}_median"] = found[len(found) // 2]
    return values


def _measure_inputs(found: dict[str, Tensor]) -> Any:
    """Return a forward pre-hook that measures w, and x after autocast and SwiGLU's product."""

    def hook(
        module: LowPrecisionLinear | ExpertProjection,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        if "x" in found or not module.training or not x.numel():
            return
        if isinstance(module, ExpertProjection):
            _, counts, weight, _, transposed = args
            number, rows = _busiest_expert(counts)
            _keep(found, "x", x[rows], module)
            _keep(found, "w", weight[number].t() if transposed else weight[number], module)
            return
        gate: Tensor | None = args[1] if len(args) > 1 else kwargs.get("times_silu_of")
        with torch.no_grad():
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
                x = x.to(dtype)
                gate = None if gate is None else gate.to(dtype)
            if gate is not None:
                x = nn.functional.silu(gate) * x
            _keep(found, "x", x, module)
            _keep(found, "w", module.w_NK, module)

    return hook


def _busiest_expert(counts: list[int]) -> tuple[int, slice]:
    """Return the number of the expert with the most tokens, and the slice of its rows."""
    number = max(range(len(counts)), key=lambda expert: counts[expert])
    start = sum(counts[:number])
    return number, slice(start, start + counts[number])


@torch.no_grad()
def _keep(
    found: dict[str, Tensor],
    operand: str,
    t: Tensor,
    module: LowPrecisionLinear | ExpertProjection,
) -> None:
    """Measure the operand x, w or g of a layer, and put its figures into `found`."""
    gemm, side = _OPERANDS[operand]
    spec = module.recipe.gemm(gemm)
    source = getattr(spec, side)
    if is_dtensor(t):
        # A layer that is an FSDP2 unit by itself is not gathered yet. Measure this rank's shard.
        t = t.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    t = t.detach().reshape(-1, t.shape[-1])
    if not isinstance(source, OperandSpec) or not t.numel():
        found[operand] = torch.zeros(4, dtype=torch.float64, device=t.device)
        return
    if spec.hadamard is not None:
        # Any signs give such figures: fresh ones need not be those of the pass.
        t = spec.hadamard.apply(t, torch.zeros(2, dtype=torch.int64, device=t.device))
    history = module._buffers.get(history_name(gemm, side))
    found[operand] = _figures(t, source, None if history is None else history.clone())


def _figures(t_RK: Tensor, spec: OperandSpec, history: Tensor | None) -> Tensor:
    """Return the sums of squares of signal and noise and the shares of underflow and saturation,
    fp64 [4] on t's device."""
    sample, rows = _sample(t_RK, spec)
    key = torch.zeros(2, dtype=torch.int64, device=t_RK.device) if spec.stochastic else None
    q = quantize(sample, spec, key=key, history=history, decoded=True, saturation=True)
    plain = sample[:rows].to(torch.float32)
    value = q.dequantize()[:rows]
    cut = value.isinf() & plain.isfinite() if q.saturated is None else q.saturated[:rows]
    # fp64, because squares of small gradients leave fp32's range.
    wide = plain.double()
    noise = (wide - value.double()).square_().sum()
    underflow = ((value == 0) & (plain != 0)).double().mean()
    return torch.stack((wide.square_().sum(), noise, underflow, cut.double().mean()))


def _sample(t_RK: Tensor, spec: OperandSpec) -> tuple[Tensor, int]:
    """Return the leading rows to measure and their number.

    If a scale spans all rows, the sample has two more rows with the extremes of each column.
    """
    rows = max(ROWS, SAMPLE // t_RK.shape[1] // ROWS * ROWS)
    if rows >= t_RK.shape[0]:
        return t_RK, t_RK.shape[0]
    scaling = spec.scaling
    if scaling is None or (scaling.block[0] != -1 and scaling.scale_format != "e4m3"):
        return t_RK[:rows], rows
    return torch.cat((t_RK[:rows], t_RK.amax(0, keepdim=True), t_RK.amin(0, keepdim=True))), rows


def _layer_probe(operands: dict[str, list[float]]) -> LayerProbe:
    """Return the LayerProbe of the figures of x, w and g."""
    fields = {}
    for operand, (signal, noise, underflow, saturated) in operands.items():
        fields |= {
            f"sqnr_{operand}": _decibels(signal, noise),
            f"underflow_{operand}": underflow,
            f"saturated_{operand}": saturated,
        }
    return LayerProbe(**fields)


def _decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise): infinite without noise, NaN if one of them is not finite."""
    if not math.isfinite(signal) or not math.isfinite(noise):
        return math.nan
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal else -math.inf
