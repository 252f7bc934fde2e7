"""What a prediction reads: the pinned model version, and the bytes of scans from the blob store or from a URL."""

import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from jobs.models import operating_points, registry
from jobs.tables import Job
from ml.pipelines import Decider, Pipeline, SharedFile
from ml.runtime.errors import ItemError, ModelFileError
from worker.execution.resources import Resources
from worker.execution.unit import WorkFailed
from worker.handlers.remote_fetch import FetchFailed, fetch
from worker.handlers.training_request import installed_spec


@dataclass(frozen=True)
class ScanSource:
    """One scan of a job and the ordinals of the results that need it. It is stored (`sha256`) or remote (`url`).
    `frame`: which of its frames, from 0; None: the whole file."""

    ordinals: list[int]
    sha256: str | None
    url: str | None
    scan_id: uuid.UUID | None = None
    frame: int | None = None


class ScanUnavailable(ItemError):
    """The scan's bytes cannot be read: the reason, and whether a retry may help."""

    def __init__(self, code: str, detail: str, retryable: bool = False) -> None:
        super().__init__(detail)
        self.code, self.retryable = code, retryable


def load_scan(resources: Resources, source: ScanSource, folder: Path) -> bytes | Path:
    """The scan's content, or the path of the store's own file. A copy made in `folder` is read and removed.

    Raises:
        ScanUnavailable: it is no longer stored, or could not be fetched.
    """
    try:
        if source.sha256 is None:
            path = fetch(source.url or "", folder, resources.settings)
        else:
            path = resources.artifacts.fetch(source.sha256, folder)
    except FetchFailed as error:
        raise ScanUnavailable(error.code, str(error), error.retryable) from error
    except FileNotFoundError as error:
        detail = "The scan is no longer stored. Store it again with POST /scans."
        raise ScanUnavailable("SCAN_MISSING", detail) from error
    if not path.is_relative_to(folder):
        return path
    content = path.read_bytes()
    path.unlink()
    return content


def scan_items(
    resources: Resources, pipeline: Pipeline, sources: Sequence[ScanSource], folder: Path, keep: bool = False
) -> list[Any]:
    """The scans as the pipeline takes them, each loaded when it is needed; the id of each is its first ordinal in the
    job. A file is loaded once for all of its frames. `keep`: each is looked at more than once."""
    frames = Counter(_file_of(source) for source in sources if source.frame is not None)
    shared: dict[str | None, SharedFile] = {}
    items = []
    for source in sources:
        id_, load = str(source.ordinals[0]), partial(load_scan, resources, source, folder)
        if source.frame is None:
            items.append(pipeline.item(id_, load, keep))
            continue
        file = shared.setdefault(_file_of(source), SharedFile(load, frames[_file_of(source)]))
        items.append(pipeline.frame(id_, file, source.frame))
    return items


def _file_of(source: ScanSource) -> str | None:
    return source.sha256 or source.url


@dataclass(frozen=True)
class PinnedModel:
    """The model version that a job was pinned to when it was submitted. `sha256`: of its file; `positive` and
    `decider`: see `worker.handlers.outcomes.DispositionPolicy`."""

    id: uuid.UUID
    pipeline: str
    sha256: str
    classes: Sequence[str]
    positive: Sequence[str] | None = None
    decider: Decider | None = None


def pinned_model(session: Session, job: Job) -> PinnedModel:
    """The job's model.

    Raises:
        WorkFailed: the job names none, or this worker does not have its pipeline.
    """
    if job.model_id is None:
        raise WorkFailed("MODEL_MISSING", "The job names no model. Submit it again.")
    version = registry.by_id(session, job.model_id)
    installed_spec(version.pipeline)
    positive, threshold = operating_points.pinned(job, version)
    decider = Decider(tuple(positive), threshold) if positive and threshold is not None else None
    return PinnedModel(version.id, version.pipeline, version.weights_sha256, version.classes, positive, decider)


@contextmanager
def weights_errors() -> Iterator[None]:
    """Turn errors of reading a version's weights into WorkFailed: they are not stored, or not valid."""
    try:
        yield
    except (FileNotFoundError, ModelFileError) as error:
        raise WorkFailed("MODEL_MISSING", "The model's weights cannot be read. Train it again.") from error
