"""Units that are held as a worker holds them, without a worker's process."""

import io
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import Dataset
from tests import builders
from worker.resources import Resources, open_resources
from worker.running import Held

Hold = Callable[..., Held]


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

    def claimed(base_model_id: uuid.UUID | None = None, **params: Any) -> Held:
        blob = resources.artifacts.put(io.BytesIO(b"a zip"))
        with sessions.begin() as session:
            dataset = builders.make_dataset(session)
            session.get_one(Dataset, dataset.id).archive_sha256 = blob.sha256
            job = builders.make_job(session, params=params, dataset_id=dataset.id, base_model_id=base_model_id)
            return Held(builders.claim(session, builders.units_of(session, job)[0]), resources)

    return claimed
