"""The commands on jobs, and what all commands that call the API share. `--json` prints the API's response."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cli.client import Client, Job
    from cli.commands.progress import ProgressDisplay

Command = Callable[..., Any]
IMAGES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".bmp", ".tif", ".tiff", ".webp", "")
"""Suffixes of the files that are taken from a folder; DICOM files often have none."""

as_json = click.option("--json", "as_json", is_flag=True, help="Print the API's JSON.")
watch_option = click.option("--watch/--no-watch", default=False, help="Follow it until it has ended.")


def with_client(command: Command) -> Command:
    """Pass a `Client` to the command, and turn an `ApiError` into one line and exit code 1."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        from cli.client import ApiError, Client

        try:
            return command(Client(), *arguments, **options)
        except ApiError as error:
            raise click.ClickException(str(error)) from error

    return wrapped


def print_json(value: Any) -> None:
    """Print JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table on stdout; without a terminal, values are not shortened."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*[Text("–" if cell is None else str(cell)) for cell in row])
    console = Console()
    console.print(table, width=None if console.is_terminal else 200)


def show_job(job: Job, machine: bool) -> None:
    """Print a job in a few lines."""
    if machine:
        return print_json(job.raw)
    lines = [f"{job.kind} job {job.id}: {job.state}, {100 * job.progress:.0f} %"]
    lines += [f"  stage    {job.stage}"] if job.stage else []
    lines += [f"  error    {job.failure}"] if job.failure else []
    lines += [f"  warning  {each}" for each in job.warnings]
    lines += [f"  model    {job.raw['model_version']}"] if job.raw.get("model_version") else []
    metrics = {key: value for key, value in (job.raw.get("metrics") or {}).items() if isinstance(value, float)}
    lines += [f"  {name:<8} {value:.4f}" for name, value in metrics.items()]
    click.echo("\n".join(lines))


def follow_or_show(client: Client, job: Job, watch: bool, machine: bool) -> Job:
    """Print the job, or follow it with `watch`; exit code 1 if it failed."""
    if not watch:
        show_job(job, machine)
        return job
    from rich.console import Console

    from cli.commands.progress import follow

    ended = client.wait(job.id) if machine else follow(client, job.id, Console())
    if machine or ended.kind == "train":
        show_job(ended, machine)
    if ended.state in ("failed", "cancelled"):
        sys.exit(1)
    return ended


def upload_progress(machine: bool) -> ProgressDisplay:
    """Shows the progress of an upload; with --json on stderr, apart from the JSON."""
    from rich.console import Console

    from cli.commands.progress import ProgressDisplay

    return ProgressDisplay(Console(stderr=machine))


def parse_params(pairs: Iterable[str]) -> dict[str, Any]:
    """`-p epochs=5 -p weights=none -p image_size=[224,224,3]`: each value is JSON if it parses, otherwise text."""
    params = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="-p")
        try:
            params[name.strip()] = json.loads(value)
        except ValueError:
            params[name.strip()] = value
    return params


@click.command()
@click.argument("dataset", required=False)
@click.option("--source-url", help="Let the worker download the zip from here (Google Drive links included).")
@click.option("-p", "--param", "pairs", multiple=True, metavar="NAME=VALUE", help="As in params.yaml.")
@click.option("--network", help="Short for -p network=…: vgg16, resnet18, resnet50, …")
@click.option("--weights", help="Short for -p weights=…: imagenet, none, file:NAME or version:N.")
@click.option("--epochs", type=int, help="Short for -p epochs=…")
@click.option("--name", help="A name for the job.")
@watch_option
@as_json
@with_client
def train(
    client: Client,
    dataset: str | None,
    source_url: str | None,
    pairs: tuple[str, ...],
    name: str | None,
    watch: bool,
    as_json: bool,
    **short: Any,
) -> None:
    """Train on DATASET: a zip with one folder per class, or the id of an uploaded dataset."""
    if (dataset is None) == (source_url is None):
        raise click.UsageError("Name a DATASET or a --source-url, and not both.")
    params = parse_params(pairs) | {key: value for key, value in short.items() if value is not None}
    if dataset is None:
        source = {"source_url": source_url}
    elif Path(dataset).is_file():
        with upload_progress(as_json) as listener:
            source = {"dataset_id": client.ready_dataset(Path(dataset), listener=listener)["id"]}
    else:
        source = {"dataset_id": dataset}
    follow_or_show(client, client.train(source, params, name=name), watch, as_json)


@click.command()
@click.argument("scans", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--model", help="`champion` (the default) or a version.")
@click.option("--wait/--no-wait", default=True, help="Wait for the predictions and print them.")
@as_json
@with_client
def predict(client: Client, scans: tuple[Path, ...], model: str | None, wait: bool, as_json: bool) -> None:
    """Predict SCANS: files, folders, or one zip."""
    files = list(find_scans(scans))
    if not files:
        raise click.UsageError("There are no scans there.")
    if len(files) == 1 and files[0].suffix.lower() != ".zip" and not is_volume(files[0]):
        job = client.predict(files[0], wait_seconds=30 if wait else 0, model=model)
    else:
        with upload_progress(as_json) as listener:
            job = client.predict_batch(files, model, listener)
    if not wait:
        return show_job(job, as_json)
    ended = follow_or_show(client, job, watch=not job.terminal, machine=as_json) if not job.terminal else job
    show_results(client, ended, as_json)


def find_scans(paths: Iterable[Path]) -> Iterable[Path]:
    """Files as given, and of each folder the images below it in order."""
    for path in paths:
        if path.is_dir():
            inside = (file for file in sorted(path.rglob("*")) if file.is_file())
            yield from (file for file in inside if file.suffix.lower() in IMAGES or is_volume(file))
        else:
            yield path


def is_volume(file: Path) -> bool:
    """Whether a file is named as a NIfTI volume, which has a result for each slice."""
    return file.name.lower().endswith((".nii", ".nii.gz"))


def show_results(client: Client, job: Job, machine: bool) -> None:
    """Print the predictions of a job as a table."""
    if machine:
        return print_json(list(client.pages(f"/jobs/{job.id}/results", limit=100)))
    rows = [
        (
            each.name,
            each.label or each.state,
            f"{each.confidence:.3f}" if each.confidence else "–",
            each.disposition,
            each.failure or each.reason or "",
        )
        for each in client.results(job.id)
    ]
    print_table(("scan", "label", "confidence", "disposition", ""), rows)
    if job.state == "failed":
        sys.exit(1)


@click.command()
@click.argument("job")
@as_json
@with_client
def watch(client: Client, job: str, as_json: bool) -> None:
    """Follow JOB until it has ended; exit code 1 if it failed."""
    follow_or_show(client, client.job(job), watch=True, machine=as_json)


@click.group()
def jobs() -> None:
    """Jobs: list, show, cancel, retry, reproduce, results."""


@jobs.command("list")
@click.option("--state", help="queued, running, succeeded, partially_succeeded, failed or cancelled.")
@click.option("--kind", help="train, predict, …")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 100))
@as_json
@with_client
def jobs_list(client: Client, state: str | None, kind: str | None, limit: int, as_json: bool) -> None:
    """The newest jobs."""
    query = {"state": state, "kind": kind, "limit": limit}
    page = client.call("GET", "/jobs", params={name: value for name, value in query.items() if value})
    if as_json:
        return print_json(page)
    rows = [
        (job["id"], job["kind"], job["state"], f"{100 * job['progress']:.0f} %", job["created_at"])
        for job in page["data"]
    ]
    print_table(("id", "kind", "state", "progress", "created"), rows)


@jobs.command("show")
@click.argument("job")
@as_json
@with_client
def jobs_show(client: Client, job: str, as_json: bool) -> None:
    """One job."""
    show_job(client.job(job), as_json)


@jobs.command("cancel")
@click.argument("job")
@as_json
@with_client
def jobs_cancel(client: Client, job: str, as_json: bool) -> None:
    """Ask a job to stop."""
    from cli.client import Job

    show_job(Job.of(client.call("POST", f"/jobs/{job}/cancel")), as_json)


@jobs.command("retry")
@click.argument("job")
@click.option("--watch/--no-watch", "follow", default=True, help="Follow the new job to its end.")
@as_json
@with_client
def jobs_retry(client: Client, job: str, follow: bool, as_json: bool) -> None:
    """Submit a failed or cancelled job's unfinished work again, as a new job."""
    follow_or_show(client, client.retry(job), follow, as_json)


