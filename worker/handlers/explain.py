"""Grad-CAM explanations of predictions, written as pictures into the store.

A batch has units of its own for them, which run after all predictions; a single scan is explained in the unit that
predicts it.
"""

import io
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import structlog
from sqlalchemy.orm import Session

from jobs.queue import explanations, lifecycle
from jobs.queue.explanations import (
    ALL_CLASSES,
    BLANK_NOTE,
    HEATMAP,
    OVERLAY,
    NamedBlob,
    Unexplained,
    artifact_name,
    class_slugs,
)
from jobs.storage.blobs import BlobStore
from jobs.tables import Job
from ml.image.engines.engine import Precision
from ml.image.serving.gradcam import Explainer, Explanation
from ml.image.serving.predictor import ScanInput
from ml.runtime.errors import DeviceOutOfMemory, is_out_of_memory
from worker.execution.unit import UnitLease, WorkFailed
from worker.handlers.prediction_inputs import ScanSource, load_scan, pinned_version, weights_errors

log = structlog.get_logger()

WRITE_SECONDS = 2.0
"""Seconds between two writes: so much work an interruption may lose."""
Finding = tuple[int, ScanInput, str]
"""A result's ordinal, its scan, and its predicted label."""


@dataclass(frozen=True)
class ExplanationRequest:
    """The network that predicted, its precision, and whether all classes or only the predicted one are explained."""

    weights_sha256: str
    precision: Precision
    all_classes: bool


@cache
def explainers() -> dict[tuple[str, Precision], Explainer]:
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
            explained = _explained(unit, request, (result.ordinal, _scan(unit, result, folder), result.label), folder)
            made += explained or []
            failed += explained is None
    if failed:
        _write(unit, made)
        raise WorkFailed("NOT_EXPLAINED", f"Scans not explained: {failed}. The worker's log says why.", retryable=True)
    seconds = time.monotonic() - started

    def end(session: Session) -> None:
        explanations.save(session, unit.claim, made)
        lifecycle.succeed(session, unit.claim, device_seconds=seconds)

    unit.finish(end)


def _write(unit: UnitLease, made: list[NamedBlob]) -> None:
    unit.in_transaction(lambda session: explanations.save(session, unit.claim, made))


def _read(session: Session, unit: UnitLease) -> tuple[ExplanationRequest, list[Unexplained]]:
    job = session.get_one(Job, unit.claim.job_id)
    precision, all_classes = job.params.get("precision", "auto"), job.params.get("explain") == ALL_CLASSES
    request = ExplanationRequest(pinned_version(session, job).weights_sha256, precision, all_classes)
    return request, explanations.unexplained(session, unit.claim)


def _scan(unit: UnitLease, result: Unexplained, folder: Path) -> ScanInput:
    source = ScanSource([result.ordinal], result.sha256, result.source_url)
    return ScanInput(str(result.ordinal), partial(load_scan, unit.resources, source, folder))


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
        (*_, last) = traceback.extract_tb(error.__traceback__)
        # The error's text may contain details of the scan, which do not belong in a log.
        log.error(
            "explanation_failed", ordinal=finding[0], error=type(error).__name__, at=f"{last.filename}:{last.lineno}"
        )
        return None


def _explainer(unit: UnitLease, request: ExplanationRequest, folder: Path) -> Explainer:
    loaded, key = explainers(), (request.weights_sha256, request.precision)
    if key not in loaded:
        loaded.clear()
        with weights_errors():
            loaded[key] = Explainer.load(
                unit.resources.artifacts.fetch(request.weights_sha256, folder), request.precision
            )
    return loaded[key]


def _made(store: BlobStore, explainer: Explainer, finding: Finding, all_classes: bool) -> Iterator[NamedBlob]:
    """Store each class's pictures before the next class is explained: only one class is in memory at a time."""
    ordinal, scan, label = finding
    words = class_slugs(explainer.classes)
    for each in explainer.each_class(scan, label) if all_classes else explainer.explain([scan], label):
        yield from _stored(store, each, ordinal, None if each.label == label else words.get(each.label or ""))


def _stored(store: BlobStore, made: Explanation, ordinal: int, word: str | None) -> Iterator[NamedBlob]:
    if made.overlay is None:
        return
    parts = {OVERLAY: made.overlay, HEATMAP: made.heatmap_png()}
    if made.is_blank:
        parts[BLANK_NOTE] = f"Nothing in this scan speaks for {made.label}: the heatmap is 0 everywhere.\n".encode()
    for part, content in parts.items():
        yield artifact_name(ordinal, part, word), store.put(io.BytesIO(content))
