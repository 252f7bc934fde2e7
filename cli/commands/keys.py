"""The commands on API keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cli.commands.jobs import as_json, echo_json, echo_table, speaks

if TYPE_CHECKING:
    from cli.client.rest import Client


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
