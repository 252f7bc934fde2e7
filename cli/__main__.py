"""The command `renalq`. Each command imports what it needs only when it runs."""

from __future__ import annotations

import sys

import click

from cli.commands import jobs
from cli.commands.datasets import datasets
from cli.commands.deletions import delete, deletions
from cli.commands.keys import keys
from cli.commands.models import models
from cli.commands.stack import down, logs, status
from cli.commands.weights import weights


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="renalq", prog_name="renalq")
def main() -> None:
    """RenalQ: train, track and use a kidney-CT classifier. Not for diagnosis."""


@main.command()
@click.option("--flower/--no-flower", default=True, help="Celery's monitor.")
@click.option("--mlflow/--no-mlflow", default=True, help="The tracking server.")
def up(flower: bool, mlflow: bool) -> None:
    """Start everything on this machine; Ctrl-C or `renalq down` stops it."""
    from rich.console import Console

    from cli.stack.launch import CannotStartError
    from cli.stack.up import Options, up

    try:
        sys.exit(up(Options(flower=flower, mlflow=mlflow), Console()))
    except CannotStartError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.option("--keep", is_flag=True, help="Leave the folder with its data, network and logs.")
def demo(keep: bool) -> None:
    """Make synthetic CT, train on it, predict ten new scans; all in its own stack."""
    from rich.console import Console

    from cli.commands.demo import demo

    sys.exit(demo(Console(), keep))


@main.command()
@jobs.as_json
def doctor(as_json: bool) -> None:
    """Check what is installed and reachable, and say what to do."""
    from cli.stack.doctor import doctor

    sys.exit(doctor(machine=as_json))


for _command in (
    *jobs.ALL, models, datasets, delete, deletions, keys, weights, status, logs, down,
):  # fmt: skip
    main.add_command(_command)


if __name__ == "__main__":
    main()
