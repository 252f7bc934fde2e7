"""The commands that delete, and show what went."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from cli.commands.jobs import as_json, print_json, print_table, with_client

if TYPE_CHECKING:
    from cli.client import Client

COLLECTIONS = {"job": "jobs", "scan": "scans", "model": "models", "dataset": "datasets"}
POLL_SECONDS = 2.0


@click.command()
@click.argument("kind", type=click.Choice(list(COLLECTIONS)))
@click.argument("target")
@click.option("--keep-scans", is_flag=True, help="Of a job: keep its scans, though nothing else needs them.")
@click.option("--wait/--no-wait", default=False, help="Wait until its files are gone, too: more than an hour.")
@click.confirmation_option("--yes", prompt="It cannot be undone. Delete it?", help="Do not ask.")
@as_json
@with_client
def delete(client: Client, kind: str, target: str, keep_scans: bool, wait: bool, as_json: bool) -> None:
    """Delete a job, scan, model or dataset, TARGET, with all that belongs to it: its id, or a model's version."""
    if keep_scans and kind != "job":
        raise click.UsageError("--keep-scans is of a job.")
    query = {"scans": "keep"} if keep_scans else {}
    found = client.call("DELETE", f"/{COLLECTIONS[kind]}/{target}", params=query)
    while wait and found["state"] != "deleted":
        time.sleep(POLL_SECONDS)
        found = client.call("GET", f"/deletions/{found['id']}")
    show_receipt(found, as_json)


@click.command()
@click.argument("receipt", required=False)
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 100))
@as_json
@with_client
def deletions(client: Client, receipt: str | None, limit: int, as_json: bool) -> None:
    """The newest receipts of deletions, or RECEIPT: what was deleted, and what is left."""
    if receipt is not None:
        return show_receipt(client.call("GET", f"/deletions/{receipt}"), as_json)
    page = client.call("GET", "/deletions", params={"limit": limit})
    if as_json:
        return print_json(page)
    rows = [(each["id"], each["kind"], each["target"], each["state"], each["created_at"]) for each in page["data"]]
    print_table(("receipt", "kind", "what", "state", "asked"), rows)
    return None


def show_receipt(found: dict[str, Any], machine: bool) -> None:
    """Print a receipt in a few lines."""
    if machine:
        return print_json(found)
    lines = [f"{found['kind']} {found['target']} is {found['state']}: receipt {found['id']}"]
    lines += [f"  {number:>8} {name.replace('_', ' ')}" for name, number in found["counts"].items()]
    lines += [f"  {number:>8} {name.replace('_', ' ')} left" for name, number in found["left"].items() if number]
    click.echo("\n".join(lines))
