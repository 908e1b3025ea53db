"""`lowprec init`: a copy of a shipped configuration, to be changed."""

import os
from pathlib import Path

import click

from lowprec.config import shipped
from lowprec.errors import UserError


@click.command("init")
@click.argument("name", required=False)
@click.argument("path", required=False, type=click.Path(path_type=Path))
def command(name: str | None, path: Path | None) -> None:
    """Copy a configuration that the package ships to a file.

    NAME is one of the names that `lowprec init` lists when called without it. PATH is a file or a
    folder; by default the file stands in the working directory, under its own name. An existing
    file is never replaced.
    """
    if name is None:
        width = max(map(len, shipped.names()))
        for known in shipped.names():
            click.echo(f"{known:{width}}  {shipped.about(known)}")
        return
    source = shipped.path_of(name)
    target = path or Path()
    if os.path.isdir(target):
        target = target / source.name
    if os.path.isfile(target.parent):
        raise UserError(f"{target}: can't be written: {target.parent} is a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"{target}: exists already; give another PATH") from None
    except OSError as error:
        raise UserError(f"{target}: can't be written: {error.strerror}") from None
    click.echo(f"wrote {target}")
