"""Benchmark of the forward and backward of one linear layer without bias, against nn.Linear in bf16
and other libraries' layers.

Weight, input and gradient are bf16. Before each step there is no gradient, as after an optimizer's
zero_grad. The input is a new tensor object in each step, as in training, because a layer may reuse
the codes of a tensor that it has seen. The weight does not change between the steps, so a layer
that caches the codes of its weight quantises it once. The row "weight quantised each step" discards
these codes before each step, as an optimizer's step does.

Each layer is timed in turns with the bf16 layer, and its speed-up is relative to that time. A GPU
at its power limit slows down as it heats up, often by more than the differences of interest.

Errors are relative in the Frobenius norm, to fp32 products of the same bf16 matrices.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.bench import rivals
from lowprec.bench.ceilings import MATRICES, Ceilings, Floor, Shape, flops
from lowprec.bench.inputs import describe, open_device, resolve_recipe
from lowprec.bench.rivals import Layer
from lowprec.bench.timing import measure, measure_in_turns
from lowprec.nn import LowPrecisionLinear
from lowprec.nn.codes import forget_weights
from lowprec.recipe import Recipe

RIVALS = ("bf16", "torchao", "te")

_ALL_MATRICES = tuple(MATRICES)
_KEEPS_WEIGHT = ("x", "g")
"""The matrices that a layer quantises in each step if it caches the weight's codes."""


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
        against: rivals from `RIVALS` to run as well; bf16 always runs.
        compiled: also measure our layer through torch.compile.
        seconds: the time that each measurement takes.
        report: called with each row as soon as it is measured; some rivals tune themselves for
            minutes.
    Returns:
        {"device", "threads", "torch", "recipe", "rows": [{"shape", "name", "time", "bf16",
        "speedup", "tflops", "floor", "of_floor", "errors": {"y", "dx", "dw"}, "failure"}],
        "ceilings"}. "bf16" is the timing of the bf16 layer in turns with this one, and "speedup" is
        relative to it. "failure" is None, or the reason why there are no figures.
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
            for quantised in (_KEEPS_WEIGHT, _ALL_MATRICES)
        }
        for name, make, quantised in _contenders(chosen, against, compiled):
            floor = ceilings.layer_floor(shape, None) if quantised is None else floors[quantised]
            rows.append({"shape": list(shape), "name": name} | case.measure(make, floor, seconds))
            report(rows[-1])
            rivals.release_memory()
    return {**describe(place), "recipe": recipe, "rows": rows, "ceilings": ceilings.to_list()}


Contender = tuple[str, Callable[[nn.Linear], Layer] | None, tuple[str, ...] | None]
"""A row's name, the function that makes the layer from the bf16 layer (None: the bf16 layer
itself), and the matrices that the layer must quantise in each step (None: no matrix)."""


def _contenders(recipe: Recipe, against: Sequence[str], compiled: bool) -> Iterable[Contender]:
    yield "bf16", None, None
    yield "lowprec", lambda linear: _ours(linear, recipe), _KEEPS_WEIGHT
    yield (
        "lowprec, weight quantised each step",
        lambda linear: _ours(linear, recipe, before=forget_weights),
        _ALL_MATRICES,
    )
    if compiled:
        yield "lowprec compiled", lambda linear: _ours(linear, recipe, compiled=True), _ALL_MATRICES
    if "torchao" in against:
        for name, make in rivals.torchao_layers().items():
            yield name, make, _ALL_MATRICES
    if "te" in against:
        for name, make in rivals.te_layers().items():
            yield name, make, _KEEPS_WEIGHT if "cached" in name else _ALL_MATRICES


def _ours(
    linear: nn.Linear,
    recipe: Recipe,
    *,
    before: Callable[[], None] | None = None,
    compiled: bool = False,
) -> Layer:
    """Return our layer. `before` is called before each forward."""
    layer = LowPrecisionLinear.from_linear(copy.deepcopy(linear), recipe)
    forward = rivals.compiled(layer) if compiled else layer
    if before is None:
        return forward, layer.weight

    def call_before_and_forward(x: Tensor) -> Tensor:
        before()
        return forward(x)

    return call_before_and_forward, layer.weight


class _Case:
    """One shape's matrices: x [M, K], g [M, N] and the layer's weight [N, K], all bf16."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        M, N, K = shape
        self.shape = shape
        self.device = device
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, cols: int) -> Tensor:
            return torch.randn(rows, cols, generator=generator, device=device, dtype=torch.bfloat16)

        self.x = normal(M, K).requires_grad_()
        self.g = normal(M, N)
        self.linear = nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            self.linear.weight.copy_(normal(N, K) * K**-0.5)

    def measure(
        self, make: Callable[[nn.Linear], Layer] | None, floor: Floor, seconds: float
    ) -> dict[str, Any]:
        """Return the figures of one layer (None: the bf16 layer), or the reason why it failed."""

        def bf16() -> object:
            return self._step(self.linear, self.linear.weight)

        def figures() -> dict[str, Any]:
            if make is None:
                forward = self.linear
                weight = self.linear.weight
                time = measure(bf16, self.device, seconds=seconds)
                bf16_time = time
            else:
                forward, weight = make(self.linear)
                bf16_time, time = measure_in_turns(
                    bf16, lambda: self._step(forward, weight), self.device, seconds=seconds
                )
            # Errors come after the timing: by then delayed scaling has an amax history.
            errors = self._errors(*self._step(forward, weight))
            return {
                "time": asdict(time),
                "bf16": asdict(bf16_time),
                "speedup": bf16_time.median / time.median,
                "tflops": 3 * flops(self.shape) / time.median / 1e9,
                **floor.beside(time),
                "errors": errors,
                "failure": None,
            }

        result, failure = rivals.attempt(figures)
        if result is None:
            self.x.grad = None
            self.linear.weight.grad = None
            return (
                dict.fromkeys(("time", "bf16", "speedup", "tflops", "of_floor", "errors"))
                | floor.beside(None)
                | {"failure": failure}
            )
        return result

    def _step(
        self, forward: Callable[[Tensor], Tensor], weight: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run one forward and backward, return y, dx and dw, and clear the gradients."""
        y = forward(self.x.view_as(self.x))
        y.backward(self.g)
        dx = self.x.grad
        dw = weight.grad
        self.x.grad = None
        weight.grad = None
        return y.detach(), dx, dw

    def _errors(self, y: Tensor, dx: Tensor | None, dw: Tensor | None) -> dict[str, float | None]:
        x, w, g = (t.detach().float() for t in (self.x, self.linear.weight, self.g))
        exact = {
            "y": lambda: x @ w.t(),  # [M, K] . [N, K]^T -> [M, N]
            "dx": lambda: g @ w,  # [M, N] . [N, K] -> [M, K]
            "dw": lambda: g.t() @ x,  # [M, N]^T . [M, K] -> [N, K]
        }
        return {
            name: _relative_error(value, exact[name]())
            for name, value in (("y", y), ("dx", dx), ("dw", dw))
        }


def _relative_error(value: Tensor | None, exact: Tensor) -> float | None:
    return None if value is None else ((value.float() - exact).norm() / exact.norm()).item()
