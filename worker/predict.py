"""A chunk of scans: blobs out of storage, predictions into rows. The network stays loaded between chunks."""

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import lifecycle, registry
from jobs.bookkeeping import ScanOutcome
from jobs.states import ResultState
from jobs.tables import Job, Scan, ScanResult
from ml.engines import Precision
from ml.errors import ModelFileError
from ml.predict import Prediction, Predictor, ScanInput
from worker.running import Held, WorkFailed

log = structlog.get_logger()

LOADED_AT_ONCE = 2
"""Networks kept in memory: a champion and the one before it. A VGG16 takes about 0.6 GB."""
REPORT_EVERY = 2.0
"""Seconds between two signs of progress within a chunk."""


@dataclass(frozen=True)
class Chunk:
    """The unit's work: which weights in which precision, and which stored scan at which ordinal."""

    weights_sha256: str
    precision: Precision
    scans: Sequence[tuple[int, str]]


class Networks:
    """The loaded networks, by the hash of their weights and the precision; the one unused for longest goes first."""

    def __init__(self) -> None:
        self._loaded: OrderedDict[tuple[str, Precision], Predictor] = OrderedDict()

    def get(self, sha256: str, precision: Precision, path: Path) -> Predictor:
        """The network, loaded when it is not yet."""
        key = sha256, precision
        if key not in self._loaded:
            while len(self._loaded) >= LOADED_AT_ONCE:
                self._loaded.popitem(last=False)
            started = time.monotonic()
            loaded = self._loaded[key] = Predictor.load(path, precision)
            took = round(time.monotonic() - started, 2)
            log.info("network_loaded", sha256=sha256[:12], engine=loaded.engine.name, seconds=took)
        self._loaded.move_to_end(key)
        return self._loaded[key]


@cache
def networks() -> Networks:
    """This process's networks."""
    return Networks()


def predict_chunk(held: Held) -> None:
    """Predict the unit's scans, and end it with all its results in one transaction."""
    chunk = held.in_transaction(lambda session: _read_chunk(session, held))
    started = time.monotonic()
    with held.workspace() as folder:
        for outcome in _predictions(held, chunk, folder):
            held.outcomes.append(outcome)
            if len(held.outcomes) < len(chunk.scans):  # what is complete has nothing to hand back
                held.check()
    seconds = time.monotonic() - started

    def end(session: Session) -> None:
        lifecycle.succeed(session, held.claim, outcomes=held.outcomes, device_seconds=seconds)

    held.finish(end)


def _read_chunk(session: Session, held: Held) -> Chunk:
    job = session.get_one(Job, held.claim.job_id)
    if job.model_id is None:
        raise WorkFailed("MODEL_MISSING", "The job names no model. Submit it again.")
    version = registry.by_id(session, job.model_id)
    rows = session.execute(
        select(ScanResult.ordinal, Scan.sha256)
        .join(Scan, Scan.id == ScanResult.scan_id)
        .where(ScanResult.unit_id == held.claim.unit_id, ScanResult.state == ResultState.PENDING)
        .order_by(ScanResult.ordinal)
    )
    precision = job.params.get("precision", "auto")
    return Chunk(version.weights_sha256, precision, [(row.ordinal, row.sha256) for row in rows])


def _predictions(held: Held, chunk: Chunk, folder: Path) -> Iterator[ScanOutcome]:
    store = held.resources.artifacts
    try:
        weights = store.fetch(chunk.weights_sha256, folder)
        predictor = networks().get(chunk.weights_sha256, chunk.precision, weights)
    except (FileNotFoundError, ModelFileError) as error:
        raise WorkFailed("MODEL_MISSING", "The model's weights cannot be read. Train it again.") from error
    scans = (ScanInput(str(ordinal), store.fetch(sha256, folder)) for ordinal, sha256 in chunk.scans)
    reported = time.monotonic()
    for prediction in predictor.predict(scans):
        if time.monotonic() - reported > REPORT_EVERY:
            reported = time.monotonic()
            held.report()
        yield _outcome(prediction, predictor.engine.name)


def _outcome(prediction: Prediction, engine: str) -> ScanOutcome:
    ordinal = int(prediction.id)
    if prediction.error_code is not None:
        error = {"code": prediction.error_code, "detail": prediction.error_detail, "retryable": False}
        return ScanOutcome(ordinal, error=error)
    return ScanOutcome(ordinal, prediction.label, prediction.confidence, prediction.probabilities, engine)
