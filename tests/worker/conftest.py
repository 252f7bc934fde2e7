"""Units that are held as a worker holds them, without a worker's process."""

import io
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cli.stack.server_plan import free_port
from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import Dataset
from tests import builders
from tests.tracking_server import mlflow_server
from worker.execution.resources import Resources, open_resources
from worker.execution.unit import UnitLease

Hold = Callable[..., UnitLease]


@pytest.fixture
def resources(settings: Settings) -> Iterator[Resources]:
    """A worker's."""
    opened = open_resources(settings)
    yield opened
    opened.sessions.kw["bind"].dispose()
    opened.autocommit.close()


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
    """The URL of an MLflow server for all tests."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow"), free_port()) as url:
        yield url
