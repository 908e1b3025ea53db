"""Entry point of the `lowprec` command, and its exit status.

0: done. 2: the user's input is wrong, which one line on stderr explains. 128 plus the number of a
signal: stopped by it (130 by Ctrl-C). 1: anything else.
"""

import logging
import sys

import click

from lowprec.cli.app import cli
from lowprec.errors import UserError, reported

_NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn, while transformers imports torchao, of kernels that this machine can't load.
A run does not use those kernels."""


def main(args: list[str] | None = None) -> None:
    """Run the command with `args`, the process's own by default, and exit unless it is done."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    with reported("lowprec"):
        try:
            cli.main(args=args, prog_name="lowprec", standalone_mode=False)
        except click.ClickException as error:
            # From click 8.2 on, a group without a command raises its own help as an error.
            if type(error).__name__ == "NoArgsIsHelpError":
                click.echo(error.format_message(), err=True)
                sys.exit(2)
            raise UserError(error.format_message()) from None
        except (click.Abort, KeyboardInterrupt):
            click.echo("lowprec: interrupted", err=True)
            sys.exit(130)  # as a shell reports a death by SIGINT


if __name__ == "__main__":
    main()
