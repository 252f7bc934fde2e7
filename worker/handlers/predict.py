"""A chunk of scans: blobs out of storage, predictions into rows. The network stays loaded between chunks."""

import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.queue import explanations, lifecycle
from jobs.queue.explanations import ALL, Made
from jobs.queue.outcomes import ScanOutcome
from jobs.results.cache import Known, known_results
from jobs.states import JobKind, ResultState
from jobs.tables import Job, Scan, ScanResult
from ml.image.engines.base import Precision
from ml.image.serving.predictor import KeptScan, Predictor, ScanInput
from worker.execution.unit import Held
from worker.handlers.explain import Asked, explained_at_once
from worker.handlers.outcomes import Judge
from worker.handlers.sources import Wanted, bring
from worker.handlers.weights import pinned, reading_weights

log = structlog.get_logger()

LOADED_AT_ONCE = 2
"""Networks kept in memory: a champion and the one before it. A VGG16 takes about 0.6 GB; and as much again where
explanations are asked for, whose network (see worker.handlers.explain) is another one beside these."""
REPORT_EVERY = 2.0
"""Seconds between two signs of progress within a chunk."""


@dataclass(frozen=True)
class Chunk:
    """The unit's work: which model in which precision, and which scans. `explain`: they are explained too, and where it
    is "all", for every class."""

    model_id: uuid.UUID
    weights_sha256: str
    classes: Sequence[str]
    precision: Precision
    explain: bool | str
    scans: Sequence[Wanted]

    @property
    def results(self) -> int:
        """How many results there will be: a scan may be wanted several times."""
        return sum(len(wanted.ordinals) for wanted in self.scans)


class Networks:
    """The loaded networks, by the hash of their weights and the precision; the one unused for longest goes first."""

    def __init__(self) -> None:
        self._loaded: OrderedDict[tuple[str, Precision], Predictor] = OrderedDict()

    def get(self, sha256: str, precision: Precision, fetch: Callable[[str], Path]) -> Predictor:
        """The network; where it is not loaded yet, `fetch` brings the file with its weights."""
        key = sha256, precision
        if key not in self._loaded:
            while len(self._loaded) >= LOADED_AT_ONCE:
                self._loaded.popitem(last=False)
            started = time.monotonic()
            loaded = self._loaded[key] = Predictor.load(fetch(sha256), precision)
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
        predictor = _predictor(held, chunk, folder)
        at_once = bool(chunk.explain) and _explains_at_once(held)
        scans = _scans(held, chunk, folder, KeptScan if at_once else ScanInput)
        for outcome in _outcomes(held, chunk, predictor, scans):
            held.outcomes.append(outcome)
            if len(held.outcomes) < chunk.results:  # what is complete has nothing to hand back
                held.check()
        made = _explained(held, chunk, scans, folder) if at_once else []
    seconds = time.monotonic() - started

    def end(session: Session) -> None:
        later = bool(chunk.explain) and not at_once
        lifecycle.succeed(session, held.claim, outcomes=held.outcomes, device_seconds=seconds, then_explain=later)
        explanations.write(session, held.claim, made)

    held.finish(end)


def _explains_at_once(held: Held) -> bool:
    """A single scan's explanation comes with its prediction: one doorbell, one claim, one end. But at first only: an
    attempt that died of it took the prediction with it, and the next must not. A batch's explanations wait."""
    return held.claim.kind == JobKind.PREDICT and held.claim.attempt == 1


def _explained(held: Held, chunk: Chunk, scans: Sequence[ScanInput], folder: Path) -> list[Made]:
    asked = Asked(chunk.weights_sha256, chunk.precision, chunk.explain == ALL)
    labels = {outcome.ordinal: outcome.label for outcome in held.outcomes if outcome.label is not None}
    places = [(ordinal, scan) for wanted, scan in zip(chunk.scans, scans, strict=True) for ordinal in wanted.ordinals]
    found = [(ordinal, scan, labels[ordinal]) for ordinal, scan in places if ordinal in labels]
    return explained_at_once(held, asked, found, folder)


def _read_chunk(session: Session, held: Held) -> Chunk:
    job = session.get_one(Job, held.claim.job_id)
    version = pinned(session, job)
    precision, explain = job.params.get("precision", "auto"), job.params.get("explain", False)
    network = version.id, version.weights_sha256, version.classes
    return Chunk(*network, precision, explain, _wanted(session, held.claim.unit_id))


def _wanted(session: Session, unit_id: uuid.UUID) -> list[Wanted]:
    """The unit's scans, each once."""
    rows = session.execute(
        select(ScanResult.ordinal, ScanResult.scan_id, ScanResult.source_url, Scan.sha256)
        .join(Scan, Scan.id == ScanResult.scan_id, isouter=True)
        .where(ScanResult.unit_id == unit_id, ScanResult.state == ResultState.PENDING)
        .order_by(ScanResult.ordinal)
    )
    wanted: dict[object, Wanted] = {}
    for row in rows:
        same = wanted.setdefault(row.scan_id or row.source_url, Wanted([], row.sha256, row.source_url, row.scan_id))
        same.ordinals.append(row.ordinal)
    return list(wanted.values())


def _predictor(held: Held, chunk: Chunk, folder: Path) -> Predictor:
    fetch = partial(held.resources.artifacts.fetch, folder=folder)
    with reading_weights():
        return networks().get(chunk.weights_sha256, chunk.precision, fetch)


def _scans(held: Held, chunk: Chunk, folder: Path, kind: type[ScanInput]) -> list[ScanInput]:
    """The chunk's scans, each brought when it is looked at; its id is its first ordinal in the job."""
    return [kind(str(wanted.ordinals[0]), partial(bring, held.resources, wanted, folder)) for wanted in chunk.scans]


def _outcomes(held: Held, chunk: Chunk, predictor: Predictor, scans: Sequence[ScanInput]) -> Iterator[ScanOutcome]:
    judge = Judge.of(held.resources.settings, chunk.classes, predictor.engine.name)
    known = _known(held, chunk, judge.engine)
    left: dict[str, tuple[ScanInput, Wanted]] = {}
    for wanted, scan in zip(chunk.scans, scans, strict=True):
        found = known.get(wanted.scan_id) if wanted.scan_id else None
        if found is None:
            left[scan.id] = scan, wanted
        else:
            yield from _alike(wanted, judge.of_known(found))
    reported = time.monotonic()
    for prediction in predictor.predict([scan for scan, _ in left.values()]):
        if time.monotonic() - reported > REPORT_EVERY:
            reported = time.monotonic()
            held.report()
        yield from _alike(left[prediction.id][1], judge.of_prediction(prediction))


def _known(held: Held, chunk: Chunk, engine: str) -> dict[uuid.UUID, Known]:
    ids = [wanted.scan_id for wanted in chunk.scans if wanted.scan_id is not None]
    if not held.resources.settings.reuse_results or not ids:
        return {}
    return held.in_transaction(lambda session: known_results(session, chunk.model_id, engine, ids))


def _alike(wanted: Wanted, outcome: ScanOutcome) -> Iterator[ScanOutcome]:
    """The outcome at each place of the scan; it was computed for the first at most."""
    for number, ordinal in enumerate(wanted.ordinals):
        yield replace(outcome, ordinal=ordinal, cached=outcome.error is None and (outcome.cached or number > 0))
