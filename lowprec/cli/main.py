"""The `lowprec` command.

Exit status: 0 done, 2 the user's input is wrong (one line on stderr), 1 anything else. Heavy
imports happen inside the commands, so that `lowprec --help` answers at once.
"""

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import click

from lowprec import __version__
from lowprec.errors import TrainingStopped, UserError, nearest

_CONFIG = click.argument("config", metavar="CONFIG")
_OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

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
    type=click.FloatRange(min=0.0),
    help="Time that each row is measured for.",
)


_NOISY = ("torchao", "torch.utils._pytree")
"""What these warn of when transformers imports torchao, kernels of torchao's that this machine
can't load, is no business of a run."""


def _answers(command: Callable[..., str]) -> Callable[..., None]:
    """A command whose result is the only thing on stdout, for programs to read: what libraries
    print meanwhile goes to stderr."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            answer = command(*args, **kwargs)
        click.echo(answer)

    return run


class _Commands(click.Group):
    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            raise UserError(f"no command '{args[0]}'{nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lowprec")
def cli() -> None:
    """Low-precision training of language models: turn it on, see that it is on, see that it is
    safe, see that it pays."""


@cli.command()
@_CONFIG
@_OVERRIDES
def train(config: str, overrides: tuple[str, ...]) -> None:
    """Train the model that CONFIG describes.

    Any setting can be changed on the command line, e.g. precision.recipe=mxfp4
    trainer.max_steps=100. The run is written to runs/<config name>/<number> unless
    trainer.output_dir says otherwise.
    """
    from lowprec.training.run.config import load_run

    run, data = load_run(config, overrides)
    from lowprec.cli.tables import summary_table
    from lowprec.training.run.pretrain import train as run_training

    summary = run_training(run, data, config)
    click.echo(summary_table(summary))


@cli.command()
@_CONFIG
@_OVERRIDES
@_JSON
@_answers
def plan(config: str, overrides: tuple[str, ...], as_json: bool) -> str:
    """Show what would run where: each linear layer's recipe and backend, native or emulated, and
    why. Builds no weights."""
    from lowprec.training.run.config import load_run

    run, _ = load_run(config, overrides)
    from lowprec.training.run.pretrain import plan_run

    plan = plan_run(run)
    return json.dumps(plan.to_dict(), indent=1, ensure_ascii=False) if as_json else str(plan)


@cli.command()
@_JSON
@_answers
def doctor(as_json: bool) -> str:
    """Show this machine: device, versions, which recipes run natively, what is missing and how to
    install it."""
    from lowprec.cli.doctor import examine
    from lowprec.cli.tables import doctor_table

    report = examine()
    return json.dumps(report, indent=1) if as_json else doctor_table(report)


@cli.command()
@_JSON
@_answers
def recipes(as_json: bool) -> str:
    """List the recipes, each with its three GEMMs as equations."""
    from lowprec.cli.doctor import describe_recipes
    from lowprec.cli.tables import recipes_table

    described = describe_recipes()
    return (
        json.dumps(described, indent=1, ensure_ascii=False) if as_json else recipes_table(described)
    )


@cli.group(cls=_Commands)
def bench() -> None:
    """Measure what the parts cost on this machine."""


@bench.command("quantize")
@_DEVICE
@click.option(
    "--against", default="", help="Rivals to measure in the same run, joined by commas: torchao."
)
@click.option(
    "--shape", default="2048x1024", show_default=True, help="Rows x columns of the matrix."
)
@click.option("--dtype", default="fp32", show_default=True, help="Of the matrix: fp32 or bf16.")
@click.option("--compile", "compiled", is_flag=True, help="Through torch.compile, rivals as well.")
@_JSON
@_answers
def bench_quantize(
    device: str, against: str, shape: str, dtype: str, compiled: bool, as_json: bool
) -> str:
    """Quantise and dequantise a matrix in every format, beside a copy of it; and on a GPU make FP8
    codes."""
    rows, _, columns = shape.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise UserError(f"--shape: expected ROWSxCOLUMNS like 2048x1024, got '{shape}'")
    from lowprec.bench import quantize
    from lowprec.cli.tables import bench_table

    rivals = _names(against)
    result = quantize.run(device, rivals, (int(rows), int(columns)), compiled, dtype)
    return json.dumps(result, indent=1) if as_json else bench_table(result, rivals)


@bench.command("gemm")
@_DEVICE
@_SHAPES
@_RECIPE
@click.option(
    "--against",
    default="",
    help="Rivals to measure in the same run, joined by commas: torchao. bf16 always runs.",
)
@click.option(
    "--backend",
    default="",
    help="Backends to measure, joined by commas; all that are native by default.",
)
@_SECONDS
@_JSON
@_answers
def bench_gemm(
    device: str, shape: str, recipe: str, against: str, backend: str, seconds: float, as_json: bool
) -> str:
    """Multiply a recipe's operands, as each GEMM of a linear layer does, by every backend that can,
    beside torch in bf16."""
    shapes = _shapes(shape)
    from lowprec.bench import gemm
    from lowprec.cli.tables import gemm_table

    result = gemm.run(device, shapes, recipe, _names(against), _names(backend), seconds)
    return json.dumps(result, indent=1) if as_json else gemm_table(result)


@bench.command("linear")
@_DEVICE
@_SHAPES
@_RECIPE
@click.option(
    "--against",
    default="",
    help="Rivals to measure in the same run, joined by commas: torchao, te. bf16 always runs.",
)
@click.option("--compile", "compiled", is_flag=True, help="Also ours through torch.compile.")
@_SECONDS
@_JSON
@_answers
def bench_linear(
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

    result = linear.run(
        device,
        shapes,
        recipe,
        _names(against),
        compiled,
        seconds,
        lambda row: click.echo(linear_row(row), err=True),
    )
    return json.dumps(result, indent=1) if as_json else linear_table(result)


@bench.command("train")
@_DEVICE
@click.option("--model", default="llama-tiny", show_default=True, help="A preset.")
@click.option(
    "--recipe",
    default="fp8_blockwise",
    show_default=True,
    help="Recipes, joined by commas. bf16 always runs.",
)
@click.option(
    "--against", default="", help="Rivals to measure in the same run, joined by commas: torchao."
)
@click.option(
    "--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Sequences in a step."
)
@click.option(
    "--seq",
    default=128,
    show_default=True,
    type=click.IntRange(min=2),
    help="Tokens in a sequence.",
)
@click.option(
    "--vocab",
    default=32000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Size of the vocabulary.",
)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile each decoder block.")
@click.option("--liger", is_flag=True, help="Use those of Liger's kernels that apply.")
@click.option(
    "--steps",
    default=10,
    show_default=True,
    type=click.IntRange(min=2),
    help="Steps that are timed, after four to warm up.",
)
@_JSON
@_answers
def bench_train(recipe: str, against: str, as_json: bool, **settings: Any) -> str:
    """Run training steps of a model on random tokens, weights in bf16."""
    from lowprec.cli import bench_train
    from lowprec.cli.tables import train_table

    result = bench_train.run(recipes=_names(recipe), against=_names(against), **settings)
    return json.dumps(result, indent=1) if as_json else train_table(result)


def _names(text: str) -> tuple[str, ...]:
    """The words of a list joined by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _shapes(text: str) -> list[tuple[int, int, int]]:
    """[(M, N, K)] from 'MxNxK,MxNxK'; UserError if it can't be read."""
    shapes = []
    for word in _names(text):
        parts = word.split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise UserError(
                f"--shape: expected MxNxK like 512x512x512, joined by commas, got '{text}'"
            )
        shapes.append((int(parts[0]), int(parts[1]), int(parts[2])))
    if not shapes:
        raise UserError("--shape: expected MxNxK like 512x512x512, joined by commas, got none")
    return shapes


def main(args: list[str] | None = None) -> None:
    """Entry point of the console command."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        cli.main(args=args, prog_name="lowprec", standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except TrainingStopped as error:
        click.echo(f"lowprec: stopped: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # of click 8.2 and later: the help itself
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        click.echo("lowprec: interrupted", err=True)
        sys.exit(1)


def _fail(message: str) -> None:
    click.echo(f"lowprec: {' '.join(message.split())}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
