"""`renalq demo`: train on synthetic CT and predict ten new scans, through the REST API only.

It starts its own stack in a new folder on a free port, and removes both at the end.
"""

from __future__ import annotations

import csv
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from cli.client import ApiError, Client, Epoch, Job, Json, Prediction
from cli.commands.progress import follow
from cli.commands.weights import fetching
from cli.stack.launch import CannotStartError, last_line, with_pdeathsig
from cli.stack.server_plan import free_port
from cli.stack.services import REPOSITORY
from jobs.settings import Settings

PATIENTS, SLICES, SEED = 480, 1, 1
"""Half of the patients have a tumour, and a fifth are tested on: 48 of each class, so that the gate's lower bound of
sensitivity (0.70) holds with seven tumours missed. Of 24, it holds with two."""
NEW_PATIENTS, NEW_SEED = 10, 2
"""Other patients, from another seed: none of them is in the training's zip."""
PARAMS: Json = {
    "weights": "none", "epochs": 5, "learning_rate": 0.01, "standardize": True, "augmentation": False, "seed": 0,
}  # fmt: skip
"""From ImageNet's weights where they are here in time; else random frozen features and a trained head."""
FETCH_SECONDS = 30.0
"""After this time the demo goes on without ImageNet's weights. Meanwhile the stack starts, and the CT is made."""
NO_WEIGHTS = "random: ImageNet's cannot be had here in time (renalq weights fetch vgg16 says why)"
UNPROCESSABLE = 422
MIN_F1 = 0.90
START_SECONDS = 180.0
STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Scans:
    """Synthetic CT: a labelled zip, and unlabelled scans with their true labels by file name."""

    archive: Path
    new: list[Path]
    truth: dict[str, str]


def demo(console: Console, keep: bool = False) -> int:
    """Run the demo. Returns 0 if F1 on new patients reaches `MIN_F1`, and the gate made the network champion."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, _exit_on_signal)
    folder = Settings().home.resolve() / "demo" / secrets.token_hex(4)
    try:
        passed = _run(folder, console, began)
        console.print(f"Done in {time.monotonic() - began:.0f} s.", highlight=False)
        return 0 if passed else 1
    except (ApiError, CannotStartError) as error:
        console.print(f"[red]✗[/] {error}", highlight=False, soft_wrap=True)
        keep = True
        console.print(f"The logs are in {folder / 'home' / 'logs'}", highlight=False, soft_wrap=True)
        return 1
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, console: Console, began: float) -> bool:
    home, pretrained = folder / "home", Settings().weights
    folder.mkdir(parents=True)
    log, environ = folder / "weights.log", {"RENALQ_WEIGHTS_DIR": str(pretrained)}
    with fetching("vgg16", pretrained, log) as fetch, running_stack(home, environ) as stack:
        scans = _make_scans(folder / "scans", console)
        client = ready_client(stack, home)
        here = _arrived(fetch, FETCH_SECONDS - (time.monotonic() - began))
        console.print(f"[green]✓[/] weights         {'of ImageNet' if here else NO_WEIGHTS}", highlight=False)
        return _show(client, scans, console, PARAMS | ({"weights": "imagenet"} if here else {}))


def _arrived(fetch: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the weights are there, after so long at most."""
    try:
        return fetch.wait(max(0.0, seconds)) == 0
    except subprocess.TimeoutExpired:
        return False


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # unlike the default handler this unwinds, and so stops the stack


