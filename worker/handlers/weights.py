"""The weights of the version that a prediction is pinned to, or why there are none."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from jobs.models import registry
from jobs.tables import Job, ModelVersion
from ml.runtime.errors import ModelFileError
from worker.execution.unit import WorkFailed


def pinned(session: Session, job: Job) -> ModelVersion:
    """The version that the job was pinned to at its submit. Raises WorkFailed."""
    if job.model_id is None:
        raise WorkFailed("MODEL_MISSING", "The job names no model. Submit it again.")
    return registry.by_id(session, job.model_id)


@contextmanager
def reading_weights() -> Iterator[None]:
    """WorkFailed where the version's weights are not stored, or are none."""
    try:
        yield
    except (FileNotFoundError, ModelFileError) as error:
        raise WorkFailed("MODEL_MISSING", "The model's weights cannot be read. Train it again.") from error
