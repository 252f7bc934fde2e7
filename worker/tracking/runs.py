"""Calls to MLflow: a run's parameters, tags, dataset and metrics. Each may fail or take long."""

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import requests

from jobs.tables import Json
from ml.runtime.events import Steps
from ml.spec.pipeline import PipelineSpec
from worker.tracking import experiment
from worker.tracking.provenance import code_revision, environment

MISSING = "RESOURCE_DOES_NOT_EXIST"
"""MLflow's code for what it does not have (any more)."""
METRICS_AT_ONCE = 1000
"""MLflow's limit per call."""
DIGEST_LENGTH = 36
"""MLflow's limit for a dataset's digest; the whole digest is a tag."""
ANSWER_SECONDS = 5.0
"""How long MLflow may take to say that it is there."""
NOT_A_METRIC = ("epoch", "epochs", "attempt")


@dataclass(frozen=True)
class Description:
    """Metadata of a run. Its name is the job's, or else the pipeline's; the version follows once there is one."""

    name: str
    spec: PipelineSpec
    job_id: uuid.UUID
    params: Json
    tags: dict[str, str]
    dataset_digest: str | None


@dataclass(frozen=True)
class Point:
    """A metric's value at a step; `at` in milliseconds since 1970."""

    name: str
    value: float
    step: int
    at: int


def describe(
    spec: PipelineSpec,
    job_id: uuid.UUID,
    params: Json,
    dataset_digest: str | None,
    revision: str | None = None,
    versions: Json | None = None,
    name: str | None = None,
) -> Description:
    """A run of this code on this machine, unless `revision` and `versions` are given.

    Args:
        name: the job's, if it has one.
    """
    tags = {"renalq.job_id": str(job_id), "mlflow.source.git.commit": revision or code_revision() or "unknown"}
    tags |= {f"environment.{name}": str(value) for name, value in (versions or environment(spec.packages)).items()}
    return Description(name or spec.name, spec, job_id, params, tags, dataset_digest)


def connect(url: str) -> Any:
    """MLflow's client."""
    # MLflow reads these with each request; by default it retries for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    # By default it prints the names of runs, which clients gave them.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=url)


def answers(client: Any) -> bool:
    """Whether MLflow answers: what failed then failed for a reason of its own. A server that takes connections and
    answers none is given up after `ANSWER_SECONDS`, not after the client's retries: trainings wait meanwhile."""
    try:
        if client.tracking_uri.startswith("http"):
            requests.get(f"{client.tracking_uri.rstrip('/')}/health", timeout=ANSWER_SECONDS)
        client.get_experiment_by_name(experiment.NAME)
    except Exception:
        return False
    return True


def open_run(
    client: Any, what: Description, run_id: str | None, created: Callable[[str], None] = lambda run_id: None
) -> str:
    """Continue `run_id`, or create a run if there is none or it was deleted in MLflow. Returns its id.

    Args:
        created: called with the id of a new run before anything else that may fail.
    """
    run = _active_run(client, run_id) if run_id else None
    if run is None:
        run_id = _create_run(client, what)
        created(run_id)
    else:
        client.update_run(run_id, status="RUNNING")
    assert run_id is not None
    if run is None or not run.data.params:
        _log_inputs(client, run_id, what)
    return run_id


def _active_run(client: Any, run_id: str) -> Any | None:
    """The run; None if it was deleted: MLflow shows deleted runs for a while, and takes nothing more for them."""
    from mlflow import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _create_run(client: Any, what: Description) -> str:
    place = experiment.open_experiment(client)
    return str(client.create_run(place, run_name=what.name, tags=what.tags).info.run_id)


def _log_inputs(client: Any, run: str, what: Description) -> None:
    from mlflow.entities import Param

    client.log_batch(run, params=[Param(name, value) for name, value in texts(what.params)])
    if what.dataset_digest:
        log_dataset(client, run, what.dataset_digest)


def log_dataset(client: Any, run: str, digest: str) -> None:
    """Log the dataset by digest only, since its name may be a patient's."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"digest": digest})
    data = Dataset(f"dataset-{digest[:8]}", digest[:DIGEST_LENGTH], source_type="renalq", source=source)
    client.log_inputs(run, datasets=[DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
    client.set_tag(run, "renalq.dataset_digest", digest)


def log_weights(client: Any, run: str, new: str, base: str | None) -> None:
    """Log the hashes of the new weights, and of those that the training started from if known."""
    client.set_tag(run, "renalq.weights_sha256", new)
    if base:
        client.set_tag(run, "renalq.base_weights_sha256", base)


def log_points(client: Any, run: str, points: Iterable[Point]) -> None:
    """Log metrics in as few calls as possible."""
    from mlflow.entities import Metric

    waiting = iter(points)
    while part := list(islice(waiting, METRICS_AT_ONCE)):
        client.log_batch(run, metrics=[Metric(point.name, point.value, point.at, point.step) for point in part])


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


# --- figures ---


def points_of_steps(steps: Steps) -> list[Point]:
    """The loss of each optimizer step, and the learning rate of the last one."""
    at, last = now(), steps.first_step + len(steps.losses) - 1
    losses = [Point("train_loss_step", loss, steps.first_step + number, at) for number, loss in enumerate(steps.losses)]
    return [*losses, Point("learning_rate_step", steps.learning_rate, last, at)] if losses else []


def points_of_epoch(epoch: Json, phases: Sequence[str]) -> list[Point]:
    """An epoch's figures at its number; `phase` as its place in the pipeline's `phases`."""
    figures = {name: value for name, value in epoch.items() if name not in NOT_A_METRIC}
    if figures.get("phase") in phases:
        figures["phase"] = phases.index(figures["phase"])
    return [Point(name, value, int(epoch["epoch"]), now()) for name, value in flattened(figures)]


def points_of_scores(metrics: Json) -> list[Point]:
    """The evaluation's figures by dotted names: `test_f1`, `test_per_class.Tumor.f1`, `test_intervals.f1.low`."""
    return [Point(f"test_{name}", value, 0, now()) for name, value in flattened(metrics)]


def flattened(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a tree by dotted names. Of lists, only intervals and lists of objects become metrics."""
    if isinstance(value, int | float):
        yield _allowed(name), float(value)
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from flattened(child, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and "intervals" in name.split("."):
        yield from flattened(dict(zip(("low", "high"), value, strict=False)), name)
    elif isinstance(value, list) and all(isinstance(each, dict) for each in value):
        yield from flattened(dict(enumerate(value, 1)), name)


def texts(params: Json, prefix: str = "") -> Sequence[tuple[str, str]]:
    """Parameters as MLflow stores them: texts by dotted names."""
    found: list[tuple[str, str]] = []
    for name, value in params.items():
        nested = isinstance(value, dict)
        found += texts(value, f"{prefix}{name}.") if nested else [(_allowed(f"{prefix}{name}"), str(value))]
    return found


def _allowed(name: str) -> str:
    """A class may have any name, a metric may not."""
    return re.sub(r"[^\w.\- ]", "_", name)[:250]
