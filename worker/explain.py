"""Explanations of what predictions found: pictures into the store. A batch's come behind all that predicts, a single
scan's in the unit that predicts it."""

import io
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import structlog
from sqlalchemy.orm import Session

from jobs import explanations, lifecycle
from jobs.artifacts import Artifacts
from jobs.explanations import ALL, BLANK, HEATMAP, OVERLAY, Made, Unexplained, name_of, words_of
from jobs.tables import Job
from ml.gradcam import Explainer, Explanation
from ml.predict import ScanInput
from worker.bringing import Wanted, bring
from worker.running import Held
from worker.weights import pinned, reading_weights

log = structlog.get_logger()

WRITE_EVERY = 2.0
"""Seconds of work that an interruption may cost."""


@cache
def explainers() -> dict[str, Explainer]:
    """This process's loaded network with its gradients, by the hash of its weights: one at most."""
    return {}


def explain_results(held: Held) -> None:
    """Explain the results that the unit is for. What is written when it is interrupted stays."""
    weights, others, left = held.in_transaction(lambda session: _read(session, held))
    made: list[Made] = []
    started = written = time.monotonic()
    with held.workspace() as folder:
        explainer = _explainer(held, weights, folder)
        for one in left:
            held.check()
            if time.monotonic() - written > WRITE_EVERY:
                held.in_transaction(partial(explanations.keep, held=held.claim, made=made))
                made, written = [], time.monotonic()
            made += _explained(held, explainer, one, others, folder)
    seconds = time.monotonic() - started

    def end(session: Session) -> None:
        explanations.keep(session, held.claim, made)
        lifecycle.succeed(session, held.claim, device_seconds=seconds)

    held.finish(end)


def _read(session: Session, held: Held) -> tuple[str, bool, list[Unexplained]]:
    job = session.get_one(Job, held.claim.job_id)
    others = job.params.get("explain") == ALL
    return pinned(session, job).weights_sha256, others, explanations.unexplained(session, held.claim)


def explained_at_once(held: Held, sha256: str, left: Sequence[Unexplained], others: bool, folder: Path) -> list[Made]:
    """Explanations of results that wait for them. Whatever goes wrong here, the results stand: without these."""
    try:
        explainer = _explainer(held, sha256, folder)
        return [made for one in left for made in _explained(held, explainer, one, others, folder)]
    except Exception as error:
        explainers().clear()  # where memory is short, it is given back
        log.error("not_explained", error=type(error).__name__, exc_info=error)
        return []


def _explainer(held: Held, sha256: str, folder: Path) -> Explainer:
    loaded = explainers()
    if sha256 not in loaded:
        loaded.clear()
        with reading_weights():
            loaded[sha256] = Explainer.load(held.resources.artifacts.fetch(sha256, folder))
    return loaded[sha256]


def _explained(held: Held, explainer: Explainer, one: Unexplained, others: bool, folder: Path) -> Iterator[Made]:
    """The scan's explanation, stored; nothing where the scan can no longer be read."""
    wanted = Wanted([one.ordinal], one.sha256, one.source_url)
    scan = ScanInput(str(one.ordinal), partial(bring, held.resources, wanted, folder))
    made = next(iter(explainer.explain([scan], one.label, others)))
    words = words_of(explainer.classes)
    for each in (made, *made.others):
        word = None if each is made else words[each.label or ""]
        yield from _stored(held.resources.artifacts, each, one.ordinal, word)


def _stored(store: Artifacts, made: Explanation, ordinal: int, word: str | None) -> Iterator[Made]:
    if made.overlay is None:
        return
    parts = {OVERLAY: made.overlay, HEATMAP: made.heatmap_png()}
    if made.is_blank:
        parts[BLANK] = f"Nothing in this scan speaks for {made.label}: the heatmap is 0 everywhere.\n".encode()
    for part, content in parts.items():
        yield name_of(ordinal, part, word), store.put(io.BytesIO(content))
