"""The commands on datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.commands.jobs import as_json, print_json, print_table, with_client

if TYPE_CHECKING:
    from cli.client import Client


@click.group()
def datasets() -> None:
    """Datasets: list, show, add."""


@datasets.command("list")
@as_json
@with_client
def datasets_list(client: Client, as_json: bool) -> None:
    """The datasets."""
    found = list(client.pages("/datasets", limit=100))
    if as_json:
        return print_json(found)
    rows = [(each["id"], each["name"], each["state"], _classes(each)) for each in found]
    print_table(("id", "name", "state", "classes"), rows)


@datasets.command("show")
@click.argument("dataset")
@as_json
@with_client
def datasets_show(client: Client, dataset: str, as_json: bool) -> None:
    """One dataset: its classes, its problems and its warnings."""
    found = client.dataset(dataset)
    if as_json:
        return print_json(found)
    show_dataset(found)


def show_dataset(dataset: dict[str, Any]) -> None:
    """Print a dataset in a few lines."""
    lines = [f"dataset {dataset['id']} is {dataset['state']}: {_classes(dataset)}"]
    lines += [f"  problem  {problem}" for problem in dataset.get("problems") or ()]
    lines += [f"  warning  {warning}" for warning in dataset.get("warnings") or ()]
    inspection = (dataset.get("report") or {}).get("inspection") or {}
    lines += [f"  passed over  {name}" for name in inspection.get("passed_over") or ()]
    click.echo("\n".join(lines))


def _classes(dataset: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in (dataset.get("classes") or {}).items())


@datasets.command("add")
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="A name for it; by default the file's.")
@as_json
@with_client
def datasets_add(client: Client, archive: Path, name: str | None, as_json: bool) -> None:
    """Upload ARCHIVE, a zip with one folder per class, and wait until it is checked."""
    dataset = client.ready_dataset(archive, name)
    if as_json:
        return print_json(dataset)
    show_dataset(dataset)
