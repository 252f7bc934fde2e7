"""Summary of a prediction's results: counts by class, disposition and error, and histograms of the confidence.

One aggregate query over the job's results, so that all counts are of the same moment; the job's own counters may be of
another.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs.queue import kept
from jobs.results.queries import JobView, classes, require_prediction
from jobs.states import ResultState
from jobs.tables import ScanResult

BINS = 20
STATES = (ResultState.SUCCEEDED, ResultState.FAILED, ResultState.CANCELLED, ResultState.PENDING)
EDGES = tuple(round(number / BINS, 2) for number in range(BINS + 1))
"""A bin includes its lower edge; the last one includes both."""


@dataclass(frozen=True)
class Confidence:
    """Histograms of the confidence in the predicted class: `counts` has one number per bin for each class."""

    edges: tuple[float, ...]
    counts: dict[str, list[int]]


@dataclass(frozen=True)
class Summary:
    """A prediction's results so far: scans by state (`counts`), by label (`classes`, including those with none), by
    disposition and by error code."""

    counts: dict[str, int]
    classes: dict[str, int]
    dispositions: dict[str, int]
    confidence: Confidence
    errors: dict[str, int]
    cached: int
    scans_per_second: float | None


def summary(session: Session, view: JobView) -> Summary:
    """Summarize a prediction's results so far.

    Raises:
        NoResults: the job is not a prediction.
        ResultsExpired
    """
    require_prediction(view)
    rows = session.execute(_groups(view)).all()
    kept.require_kept(session, view.job.id)
    by_state = _counted((row.state, row.scans) for row in rows)
    histograms = _histograms(classes(session, view), rows)
    return Summary(
        counts={"total": by_state.total(), **{str(state): by_state[state] for state in STATES}},
        classes={label: sum(bins) for label, bins in histograms.items()},
        dispositions=dict(sorted(_counted((row.disposition, row.scans) for row in rows if row.disposition).items())),
        confidence=Confidence(EDGES, histograms),
        errors=dict(_counted((row.code, row.scans) for row in rows if row.code is not None)),
        cached=sum(row.cached for row in rows),
        scans_per_second=view.scans_per_second,
    )


def _groups(view: JobView) -> Any:
    """Scans grouped by state, label, disposition, confidence bin and error code."""
    bin_ = func.least(func.width_bucket(ScanResult.confidence, 0, 1, BINS), BINS)  # 1.0 falls beyond the last bin
    found = ScanResult.state, ScanResult.label, ScanResult.disposition
    keys = *found, bin_.label("bin"), ScanResult.error["code"].astext.label("code")
    scans, cached = func.count().label("scans"), func.count().filter(ScanResult.cached).label("cached")
    return select(*keys, scans, cached).where(ScanResult.job_id == view.job.id).group_by(*keys)


def _histograms(known: list[str], rows: Iterable[Any]) -> dict[str, list[int]]:
    found = {label: [0] * BINS for label in known}
    for row in rows:
        if row.label is not None:
            found.setdefault(row.label, [0] * BINS)[max(row.bin, 1) - 1] += row.scans
    return found


def _counted(pairs: Iterable[tuple[str, int]]) -> "Counter[str]":
    total: Counter[str] = Counter()
    for word, number in pairs:
        total[word] += number
    return total
