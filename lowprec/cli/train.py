"""`lowprec train`: a training run from its configuration."""

import click

from lowprec.cli.common import CONFIG, OVERRIDES
from lowprec.config import shipped


@click.command("train")
@CONFIG
@OVERRIDES
def command(config: str, overrides: tuple[str, ...]) -> None:
    """Train the model that CONFIG describes.

    CONFIG is a YAML file, or the name of a shipped one (`lowprec init` lists them).
    KEY=VALUE changes any setting, e.g. precision.recipe=mxfp4 trainer.max_steps=100. The run is
    written to runs/<config name>/<number> unless trainer.output_dir names another directory.
    """
    path = shipped.find(config)
    from lowprec.training.run.config import load_run

    run, data = load_run(path, overrides)
    # Imported once the configuration is right, since transformers takes seconds.
    from lowprec.cli.tables import summary_table
    from lowprec.distributed.processes import is_main_process
    from lowprec.training.run.pretrain import train

    summary = train(run, data, path)
    if is_main_process():
        click.echo(summary_table(summary))