@contextmanager
def running_stack(home: Path, settings: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """`renalq up` for the duration of the block. `settings`: environment variables beside its home and port."""
    port = str(Settings().port) if "RENALQ_PORT" in os.environ else str(free_port())
    environ = {**os.environ, "RENALQ_HOME": str(home), "RENALQ_PORT": port, "COLUMNS": "200", **(settings or {})}
    command = with_pdeathsig([sys.executable, "-m", "cli", "up"])
    stack = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield stack
    finally:
        stack.terminate()
        try:
            stack.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            stack.kill()  # its orphan reaper ends the rest
            stack.wait()


def _make_scans(folder: Path, console: Console) -> Scans:
    """Made while the stack starts: each uses one core."""
    archive, new = folder / "synthetic-ct.zip", folder / "new"
    log = folder / "phantom.log"
    folder.mkdir(parents=True)
    _phantom(log, "--out", str(archive), "--patients", str(PATIENTS), "--slices", str(SLICES), "--seed", str(SEED))
    new_options = ["--patients", str(NEW_PATIENTS), "--slices", "1", "--seed", str(NEW_SEED), "--format", "dicom"]
    _phantom(log, "--out", str(new), *new_options, "--unlabelled")
    with (new / "truth.csv").open(newline="") as stream:
        truth = {row["file"]: row["label"] for row in csv.DictReader(stream)}
    console.print(
        f"[green]✓[/] synthetic CT    {PATIENTS * SLICES} slices of {PATIENTS} patients to train on, "
        f"{len(truth)} DICOM scans of others to predict",
        highlight=False,
        soft_wrap=True,
    )
    return Scans(archive, [new / name for name in truth], truth)


def _phantom(log: Path, *options: str) -> None:
    with log.open("ab") as stream:
        command = with_pdeathsig([sys.executable, "-m", "ml", "phantom", *options])
        made = subprocess.run(command, stdout=stream, stderr=stream, check=False, cwd=REPOSITORY)
    if made.returncode != 0:
        raise CannotStartError(f"The synthetic CT could not be made: {last_line(log)} (log: {log})")


def ready_client(stack: subprocess.Popen[bytes], home: Path) -> Client:
    """A client of the stack, once it is ready.

    Raises:
        CannotStartError: it ended, or takes too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if stack.poll() is not None:
            raise CannotStartError(f"The stack ended with status {stack.returncode}.")
        state = _state(home / "stack.json")
        if state.get("ready"):
            return Client(state["addresses"]["api"], (home / "admin.key").read_text().strip())
        time.sleep(0.2)
    raise CannotStartError(f"The stack was not ready within {START_SECONDS:.0f} s.")


def _state(file: Path) -> Json:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):
        return {}


def _show(client: Client, scans: Scans, console: Console, params: Json) -> bool:
    dataset = client.ready_dataset(scans.archive, "synthetic CT")
    classes = ", ".join(f"{name} {count}" for name, count in dataset["classes"].items())
    console.print(f"\nDataset {dataset['id']}: {classes}", highlight=False, soft_wrap=True)
    job = _train(client, dataset["id"], params)
    settings = ", ".join(f"{name} {value}" for name, value in params.items())
    console.print(f"Training job {job.id}: {settings}", highlight=False, soft_wrap=True)
    ended = follow(client, job.id, console)
    if ended.state != "succeeded":
        raise ApiError(f"The training {ended.state}: {ended.failure}")
    passed = _show_training(ended, client.epochs(ended.id), console)
    promoted = _show_verdict(client.call("GET", f"/models/{ended.raw['model_version']}"), console)
    _show_predictions(client, scans, ended.raw["model_version"], console)
    return passed and promoted


def _train(client: Client, dataset_id: str, params: Json) -> Job:
    try:
        return client.train({"dataset_id": dataset_id}, params, name="demo")
    except ApiError as error:
        if error.status != UNPROCESSABLE or params == PARAMS:
            raise
    time.sleep(2 * Settings().process_seconds)  # the worker has not seen the new file of weights yet
    return client.train({"dataset_id": dataset_id}, params, name="demo")


def _show_training(job: Job, epochs: list[Epoch], console: Console) -> bool:
    table = Table(title=f"Training {job.id}", title_justify="left")
    for column in ("epoch", "loss", "accuracy", "held-out loss", "held-out accuracy", "seconds"):
        table.add_column(column, justify="right")
    for each in epochs:
        losses = f"{each.train_loss:.4f}", f"{each.train_accuracy:.3f}", f"{each.val_loss:.4f}"
        table.add_row(str(each.epoch), *losses, f"{each.val_accuracy:.3f}", f"{each.seconds:.1f}")
    console.print(table)
    accuracy, f1 = job.raw["metrics"]["accuracy"], job.raw["metrics"]["f1"]
    verdict = "[green]✓[/]" if f1 >= MIN_F1 else f"[red]✗ at least {MIN_F1:.2f} was expected[/]"
    console.print(
        f"On patients that training never saw: accuracy {accuracy:.3f}, F1 {f1:.3f} {verdict}", highlight=False
    )
    return bool(f1 >= MIN_F1)


def _show_verdict(model: Json, console: Console) -> bool:
    """Whether the version is champion; where it is not, all reasons of the gate."""
    if model["champion"]:
        patients = model["metrics"]["independent_per_class"]
        tested = " and ".join(f"{count} of {name}" for name, count in patients.items())
        console.print(f"The gate made it champion: tested on {tested} [green]✓[/]", highlight=False, soft_wrap=True)
        return True
    console.print("The gate did not make it champion [red]✗[/]", highlight=False)
    for reason in model["gate"]["reasons"]:
        console.print(f"  {reason}", highlight=False, soft_wrap=True, markup=False)
    return False


def _show_predictions(client: Client, scans: Scans, model: str, console: Console) -> None:
    job = follow(client, client.predict_batch(scans.new, model).id, console)
    if job.state not in ("succeeded", "partially_succeeded"):
        raise ApiError(f"The prediction {job.state}: {job.failure}")
    table = Table("scan", "label", "confidence", "disposition", "truth", title="Ten new patients", title_justify="left")
    for each in client.results(job.id):
        table.add_row(each.name, each.label or each.state, *_verdict_cells(each, scans.truth.get(each.name)))
    console.print(table)


def _verdict_cells(prediction: Prediction, truth: str | None) -> tuple[str, str, str]:
    mark = "[green]✓[/]" if prediction.label == truth else "[red]✗[/]"
    confidence = "–" if prediction.confidence is None else f"{prediction.confidence:.3f}"
    return confidence, prediction.disposition or "–", f"{truth} {mark}"
