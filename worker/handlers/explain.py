"""Explanations of predictions, written as files into the store.

A batch has units of its own for them, which run after all predictions; a single scan is explained in the unit that
predicts it.
"""

import io
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.orm import Session

from jobs.queue import explanations, lifecycle
from jobs.queue.explanations import (
    ALL_CLASSES,
    NamedBlob,
    Unexplained,
    artifact_name,
    class_slugs,
)
from jobs.storage.blobs import BlobStore
from jobs.tables import Job, Json
from ml.pipelines import Explainer, Explanation, pipeline_of
from ml.runtime.errors import DeviceOutOfMemory, is_out_of_memory
from worker.execution.unit import UnitLease, WorkFailed
from worker.handlers.prediction_inputs import PinnedModel, ScanSource, pinned_model, scan_items, weights_errors

log = structlog.get_logger()

WRITE_SECONDS = 2.0
"""Seconds between two writes: so much work an interruption may lose."""
Finding = tuple[int, Any, str]
"""A result's ordinal, its scan, and its predicted label."""


@dataclass(frozen=True)
class ExplanationRequest:
    """The model that predicted, and the options that it did so with."""

    model: PinnedModel
    options: Json

    @property
    def all_classes(self) -> bool:
        """Whether all classes are explained, or only the predicted one."""
        return bool(self.options.get("explain") == ALL_CLASSES)


@cache
def explainers() -> dict[tuple[str, str], Explainer]:
    """This process's network for explanations, by the hash of its weights and the precision: at most one."""
    return {}


def explain_results(unit: UnitLease) -> None:
    """Explain the unit's results. An interruption keeps what is written, and one failing scan does not affect others.

    Raises:
        WorkFailed: some could not be explained; a retry explains only these.
    """
    request, results = unit.in_transaction(lambda session: _read(session, unit))
    made: list[NamedBlob] = []
    failed = 0
    started = written = time.monotonic()
    with unit.workspace() as folder:
        _explainer(unit, request, folder)  # fails the unit at once where the network cannot be loaded
        for result in results:
            unit.check()
            if time.monotonic() - written > WRITE_SECONDS:
                _write(unit, made)
                made, written = [], time.monotonic()
            explained = _explained(
                unit, request, (result.ordinal, _scan(unit, request, result, folder), result.label), folder
            )
            made += explained or []
            failed += explained is None
    if failed:
        _write(unit, made)
        raise WorkFailed("NOT_EXPLAINED", f"Scans not explained: {failed}. The worker's log says why.", retryable=True)
    seconds = time.monotonic() - started

    def end(session: Session) -> None:
        lifecycle.succeed(session, unit.claim, device_seconds=seconds)  # first: it locks the job before the unit
        explanations.insert_artifacts(session, unit.claim, made)

    unit.finish(end)


def _write(unit: UnitLease, made: list[NamedBlob]) -> None:
    unit.in_transaction(lambda session: explanations.save(session, unit.claim, made))


def _read(session: Session, unit: UnitLease) -> tuple[ExplanationRequest, list[Unexplained]]:
    job = session.get_one(Job, unit.claim.job_id)
    request = ExplanationRequest(pinned_model(session, job), job.params)
    return request, explanations.unexplained(session, unit.claim)


def _scan(unit: UnitLease, request: ExplanationRequest, result: Unexplained, folder: Path) -> Any:
    source = ScanSource([result.ordinal], result.sha256, result.source_url, frame=result.frame)
    return scan_items(unit.resources, pipeline_of(request.model.pipeline), [source], folder)[0]


def explain_now(
    unit: UnitLease, request: ExplanationRequest, findings: Iterable[Finding], folder: Path
) -> list[NamedBlob]:
    """Explain results before they are written. No failure here affects the results: they are written without it."""
    return [made for finding in findings for made in _explained(unit, request, finding, folder) or []]


def _explained(unit: UnitLease, request: ExplanationRequest, finding: Finding, folder: Path) -> list[NamedBlob] | None:
    """Store the scan's whole explanation. An empty list: the scan can no longer be read. None: it failed."""
    try:
        explainer = _explainer(unit, request, folder)
        return list(_made(unit.resources.artifacts, explainer, finding, request.all_classes))
    except Exception as error:
        if isinstance(error, DeviceOutOfMemory) or is_out_of_memory(error):
            explainers().clear()  # frees its device memory
        log.error("explanation_failed", ordinal=finding[0], error=type(error).__name__, exc_info=error)
        return None


def _explainer(unit: UnitLease, request: ExplanationRequest, folder: Path) -> Explainer:
    loaded, model = explainers(), request.model
    key = model.sha256, request.options.get("precision", "auto")
    if key not in loaded:
        loaded.clear()
        with weights_errors():
            file = unit.resources.artifacts.fetch(model.sha256, folder)
            loaded[key] = pipeline_of(model.pipeline).explainer(file, request.options)
    return loaded[key]


def _made(store: BlobStore, explainer: Explainer, finding: Finding, all_classes: bool) -> Iterator[NamedBlob]:
    """Store each class's pictures before the next class is explained: only one class is in memory at a time."""
    ordinal, scan, label = finding
    words = class_slugs(explainer.classes)
    for each in explainer.explanations(scan, label, all_classes):
        yield from _stored(store, each, ordinal, None if each.label == label else words.get(each.label or ""))


def _stored(store: BlobStore, made: Explanation, ordinal: int, word: str | None) -> Iterator[NamedBlob]:
    for suffix, content in made.files.items():
        yield artifact_name(ordinal, suffix, word), store.put(io.BytesIO(content))
