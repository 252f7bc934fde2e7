"""Explanations of what a chunk's predictions found: overlays into the store, behind all that predicts."""

import io
import time
from functools import cache, partial
from pathlib import Path

from sqlalchemy.orm import Session

from jobs import explanations, lifecycle
from jobs.artifacts import Blob
from jobs.explanations import Unexplained
from jobs.tables import Job
from ml.gradcam import Explainer
from ml.predict import ScanInput
from worker.bringing import Wanted, bring
from worker.predict import pinned, reading_weights
from worker.running import Held

WRITE_EVERY = 2.0
"""Seconds of work that an interruption may cost."""


@cache
def explainers() -> dict[str, Explainer]:
    """This process's loaded network with its gradients, by the hash of its weights: one at most."""
    return {}


def explain_results(held: Held) -> None:
    """Explain the results that the unit is for. What is written when it is interrupted stays."""
    weights, left = held.in_transaction(lambda session: _read(session, held))
    made: list[tuple[int, Blob]] = []
    started = written = time.monotonic()
    with held.workspace() as folder:
        explainer = _explainer(held, weights, folder)
        for one in left:
            held.check()
            if time.monotonic() - written > WRITE_EVERY:
                held.in_transaction(partial(explanations.keep, held=held.claim, made=made))
                made, written = [], time.monotonic()
            made += _overlay(held, explainer, one, folder)
    seconds = time.monotonic() - started

    def end(session: Session) -> None:
        explanations.keep(session, held.claim, made)
        lifecycle.succeed(session, held.claim, device_seconds=seconds)

    held.finish(end)


def _read(session: Session, held: Held) -> tuple[str, list[Unexplained]]:
    job = session.get_one(Job, held.claim.job_id)
    return pinned(session, job).weights_sha256, explanations.unexplained(session, held.claim)


def _explainer(held: Held, sha256: str, folder: Path) -> Explainer:
    loaded = explainers()
    if sha256 not in loaded:
        loaded.clear()
        with reading_weights():
            loaded[sha256] = Explainer.load(held.resources.artifacts.fetch(sha256, folder))
    return loaded[sha256]


def _overlay(held: Held, explainer: Explainer, one: Unexplained, folder: Path) -> list[tuple[int, Blob]]:
    """The scan's explanation, stored; none where the scan can no longer be read."""
    wanted = Wanted([one.ordinal], one.sha256, one.source_url)
    scan = ScanInput(str(one.ordinal), partial(bring, held.resources, wanted, folder))
    made = next(iter(explainer.explain([scan], label=one.label)))
    if made.overlay is None:
        return []
    return [(one.ordinal, held.resources.artifacts.put(io.BytesIO(made.overlay)))]
