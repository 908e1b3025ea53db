"""`lowprec bench`: what the parts cost on this machine. The measuring itself is in `lowprec.bench`,
that of training steps in `lowprec.cli.bench_train`."""

from collections.abc import Callable
from typing import Any

import click

from lowprec.cli.common import JSON, Group, answers
from lowprec.errors import UserError, shown
from lowprec.files import to_json

_LONGEST_S = 3600.0


class Seconds(click.ParamType):
    """A time in seconds, from 0 to an hour."""

    name = "seconds"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Return the time as a float; fail for text, NaN and times out of the range."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds <= _LONGEST_S:
            self.fail(f"expected seconds from 0 to {_LONGEST_S:g}, got {shown(value)}", param, ctx)
        return seconds


_DEVICE = click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
_SHAPES = click.option(
    "--shape",
    default="512x512x512",
    show_default=True,
    help="Layers: tokens x outputs x inputs, MxNxK, joined by commas.",
)
_RECIPE = click.option("--recipe", default="fp8_blockwise", show_default=True, help="The recipe.")
_SECONDS = click.option(
    "--seconds",
    default=0.5,
    show_default=True,
    type=Seconds(),
    help="Time that each row is measured for.",
)


def _against(known: str) -> Callable[..., Any]:
    text = f"Rivals to measure in the same run, joined by commas: {known}"
    return click.option("--against", default="", help=text)


@click.group("bench", cls=Group)
def command() -> None:
    """Measure what the parts cost on this machine."""


@command.command("quantize")
@_DEVICE
@_against("torchao.")
@click.option(
    "--shape", default="2048x1024", show_default=True, help="Rows x columns of the matrix."
)
@click.option(
    "--dtype", default="fp32", show_default=True, help="Format of the matrix: fp32 or bf16."
)
@click.option("--compile", "compiled", is_flag=True, help="Through torch.compile, rivals as well.")
@JSON
@answers
def quantize_command(
    device: str, against: str, shape: str, dtype: str, compiled: bool, as_json: bool
) -> str:
    """Quantise and dequantise a matrix in every format, beside a copy of it; on a GPU also make FP8
    codes."""
    rows, _, columns = shape.partition("x")
    if not (_is_size(rows) and _is_size(columns)):
        raise UserError(f"--shape: expected ROWSxCOLUMNS like 2048x1024, got {shown(shape)}")
    from lowprec.bench import quantize
    from lowprec.cli.tables import bench_table

    rivals = _names(against)
    result = quantize.run(device, rivals, (int(rows), int(columns)), compiled, dtype)
    return to_json(result, indent=1) if as_json else bench_table(result, rivals)


@command.command("gemm")
@_DEVICE
@_SHAPES
@_RECIPE
@_against("torchao. bf16 always runs.")
@click.option(
    "--backend",
    default="",
    help="Backends to measure, joined by commas; by default all that are native.",
)
@_SECONDS
@JSON
@answers
def gemm_command(
    device: str, shape: str, recipe: str, against: str, backend: str, seconds: float, as_json: bool
) -> str:
    """Multiply a recipe's operands, as each GEMM of a linear layer does, by every backend that can,
    beside torch in bf16."""
    shapes = _shapes(shape)
    from lowprec.bench import gemm
    from lowprec.cli.tables import gemm_table

    result = gemm.run(device, shapes, recipe, _names(against), _names(backend), seconds)
    return to_json(result, indent=1) if as_json else gemm_table(result)


@command.command("linear")
@_DEVICE
@_SHAPES
@_RECIPE
@_against("torchao, te. bf16 always runs.")
@click.option("--compile", "compiled", is_flag=True, help="Also ours through torch.compile.")
@_SECONDS
@JSON
@answers
def linear_command(
    device: str,
    shape: str,
    recipe: str,
    against: str,
    compiled: bool,
    seconds: float,
    as_json: bool,
) -> str:
    """Run one linear layer forward and backward, beside nn.Linear in bf16."""
    shapes = _shapes(shape)
    from lowprec.bench import linear
    from lowprec.cli.tables import linear_row, linear_table

    def report(row: dict[str, Any]) -> None:
        click.echo(linear_row(row), err=True)

    result = linear.run(device, shapes, recipe, _names(against), compiled, seconds, report)
    return to_json(result, indent=1) if as_json else linear_table(result)


@command.command("train")
@_DEVICE
@click.option("--model", default="llama-tiny", show_default=True, help="A preset.")
@click.option(
    "--recipe",
    default="fp8_blockwise",
    show_default=True,
    help="Recipes, joined by commas. bf16 always runs.",
)
@_against("torchao.")
@click.option(
    "--batch",
    default=1,
    show_default=True,
    type=click.IntRange(1, 2**24),
    help="Sequences in a step.",
)
@click.option(
    "--seq",
    default=128,
    show_default=True,
    type=click.IntRange(2, 2**24),
    help="Tokens in a sequence.",
)
@click.option(
    "--vocab",
    default=32000,
    show_default=True,
    type=click.IntRange(1, 2**31 - 1),
    help="Size of the vocabulary.",
)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile each decoder block.")
@click.option("--liger", is_flag=True, help="Use those of Liger's kernels that apply.")
@click.option(
    "--steps",
    default=10,
    show_default=True,
    type=click.IntRange(2, 10**6),
    help="Steps that are timed, after four to warm up.",
)
@JSON
@answers
def train_command(recipe: str, against: str, as_json: bool, **settings: Any) -> str:
    """Run training steps of a model on random tokens, weights in bf16."""
    from lowprec.cli import bench_train
    from lowprec.cli.tables import train_table

    result = bench_train.run(recipes=_names(recipe), against=_names(against), **settings)
    return to_json(result, indent=1) if as_json else train_table(result)


def _names(text: str) -> tuple[str, ...]:
    """Return the words of a list joined by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _is_size(text: str) -> bool:
    """Return True for a number from 1 to 999999999."""
    return len(text) < 10 and text.isdecimal() and int(text) > 0


def _shapes(text: str) -> list[tuple[int, int, int]]:
    """Return [(M, N, K)] from 'MxNxK,MxNxK'; raise UserError if it can't be read."""
    shapes = []
    for word in _names(text):
        parts = word.split("x")
        if len(parts) != 3 or not all(map(_is_size, parts)):
            raise UserError(
                f"--shape: expected MxNxK like 512x512x512, joined by commas, got {shown(text)}"
            )
        shapes.append((int(parts[0]), int(parts[1]), int(parts[2])))
    if not shapes:
        raise UserError("--shape: expected MxNxK like 512x512x512, joined by commas, got none")
    return shapes
