"""The commands that look at what is kept: datasets, keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.commands import as_json, echo_json, echo_table, speaks

if TYPE_CHECKING:
    from cli.client import Client


@click.group()
def datasets() -> None:
    """Datasets: list, show, add."""


@datasets.command("list")
@as_json
@speaks
def datasets_list(client: Client, as_json: bool) -> None:
    """The datasets."""
    found = list(client.pages("/datasets", limit=100))
    if as_json:
        return echo_json(found)
    rows = [(each["id"], each["name"], each["state"], _classes(each)) for each in found]
    echo_table(("id", "name", "state", "classes"), rows)


@datasets.command("show")
@click.argument("dataset")
@as_json
@speaks
def datasets_show(client: Client, dataset: str, as_json: bool) -> None:
    """One dataset: its classes, what is wrong with it, and what is doubtful."""
    found = client.dataset(dataset)
    if as_json:
        return echo_json(found)
    show_dataset(found)


def show_dataset(dataset: dict[str, Any]) -> None:
    """One dataset in a few lines."""
    lines = [f"dataset {dataset['id']} is {dataset['state']}: {_classes(dataset)}"]
    lines += [f"  problem  {problem}" for problem in dataset.get("problems") or ()]
    lines += [f"  warning  {warning}" for warning in dataset.get("warnings") or ()]
    click.echo("\n".join(lines))


def _classes(dataset: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in (dataset.get("classes") or {}).items())


@datasets.command("add")
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="A name for it; the file's by default.")
@as_json
@speaks
def datasets_add(client: Client, archive: Path, name: str | None, as_json: bool) -> None:
    """Upload ARCHIVE, a zip with one folder a class, and wait until it is checked."""
    dataset = client.ready_dataset(archive, name)
    if as_json:
        return echo_json(dataset)
    show_dataset(dataset)


@click.group()
def keys() -> None:
    """API keys: add, list, revoke."""


@keys.command("add")
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, required=True, help="jobs:read, jobs:write, models:write, admin")
@as_json
@speaks
def keys_add(client: Client, name: str, scopes: tuple[str, ...], as_json: bool) -> None:
    """Make a key; its secret is shown this once."""
    key = client.call("POST", "/keys", json={"name": name, "scopes": list(scopes)})
    if as_json:
        return echo_json(key)
    click.echo(f"key {key['id']} ({', '.join(key['scopes'])})\n{key['secret']}")


@keys.command("list")
@as_json
@speaks
def keys_list(client: Client, as_json: bool) -> None:
    """The keys, without their secrets."""
    found = list(client.pages("/keys"))
    if as_json:
        return echo_json(found)
    rows = [(key["id"], key["name"], " ".join(key["scopes"]), key.get("revoked_at") or "") for key in found]
    echo_table(("id", "name", "scopes", "revoked"), rows)


@keys.command("revoke")
@click.argument("key")
@speaks
def keys_revoke(client: Client, key: str) -> None:
    """End a key."""
    client.call("DELETE", f"/keys/{key}")
    click.echo(f"key {key} is revoked")


ALL: tuple[click.Command, ...] = (datasets, keys)
