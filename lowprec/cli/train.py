"""`lowprec train`: a training run from its configuration."""

import click

from lowprec.cli.common import CONFIG, OVERRIDES


@click.command("train")
@CONFIG
@OVERRIDES
def command(config: str, overrides: tuple[str, ...]) -> None:
    """Train the model that CONFIG describes.

    KEY=VALUE changes any setting, e.g. precision.recipe=mxfp4 trainer.max_steps=100. The run is
    written to runs/<config name>/<number> unless trainer.output_dir names another directory.
    """
    from lowprec.training.run.config import load_run

    run, data = load_run(config, overrides)
    # Imported once the configuration is right: torch and transformers take seconds.
    from lowprec.cli.tables import summary_table
    from lowprec.training.run.pretrain import train

    click.echo(summary_table(train(run, data, config)))
