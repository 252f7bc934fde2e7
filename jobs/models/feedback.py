"""Truths: what scans turned out to show, told of their predictions by those who know (pathology).

A truth is appended, never changed: of a scan and a model the latest one counts. It holds what was predicted and whose
scan it is, so that it can be reckoned with after the results have expired.
"""

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Date, cast, func, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from jobs.errors import Invalid, ResultNotFound, TruthNotFound, WrongState
from jobs.queue import retention
from jobs.queue.prediction_counts import REJECTED
from jobs.results.cache import COMPUTED
from jobs.results.queries import JobView, classes, require_prediction
from jobs.states import ResultState
from jobs.tables import ModelVersion, ScanResult, Truth


@dataclass(frozen=True)
class Judged:
    """Predictions of which the truth is known: how many, and how many were right; the same of the scans that show the
    positive class, of two, and of the others."""

    known: int = 0
    right: int = 0
    positives: int = 0
    found: int = 0
    negatives: int = 0
    cleared: int = 0

    def __add__(self, other: "Judged") -> "Judged":
        return Judged(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def accuracy(self) -> float | None:
        """Share of predictions that were right; None without any."""
        return _share(self.right, self.known)

    @property
    def sensitivity(self) -> float | None:
        """Share of the positive scans that were called so."""
        return _share(self.found, self.positives)

    @property
    def specificity(self) -> float | None:
        """Share of the negative scans that were called so."""
        return _share(self.cleared, self.negatives)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def tell(session: Session, view: JobView, scan_id: uuid.UUID, label: str, key_id: uuid.UUID | None = None) -> Truth:
    """Write down what a scan of this job turned out to show.

    Raises:
        NoResults, ResultsExpired
        ResultNotFound: the job has no such scan.
        WrongState: its result has not succeeded, so that there is nothing to judge.
        Invalid: the model does not know this class.
    """
    result = _result(session, view, scan_id)
    known = classes(session, view)
    if label not in known:
        raise Invalid(f"The model's classes are {', '.join(known)}: send one of them.", "/label")
    truth = Truth(
        tenant_id=view.job.tenant_id,
        scan_id=scan_id,
        job_id=view.job.id,
        model_id=view.job.model_id,
        label=label,
        predicted=result.label,
        confidence=result.confidence,
        disposition=result.disposition,
        patient=_patient(session, view.job.tenant_id, scan_id, result),
        predicted_at=result.finished_at,
        by_key=key_id,
    )
    session.add(truth)
    session.flush()
    session.refresh(truth)
    return truth


def _result(session: Session, view: JobView, scan_id: uuid.UUID) -> ScanResult:
    """The scan's result in this job; where it came several times, they are alike."""
    require_prediction(view)
    found = _computed(session, view.job.id, scan_id) or _any_result(session, view.job.id, scan_id)
    if view.terminal:
        retention.require_kept(session, view.job.id)
    if found is None:
        raise ResultNotFound
    if found.state != ResultState.SUCCEEDED:
        raise WrongState(f"The scan's result is {found.state}: a truth is told of a prediction that has succeeded.")
    return found


def _computed(session: Session, job_id: uuid.UUID, scan_id: uuid.UUID) -> ScanResult | None:
    """Found by the index of what was computed, as most results are. No limit and no order: for the sake of either
    Postgres might rather read the whole job."""
    mine = select(ScanResult).where(COMPUTED, ScanResult.scan_id == scan_id, ScanResult.job_id == job_id)
    return min(session.scalars(mine), key=lambda result: result.ordinal, default=None)


def _any_result(session: Session, job_id: uuid.UUID, scan_id: uuid.UUID) -> ScanResult | None:
    mine = select(ScanResult).where(ScanResult.job_id == job_id, ScanResult.scan_id == scan_id)
    succeeded_first = (ScanResult.state == ResultState.SUCCEEDED).desc(), ScanResult.ordinal
    return session.scalar(mine.order_by(*succeeded_first).limit(1))


def _patient(session: Session, tenant_id: str, scan_id: uuid.UUID, result: ScanResult) -> str | None:
    """Whose scan it is, as the client told with this result, with another one that was computed for the scan, or with
    one that an earlier truth was told of."""
    if result.patient is not None:
        return result.patient
    others = select(ScanResult.patient).where(COMPUTED, ScanResult.scan_id == scan_id)
    keyed = others.where(ScanResult.tenant_id == tenant_id, ScanResult.patient.is_not(None))
    latest_keyed = keyed.order_by(ScanResult.finished_at.desc()).limit(1)
    return session.scalar(latest_keyed) or _told_patient(session, tenant_id, scan_id)


def _told_patient(session: Session, tenant_id: str, scan_id: uuid.UUID) -> str | None:
    # By way of the versions: truths have an index that begins with the model.
    versions = select(ModelVersion.id).where(ModelVersion.tenant_id == tenant_id)
    told = select(Truth.patient).where(Truth.model_id.in_(versions), Truth.scan_id == scan_id)
    known = told.where(Truth.tenant_id == tenant_id, Truth.patient.is_not(None))
    return session.scalar(known.order_by(Truth.id.desc()).limit(1))


def latest(session: Session, view: JobView, scan_id: uuid.UUID) -> Truth:
    """What is known of the scan by now, whichever prediction of the job's model it was told of.

    Raises:
        NoResults
        TruthNotFound: nobody has told it.
    """
    require_prediction(view)
    of_scan = select(Truth).where(Truth.model_id == view.job.model_id, Truth.scan_id == scan_id)
    found = session.scalar(of_scan.order_by(Truth.id.desc()).limit(1))
    if found is None:
        raise TruthNotFound
    return found


def labels(
    session: Session, model_id: uuid.UUID | None, scan_ids: Sequence[uuid.UUID | None]
) -> dict[uuid.UUID | None, str]:
    """The true labels of these scans, where they were told of this model's predictions; of what is not stored (None)
    nothing is known."""
    if model_id is None or not scan_ids:
        return {}
    told = select(Truth.scan_id, Truth.label).where(Truth.model_id == model_id, Truth.scan_id.in_(scan_ids))
    rows = session.execute(told.ext(distinct_on(Truth.scan_id)).order_by(Truth.scan_id, Truth.id.desc()))
    return {row.scan_id: row.label for row in rows}


def by_day(session: Session, version: ModelVersion, first: dt.date) -> dict[dt.date, Judged]:
    """How right the version was, by the day (UTC) of its predictions, from `first` on.

    What RenalQ has rejected by itself is left out: nobody is to use the class that it still names.
    """
    told = select(Truth).where(Truth.model_id == version.id)
    last = told.ext(distinct_on(Truth.scan_id)).order_by(Truth.scan_id, Truth.id.desc()).subquery()
    day = cast(func.timezone("UTC", last.c.predicted_at), Date).label("day")
    counted = select(day, last.c.label, last.c.predicted, func.count().label("scans"))
    counted = counted.where(day >= first, last.c.disposition.is_distinct_from(REJECTED))
    positive, found = version.metrics.get("positive"), dict[dt.date, Judged]()
    for row in session.execute(counted.group_by(day, last.c.label, last.c.predicted)):
        found[row.day] = found.get(row.day, Judged()) + _judged(row.label, row.predicted, row.scans, positive)
    return found


def _judged(label: str, predicted: str, scans: int, positive: str | None) -> Judged:
    right = scans if label == predicted else 0
    if positive is None:
        return Judged(scans, right)
    called = scans if predicted == positive else 0
    if label == positive:
        return Judged(scans, right, positives=scans, found=called)
    return Judged(scans, right, negatives=scans, cleared=scans - called)
