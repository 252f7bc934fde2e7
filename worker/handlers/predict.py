"""Predict a chunk of scans: read them, predict, write the results. Networks stay loaded between chunks."""

import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.queue import explanations, lifecycle
from jobs.queue.explanations import NamedBlob
from jobs.queue.outcomes import ScanOutcome
from jobs.results.cache import CachedResult, ScanFrame, cached_results
from jobs.states import JobKind, ResultState, UnitState
from jobs.tables import Job, Json, Scan, ScanResult
from ml.pipelines import Pipeline, Predictor, pipeline_of
from worker.execution.unit import Ended, UnitLease
from worker.handlers.explain import ExplanationRequest, explain_now
from worker.handlers.outcomes import DispositionPolicy
from worker.handlers.prediction_inputs import PinnedModel, ScanSource, pinned_model, scan_items, weights_errors

log = structlog.get_logger()

MAX_LOADED_NETWORKS = 2
"""Models kept in memory: the champion and its predecessor. The largest network takes about 0.6 GB, and the same again
where explanations are made: their network (see worker.handlers.explain) is loaded separately."""
REPORT_SECONDS = 2.0
"""Seconds between two progress reports within a chunk."""


@dataclass(frozen=True)
class Chunk:
    """The unit's work: the model, the job's `options` and the scans.

    `options["explain"]`: explain them too; "all": for every class.
    """

    model: PinnedModel
    options: Json
    scans: Sequence[ScanSource]

    @property
    def results(self) -> int:
        """Number of results: a scan may stand in the job several times."""
        return sum(len(source.ordinals) for source in self.scans)


class Networks:
    """LRU cache of loaded models, by the hash of their files and the precision."""

    def __init__(self) -> None:
        self._loaded: OrderedDict[tuple[str, str], Predictor] = OrderedDict()

    def holds(self, sha256: str, options: Json) -> bool:
        """Whether the model is loaded."""
        return _key(sha256, options) in self._loaded

    def get(self, pipeline: Pipeline, sha256: str, options: Json, fetch: Callable[[str], Path]) -> Predictor:
        """The model; if it is not loaded yet, `fetch` returns its file."""
        key = _key(sha256, options)
        if key not in self._loaded:
            while len(self._loaded) >= MAX_LOADED_NETWORKS:
                self._loaded.popitem(last=False)
            started = time.monotonic()
            loaded = self._loaded[key] = pipeline.open(fetch(sha256), options)
            took = round(time.monotonic() - started, 2)
            log.info("network_loaded", sha256=sha256[:12], engine=loaded.engine.name, seconds=took)
        self._loaded.move_to_end(key)
        return self._loaded[key]


def _key(sha256: str, options: Json) -> tuple[str, str]:
    return sha256, options.get("precision", "auto")


@cache
def networks() -> Networks:
    """This process's networks."""
    return Networks()


def predict_chunk(unit: UnitLease) -> None:
    """Predict the unit's scans, and finish it with all its results in one transaction."""
    chunk = unit.in_transaction(lambda session: _read_chunk(session, unit))
    started = time.monotonic()
    with unit.workspace() as folder:
        was_loaded = networks().holds(chunk.model.sha256, chunk.options)
        predictor = _predictor(unit, chunk, folder)
        unit.warmup_seconds = None if was_loaded else time.monotonic() - unit.claimed_at
        explains_now = bool(chunk.options.get("explain")) and _explains_now(unit)
        pipeline = pipeline_of(chunk.model.pipeline)
        scans = scan_items(unit.resources, pipeline, chunk.scans, folder, keep=explains_now)
        for outcome in _outcomes(unit, chunk, predictor, scans):
            unit.outcomes.append(outcome)
            if len(unit.outcomes) < chunk.results:  # a complete chunk is not handed back
                unit.check()
        made = _explained(unit, chunk, scans, folder) if explains_now else []
    seconds = time.monotonic() - started

    def end(session: Session) -> Ended | None:
        later = bool(chunk.options.get("explain")) and not explains_now
        lifecycle.succeed(
            session,
            unit.claim,
            outcomes=unit.outcomes,
            device_seconds=seconds,
            enqueue_explanations=later,
            warmup_seconds=unit.warmup_seconds,
        )
        explanations.insert_artifacts(session, unit.claim, made)
        return _without_results(unit.outcomes)

    unit.finish(end)


