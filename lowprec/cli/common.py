"""Arguments, options and behaviour that the commands share."""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import click

from lowprec.errors import UserError, nearest

CONFIG = click.argument("config", metavar="CONFIG")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Group(click.Group):
    """A group of commands that refuses an unknown one with the nearest known name."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args and args[0] not in known:
            raise UserError(f"no command '{args[0]}'{nearest(args[0], known)}")
        return super().resolve_command(ctx, args)


def answers(command: Callable[..., str]) -> Callable[..., None]:
    """Make a command of a function that returns text: the text alone goes to stdout, for programs
    to read. What libraries print meanwhile goes to stderr."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            answer = command(*args, **kwargs)
        click.echo(answer)

    return run
