"""The group of commands, with the table of their names.

A new command is a new file `lowprec/cli/<name>.py`, which holds it as `command`, and its row in
`COMMANDS`. `lowprec --help` imports the file of every command to print its first sentence, so these
files import torch, transformers and pydantic inside their functions only.
"""

import importlib

import click

from lowprec import __version__
from lowprec.cli.common import Group

COMMANDS = (
    "train",
    "plan",
    "init",
    "doctor",
    "recipes",
    "bench",
)
"""Names of the commands, in the order of `lowprec --help`."""


class _Commands(Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"lowprec.cli.{cmd_name}").command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lowprec")
def cli() -> None:
    """Low-precision training of language models: turn it on, see that it is on, see that it is
    safe, see that it pays."""