def _without_results(outcomes: Sequence[ScanOutcome]) -> Ended | None:
    """Of a chunk in which no scan has a result: failed, with the code of the first scan's error."""
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    return Ended(UnitState.FAILED, errors[0]["code"]) if errors and len(errors) == len(outcomes) else None


def _explains_now(unit: UnitLease) -> bool:
    """Whether the unit explains what it predicts: a single scan, for one dispatch and one claim. Only in the first
    attempt: if the explanation killed the worker, the prediction was lost with it. A batch is explained later."""
    return unit.claim.kind == JobKind.PREDICT and unit.claim.attempt == 1


def _explained(unit: UnitLease, chunk: Chunk, scans: Sequence[Any], folder: Path) -> list[NamedBlob]:
    request = ExplanationRequest(chunk.model, chunk.options)
    labels = {outcome.ordinal: outcome.label for outcome in unit.outcomes if outcome.label is not None}
    inputs = [(ordinal, scan) for source, scan in zip(chunk.scans, scans, strict=True) for ordinal in source.ordinals]
    findings = [(ordinal, scan, labels[ordinal]) for ordinal, scan in inputs if ordinal in labels]
    return explain_now(unit, request, findings, folder)


def _read_chunk(session: Session, unit: UnitLease) -> Chunk:
    job = session.get_one(Job, unit.claim.job_id)
    return Chunk(pinned_model(session, job), job.params, _sources(session, unit.claim.unit_id))


def _sources(session: Session, unit_id: uuid.UUID) -> list[ScanSource]:
    """The unit's scans, or frames of them, each once."""
    rows = session.execute(
        select(ScanResult.ordinal, ScanResult.scan_id, ScanResult.source_url, ScanResult.frame, Scan.sha256)
        .join(Scan, Scan.id == ScanResult.scan_id, isouter=True)
        .where(ScanResult.unit_id == unit_id, ScanResult.state == ResultState.PENDING)
        .order_by(ScanResult.ordinal)
    )
    sources: dict[object, ScanSource] = {}
    for row in rows:
        source = sources.setdefault(
            (row.scan_id or row.source_url, row.frame),
            ScanSource([], row.sha256, row.source_url, row.scan_id, row.frame),
        )
        source.ordinals.append(row.ordinal)
    return list(sources.values())


def _predictor(unit: UnitLease, chunk: Chunk, folder: Path) -> Predictor:
    fetch, pipeline = partial(unit.resources.artifacts.fetch, folder=folder), pipeline_of(chunk.model.pipeline)
    with weights_errors():
        return networks().get(pipeline, chunk.model.sha256, chunk.options, fetch)


def _outcomes(unit: UnitLease, chunk: Chunk, predictor: Predictor, scans: Sequence[Any]) -> Iterator[ScanOutcome]:
    pipeline, classes = pipeline_of(chunk.model.pipeline), chunk.model.classes
    model, settings = chunk.model, unit.resources.settings
    policy = DispositionPolicy.of(settings, pipeline, classes, predictor.engine.name, model.positive, model.decider)
    known = _known(unit, chunk, policy.engine)
    left: dict[str, tuple[Any, ScanSource]] = {}
    for source, scan in zip(chunk.scans, scans, strict=True):
        found = known.get((source.scan_id, source.frame)) if source.scan_id else None
        if found is None:
            left[scan.id] = scan, source
        else:
            yield from _repeat(source, policy.from_cached(found))
    reported = time.monotonic()
    for prediction in predictor.predict([scan for scan, _ in left.values()]):
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            unit.report(done=len(unit.outcomes), warmup_seconds=unit.warmup_seconds)
        yield from _repeat(left[prediction.id][1], policy.from_prediction(prediction))


def _known(unit: UnitLease, chunk: Chunk, engine: str) -> dict[ScanFrame, CachedResult]:
    ids = [source.scan_id for source in chunk.scans if source.scan_id is not None]
    if not unit.resources.settings.reuse_results or not ids:
        return {}
    return unit.in_transaction(lambda session: cached_results(session, chunk.model.id, engine, ids))


def _repeat(source: ScanSource, outcome: ScanOutcome) -> Iterator[ScanOutcome]:
    """The outcome for each of the scan's ordinals; all after the first count as cached."""
    for number, ordinal in enumerate(source.ordinals):
        yield replace(outcome, ordinal=ordinal, cached=outcome.error is None and (outcome.cached or number > 0))
