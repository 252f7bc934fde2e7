"""The commands on model versions: look at them, and change the champion."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.commands.jobs import as_json, print_json, print_table, with_client
from ml.spec.operating_point import F1, sentence

if TYPE_CHECKING:
    import requests

    from cli.client import Client

BLOCK = 1024 * 1024
MARKDOWN = "text/markdown"


@click.group(invoke_without_command=True)
@as_json
@click.pass_context
def models(context: click.Context, as_json: bool) -> None:
    """Model versions: list (the default), show, compare, operate, promote, rollback, promotions, card, download.

    VERSION is a number, or `champion`.
    """
    if context.invoked_subcommand is None:
        context.invoke(models_list, as_json=as_json)


@models.command("list")
@as_json
@with_client
def models_list(client: Client, as_json: bool) -> None:
    """The model versions, and which one is champion."""
    found = list(client.pages("/models", limit=100))
    if as_json:
        return print_json(found)
    rows = [
        (model["version"], "champion" if model["champion"] else "", _f1(model), model["created_at"]) for model in found
    ]
    print_table(("version", "", "F1", "created"), rows)


def _f1(model: dict[str, Any]) -> str | None:
    value = (model.get("metrics") or {}).get("f1")
    return None if value is None else f"{value:.3f}"


@models.command("show")
@click.argument("version")
@as_json
@with_client
def models_show(client: Client, version: str, as_json: bool) -> None:
    """One version: its figures, and the gate's verdict."""
    show_model(client.call("GET", f"/models/{version}"), as_json)


def show_model(model: dict[str, Any], machine: bool) -> None:
    """Print a version in a few lines."""
    if machine:
        return print_json(model)
    lines = [
        f"version {model['version']}{', the champion' if model['champion'] else ''}: {', '.join(model['classes'])}"
    ]
    lines += [f"  network  {model['network']}, head {model['head']}", f"  weights  {model['weights_sha256']}"]
    lines += [f"  {name:<8} {value:.4f}" for name, value in model["metrics"].items() if isinstance(value, float)]
    point = model.get("operating_point")
    lines += [f"  point    {sentence(point)}"] if point else []
    lines += [f"  gate     {reason}" for reason in model["gate"]["reasons"]]
    click.echo("\n".join(lines))


@models.command("operate")
@click.argument("version")
@click.argument("rule", type=click.Choice([F1, "sensitivity", "specificity", "threshold"]))
@click.argument("number", required=False, type=click.FloatRange(0, 1, min_open=True))
@click.option("--reason", required=True, help="Why; it is kept.")
@as_json
@with_client
def models_operate(client: Client, version: str, rule: str, number: float | None, reason: str, as_json: bool) -> None:
    """Set VERSION's operating point by RULE, without a training.

    \b
    renalq models operate champion sensitivity 0.95 --reason Screening
    renalq models operate champion threshold 0.3 --reason Screening
    renalq models operate 4 f1 --reason "As it was trained"
    """
    if (rule == F1) != (number is None):
        raise click.UsageError("f1 takes no number." if rule == F1 else f"{rule} needs a number: {rule} 0.95")
    body = {"operate_at": F1 if rule == F1 else {rule: number}, "reason": reason}
    show_model(client.call("PATCH", f"/models/{version}", json=body), as_json)


@models.command("promote")
@click.argument("version")
@click.option("--force", is_flag=True, help="Promote it even if the gate refuses; --reason says why.")
@click.option("--reason", help="Why; it is kept.")
@as_json
@with_client
def models_promote(client: Client, version: str, force: bool, reason: str | None, as_json: bool) -> None:
    """Make VERSION the champion, if the gate agrees."""
    body = {"force": force, "reason": reason}
    _show_champion(client.call("POST", f"/models/{version}/promote", json=body), as_json)


@models.command("rollback")
@click.option("--reason", help="Why; it is kept.")
@as_json
@with_client
def models_rollback(client: Client, reason: str | None, as_json: bool) -> None:
    """Make the champion before this one champion again."""
    _show_champion(client.call("POST", "/models/rollback", json={"reason": reason}), as_json)


def _show_champion(model: dict[str, Any], machine: bool) -> None:
    if machine:
        return print_json(model)
    click.echo(f"version {model['version']} is champion")


@models.command("promotions")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 100))
@as_json
@with_client
def models_promotions(client: Client, limit: int, as_json: bool) -> None:
    """The changes of the champion, newest first."""
    page = client.call("GET", "/models/promotions", params={"limit": limit})
    if as_json:
        return print_json(page)
    columns = ("at", "version", "replaced", "how", "reason")
    print_table(columns, [[row[name] for name in columns] for row in page["data"]])


@models.command("compare")
@click.argument("a")
@click.argument("b")
@as_json
@with_client
def models_compare(client: Client, a: str, b: str, as_json: bool) -> None:
    """Versions A and B on the same test scans, and how their training differs."""
    found = client.call("GET", "/models/compare", params={"a": a, "b": b})
    if as_json:
        return print_json(found)
    click.echo(found["note"])
    columns = ("", *(f"version {found[side]['version']}" for side in ("a", "b")))
    figures = [(name, *map(_figure, pair)) for name, pair in found["metrics"].items()]
    print_table(columns, [*figures, *_differences(found["differences"])])


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _differences(found: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Pairs by name; `params` and `environment` are nested."""
    rows: list[tuple[str, Any, Any]] = []
    for name, value in found.items():
        rows += _differences(value) if isinstance(value, dict) else [(name, *value)]
    return rows


@models.command("card")
@click.argument("version")
@as_json
@with_client
def models_card(client: Client, version: str, as_json: bool) -> None:
    """VERSION's model card, in Markdown."""
    kind = "application/json" if as_json else MARKDOWN
    card = client.request("GET", f"/models/{version}/card", headers={"Accept": kind})
    if as_json:
        return print_json(card.json())
    click.echo(card.content.decode(), nl=False)


@models.command("download")
@click.argument("version")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@with_client
def models_download(client: Client, version: str, file: Path) -> None:
    """Write VERSION's network to FILE, a safetensors file."""
    model = client.call("GET", f"/models/{version}")  # `champion` may change between two requests
    response = client.request("GET", f"/models/{model['version']}/weights", stream=True)
    partial = file.with_name(f"{file.name}.partial")
    try:
        found = _write(response, partial)
        if found != model["weights_sha256"]:
            raise click.ClickException("The file's SHA-256 is not the version's: download it again.")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    click.echo(f"version {model['version']} is in {file}, SHA-256 {found}")


def _write(response: requests.Response, file: Path) -> str:
    """Write the response's body. Returns its SHA-256."""
    import requests

    digest = hashlib.sha256()
    try:
        with file.open("wb") as stream:
            for block in response.iter_content(BLOCK):
                digest.update(block)
                stream.write(block)
    except requests.RequestException as error:
        raise click.ClickException(f"The download broke off: {error}. Start it again.") from error
    return digest.hexdigest()
