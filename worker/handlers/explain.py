"""Explanations of what predictions found: pictures into the store. A batch's come behind all that predicts, a single
scan's in the unit that predicts it."""

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
from jobs.queue.explanations import ALL, BLANK, HEATMAP, OVERLAY, Made, Unexplained, name_of, words_of
from jobs.storage.blobs import Artifacts
from jobs.tables import Job
from ml.image.engines.base import Precision
from ml.image.serving.gradcam import Explainer, Explanation
from ml.image.serving.predictor import ScanInput
from ml.runtime.errors import DeviceOutOfMemory, is_out_of_memory
from worker.execution.unit import Held, WorkFailed
from worker.handlers.sources import Wanted, bring
from worker.handlers.weights import pinned, reading_weights

log = structlog.get_logger()

WRITE_EVERY = 2.0
"""Seconds of work that an interruption may cost."""
Found = tuple[int, ScanInput, str]
"""A result's ordinal, its scan, and the label that was found in it."""


@dataclass(frozen=True)
class Asked:
    """By which network scans are to be explained, in which precision it predicted; `others`: for every class."""

    weights_sha256: str
    precision: Precision
    others: bool


@cache
def explainers() -> dict[tuple[str, Precision], Explainer]:
    """This process's loaded network with its gradients, by the hash of its weights and the precision: one at most."""
    return {}


def explain_results(held: Held) -> None:
    """Explain the results that the unit is for. What is written when it is interrupted stays, and a scan that cannot be
    explained costs no other its explanation.

    Raises:
        WorkFailed: some could not be explained; another try does these alone.
    """
    asked, left = held.in_transaction(lambda session: _read(session, held))
    made: list[Made] = []
    failed = 0
    started = written = time.monotonic()
    with held.workspace() as folder:
        _explainer(held, asked, folder)  # where it cannot be had, the unit fails and says why
        for one in left:
            held.check()
            if time.monotonic() - written > WRITE_EVERY:
                held.in_transaction(partial(explanations.keep, held=held.claim, made=made))
                made, written = [], time.monotonic()
            explained = _explained(held, asked, (one.ordinal, _scan(held, one, folder), one.label), folder)
            made += explained or []
            failed += explained is None
    if failed:
        held.in_transaction(partial(explanations.keep, held=held.claim, made=made))
        raise WorkFailed("NOT_EXPLAINED", f"Scans not explained: {failed}. The worker's log says why.", retryable=True)
    seconds = time.monotonic() - started

    def end(session: Session) -> None:
        explanations.keep(session, held.claim, made)
        lifecycle.succeed(session, held.claim, device_seconds=seconds)

    held.finish(end)


def _read(session: Session, held: Held) -> tuple[Asked, list[Unexplained]]:
    job = session.get_one(Job, held.claim.job_id)
    precision, others = job.params.get("precision", "auto"), job.params.get("explain") == ALL
    asked = Asked(pinned(session, job).weights_sha256, precision, others)
    return asked, explanations.unexplained(session, held.claim)


def _scan(held: Held, one: Unexplained, folder: Path) -> ScanInput:
    wanted = Wanted([one.ordinal], one.sha256, one.source_url)
    return ScanInput(str(one.ordinal), partial(bring, held.resources, wanted, folder))


def explained_at_once(held: Held, asked: Asked, found: Iterable[Found], folder: Path) -> list[Made]:
    """Explanations of results that wait for them. Whatever goes wrong here, the results stand: without these."""
    return [made for one in found for made in _explained(held, asked, one, folder) or []]


def _explained(held: Held, asked: Asked, found: Found, folder: Path) -> list[Made] | None:
    """The scan's explanation, stored: all of it. Nothing where the scan can no longer be read; None where it failed."""
    try:
        explainer = _explainer(held, asked, folder)
        return list(_made(held.resources.artifacts, explainer, found, asked.others))
    except Exception as error:
        if isinstance(error, DeviceOutOfMemory) or is_out_of_memory(error):
            explainers().clear()  # so that others have its memory
        (*_, last) = traceback.extract_tb(error.__traceback__)
        # The error's own text might tell more of the scan than a log may.
        log.error("not_explained", ordinal=found[0], error=type(error).__name__, at=f"{last.filename}:{last.lineno}")
        return None


def _explainer(held: Held, asked: Asked, folder: Path) -> Explainer:
    loaded, key = explainers(), (asked.weights_sha256, asked.precision)
    if key not in loaded:
        loaded.clear()
        with reading_weights():
            loaded[key] = Explainer.load(held.resources.artifacts.fetch(asked.weights_sha256, folder), asked.precision)
    return loaded[key]


def _made(store: Artifacts, explainer: Explainer, found: Found, others: bool) -> Iterator[Made]:
    """Each class's pictures are stored before the next one's are made: those of one class at most are in memory."""
    ordinal, scan, label = found
    words = words_of(explainer.classes)
    for each in explainer.each_class(scan, label) if others else explainer.explain([scan], label):
        yield from _stored(store, each, ordinal, None if each.label == label else words.get(each.label or ""))


def _stored(store: Artifacts, made: Explanation, ordinal: int, word: str | None) -> Iterator[Made]:
    if made.overlay is None:
        return
    parts = {OVERLAY: made.overlay, HEATMAP: made.heatmap_png()}
    if made.is_blank:
        parts[BLANK] = f"Nothing in this scan speaks for {made.label}: the heatmap is 0 everywhere.\n".encode()
    for part, content in parts.items():
        yield name_of(ordinal, part, word), store.put(io.BytesIO(content))
