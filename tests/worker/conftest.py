"""Units that are held as a worker holds them, without a worker's process."""

import io
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from cli.stack.server_plan import free_port
from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import Dataset
from tests import builders
from tests.processes import eventually
from worker.execution.resources import Resources, open_resources
from worker.execution.unit import UnitLease

Hold = Callable[..., UnitLease]


@pytest.fixture
def resources(settings: Settings) -> Iterator[Resources]:
    """A worker's."""
    opened = open_resources(settings)
    yield opened
    for factory in (opened.sessions, opened.claims, opened.beats):
        factory.kw["bind"].dispose()


@pytest.fixture
def hold(resources: Resources, sessions: Sessions) -> Hold:
    """Claims a training with these parameters, on a dataset of its own."""

    def claimed(base_model_id: uuid.UUID | None = None, **params: Any) -> UnitLease:
        blob = resources.artifacts.put(io.BytesIO(b"a zip"))
        with sessions.begin() as session:
            dataset = builders.make_dataset(session)
            session.get_one(Dataset, dataset.id).archive_sha256 = blob.sha256
            job = builders.make_job(session, params=params, dataset_id=dataset.id, base_model_id=base_model_id)
            return UnitLease(builders.claim(session, builders.units_of(session, job)[0]), resources)

    return claimed


@pytest.fixture(scope="session")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an MLflow server that keeps all it has in a folder."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *command, *store], stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: _healthy(url), 180, lambda: (folder / "log").read_text())
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # asked politely, it waits for connections that clients keep open
        process.wait(10)


def _healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=2).ok
    except requests.RequestException:
        return False
