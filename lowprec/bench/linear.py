"""Forward and backward of one linear layer without bias, beside nn.Linear in bf16 and other
libraries' layers.

bf16 weight, input and gradient; no gradient is there before a step, as after an optimizer's
zero_grad. The input is a new tensor object in each step, as in training: a layer may keep what it
made of a tensor it has seen. The weight does not change between the steps, so a layer that keeps
its codes quantises it once; "weight quantised each step" makes ours forget them, as an optimizer's
step would.

Each layer is timed in turns with the bf16 one, and its speed-up is over that time: a GPU at its
power limit slows down as it heats up, by more than many a difference that is to be seen here.

Errors are relative in the Frobenius norm, to fp32 products of the same bf16 matrices.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.bench import rivals
from lowprec.bench.ceilings import MATRICES, Ceilings, Floor, Shape
from lowprec.bench.inputs import describe, open_device, resolve_recipe
from lowprec.bench.rivals import Layer
from lowprec.bench.timing import measure, measure_in_turns
from lowprec.nn import LowPrecisionLinear
from lowprec.recipe import Recipe

RIVALS = ("bf16", "torchao", "te")

_KEEPS_WEIGHT = ("x", "g")
"""What a layer quantises in each step if it keeps the weight's codes."""


def run(
    device: str = "cpu",
    shapes: Sequence[Shape] = ((512, 512, 512),),
    recipe: str = "fp8_blockwise",
    against: Sequence[str] = (),
    compiled: bool = False,
    seconds: float = 0.5,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure a linear layer of each shape (tokens M, outputs N, inputs K).

    Args:
        against: rivals to run as well, of `RIVALS`; bf16 always runs.
        compiled: also measure ours through torch.compile.
        seconds: the time that each measurement takes.
        report: called with each row as soon as it is there; some rivals tune themselves for
            minutes.
    Returns:
        {"device", "threads", "torch", "recipe", "rows": [{"shape", "name", "time", "bf16": timing
        of the bf16 layer in turns with this one, "speedup": over that, "tflops", "floor",
        "of_floor", "errors": {"y", "dx", "dw"}, "failure"}], "ceilings"}; "failure" is None, or why
        there are no figures.
    Raises:
        UserError: an unknown recipe, rival or device, or a rival that is not installed.
    """
    place = open_device(device)
    rivals.check(against, RIVALS)
    chosen = resolve_recipe(recipe)
    ceilings = Ceilings(place, seconds)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        case = _Case(shape, place)
        floors = {
            quantised: ceilings.layer_floor(shape, chosen, quantised)
            for quantised in (_KEEPS_WEIGHT, tuple(MATRICES))
        }
        for name, make, quantised in _contenders(chosen, against, compiled):
            floor = ceilings.layer_floor(shape, None) if quantised is None else floors[quantised]
            rows.append({"shape": list(shape), "name": name} | case.measure(make, floor, seconds))
            report(rows[-1])
            rivals.release_memory()
    return {**describe(place), "recipe": recipe, "rows": rows, "ceilings": ceilings.to_list()}


Contender = tuple[str, Callable[[nn.Linear], Layer] | None, tuple[str, ...] | None]
"""A row's name, what makes the layer from the bf16 one (None: that one itself), and what it must
quantise in each step (None: nothing)."""


def _contenders(recipe: Recipe, against: Sequence[str], compiled: bool) -> Iterable[Contender]:
    everything = tuple(MATRICES)
    yield "bf16", None, None
    yield "lowprec", lambda linear: _ours(linear, recipe), _KEEPS_WEIGHT
    if (forget := _forget_weights()) is not None:
        yield (
            "lowprec, weight quantised each step",
            lambda linear: _ours(linear, recipe, before=forget),
            everything,
        )
    if compiled:
        yield "lowprec compiled", lambda linear: _ours(linear, recipe, compiled=True), everything
    for name, make in (rivals.torchao_layers() if "torchao" in against else {}).items():
        yield name, make, everything
    for name, make in (rivals.te_layers() if "te" in against else {}).items():
        yield name, make, _KEEPS_WEIGHT if "cached" in name else everything


def _ours(
    linear: nn.Linear,
    recipe: Recipe,
    *,
    before: Callable[[], None] | None = None,
    compiled: bool = False,
) -> Layer:
    layer = LowPrecisionLinear.from_linear(copy.deepcopy(linear), recipe)
    forward = rivals.compiled(layer) if compiled else layer
    if before is None:
        return forward, layer.weight

    def forward_afresh(x: Tensor) -> Tensor:
        before()
        return forward(x)

    return forward_afresh, layer.weight


def _forget_weights() -> Callable[[], None] | None:
    """What makes our layers quantise their weights again; None if they do so anyway."""
    try:
        from lowprec.nn.codes import forget_weights
    except ImportError:
        return None
    return forget_weights


class _Case:
    """One shape's matrices: x [M, K], g [M, N] and the layer's weight [N, K], all bf16."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        M, N, K = self.shape = shape
        self.device = device
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, cols: int) -> Tensor:
            return torch.randn(rows, cols, generator=generator, device=device, dtype=torch.bfloat16)

        self.x, self.g = normal(M, K).requires_grad_(), normal(M, N)
        self.linear = nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            self.linear.weight.copy_(normal(N, K) * K**-0.5)

    def measure(
        self, make: Callable[[nn.Linear], Layer] | None, floor: Floor, seconds: float
    ) -> dict[str, Any]:
        """The figures of one layer (None: the bf16 one), or why it failed."""

        def bf16() -> object:
            return self._step(self.linear, self.linear.weight)

        def figures() -> dict[str, Any]:
            forward, weight = (
                (self.linear, self.linear.weight) if make is None else make(self.linear)
            )
            if make is None:
                time = beside = measure(bf16, self.device, seconds=seconds)
            else:
                beside, time = measure_in_turns(
                    bf16, lambda: self._step(forward, weight), self.device, seconds=seconds
                )
            M, N, K = self.shape
            figures = {
                "time": asdict(time),
                "bf16": asdict(beside),
                "speedup": beside.median / time.median,
            }
            # After the timing: delayed scaling has seen amaxes by then.
            errors = self._errors(*self._step(forward, weight))
            return {
                **figures,
                "tflops": 6.0 * M * N * K / time.median / 1e9,
                **floor.beside(time),
                "errors": errors,
                "failure": None,
            }

        result, failure = rivals.attempt(figures)
        if result is None:
            self.x.grad = self.linear.weight.grad = None
            return (
                dict.fromkeys(("time", "bf16", "speedup", "tflops", "of_floor", "errors"))
                | floor.beside(None)
                | {"failure": failure}
            )
        return result

    def _step(
        self, forward: Callable[[Tensor], Tensor], weight: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y, dx, dw of one forward and backward; no gradient is left behind."""
        y = forward(self.x.view_as(self.x))
        y.backward(self.g)
        dx, dw = self.x.grad, weight.grad
        self.x.grad = weight.grad = None
        return y.detach(), dx, dw

    def _errors(self, y: Tensor, dx: Tensor | None, dw: Tensor | None) -> dict[str, float | None]:
        x, w, g = (t.detach().float() for t in (self.x, self.linear.weight, self.g))
        exact = {"y": lambda: x @ w.t(), "dx": lambda: g @ w, "dw": lambda: g.t() @ x}
        return {
            name: _relative_error(value, exact[name]())
            for name, value in (("y", y), ("dx", dx), ("dw", dw))
        }


def _relative_error(value: Tensor | None, exact: Tensor) -> float | None:
    return None if value is None else ((value.float() - exact).norm() / exact.norm()).item()