@jobs.command("reproduce")
@click.argument("job")
@click.option("--watch/--no-watch", "follow", default=True, help="Follow the new job to its end.")
@as_json
@with_client
def jobs_reproduce(client: Client, job: str, follow: bool, as_json: bool) -> None:
    """Repeat a succeeded training, and say whether its figures match; exit code 1 if they do not."""
    ended = follow_or_show(client, client.reproduce(job), follow, as_json)
    found = ended.raw.get("reproduction")
    if found is None:
        return
    if not as_json:
        click.echo("\n".join(reproduction_lines(found)))
    if not found["matches"]:
        sys.exit(1)


def reproduction_lines(found: dict[str, Any]) -> list[str]:
    """Lines that compare a training with its reproduction."""
    verdict = "every figure matches" if found["matches"] else f"{len(found['differences'])} figures differ"
    lines = [f"reproduction of {found['of']}: {verdict}"]
    lines += [f"  {name:<28} {was} → {now}" for name, (was, now) in found["differences"].items()]
    if not found["revision"]["same"]:
        lines.append(f"  code                         {found['revision']['original']} → {found['revision']['now']}")
    return lines + [f"  {name:<28} {was} → {now}" for name, (was, now) in found["environment_differences"].items()]


@jobs.command("results")
@click.argument("job")
@as_json
@with_client
def jobs_results(client: Client, job: str, as_json: bool) -> None:
    """The predictions of a job so far."""
    show_results(client, client.job(job), as_json)


ALL: tuple[click.Command, ...] = (train, predict, watch, jobs)
