"""The commands on API keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cli.commands.jobs import as_json, print_json, print_table, with_client

if TYPE_CHECKING:
    from cli.client import Client


@click.group()
def keys() -> None:
    """API keys: add, list, revoke."""


@keys.command("add")
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, required=True, help="jobs:read, jobs:write, models:write, admin")
@as_json
@with_client
def keys_add(client: Client, name: str, scopes: tuple[str, ...], as_json: bool) -> None:
    """Create a key. Its secret is shown only once."""
    key = client.call("POST", "/keys", json={"name": name, "scopes": list(scopes)})
    if as_json:
        return print_json(key)
    click.echo(f"key {key['id']} ({', '.join(key['scopes'])})\n{key['secret']}")


@keys.command("list")
@as_json
@with_client
def keys_list(client: Client, as_json: bool) -> None:
    """The keys, without their secrets."""
    found = list(client.pages("/keys"))
    if as_json:
        return print_json(found)
    rows = [(key["id"], key["name"], " ".join(key["scopes"]), key.get("revoked_at") or "") for key in found]
    print_table(("id", "name", "scopes", "revoked"), rows)


@keys.command("revoke")
@click.argument("key")
@with_client
def keys_revoke(client: Client, key: str) -> None:
    """Revoke a key."""
    client.call("DELETE", f"/keys/{key}")
    click.echo(f"key {key} is revoked")
