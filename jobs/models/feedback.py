"""Feedback (ground truth): true labels of predicted scans, for example from pathology.

Feedback is appended, never changed; the latest row of a scan and model counts. A row copies the prediction and the
patient key, so that it stays usable after the results have expired.
"""

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Date, cast, func, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from jobs.errors import Invalid, ResultNotFound, TruthNotFound, WrongState
from jobs.queue import kept
from jobs.queue.outcomes import REJECTED
from jobs.results.cache import COMPUTED
from jobs.results.queries import JobView, classes, require_prediction
from jobs.states import ResultState
from jobs.tables import ModelVersion, ScanResult, Truth
from ml.spec.positive_class import of_metrics


@dataclass(frozen=True)
class ConfusionCounts:
    """Predictions with a known true label, and how many were right. With positive classes also by the true class:
    positive and negative scans, and how many of each were predicted as such."""

    known: int = 0
    right: int = 0
    positives: int = 0
    true_positives: int = 0
    negatives: int = 0
    true_negatives: int = 0

    def __add__(self, other: "ConfusionCounts") -> "ConfusionCounts":
        return ConfusionCounts(
            *(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def accuracy(self) -> float | None:
        """Share of predictions that were right; None if there are none."""
        return _share(self.right, self.known)

    @property
    def sensitivity(self) -> float | None:
        """Share of the positive scans that were predicted positive."""
        return _share(self.true_positives, self.positives)

    @property
    def specificity(self) -> float | None:
        """Share of the negative scans that were predicted negative."""
        return _share(self.true_negatives, self.negatives)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def record(session: Session, view: JobView, scan_id: uuid.UUID, label: str, key_id: uuid.UUID | None = None) -> Truth:
    """Record the true label of a scan of this job.

    Raises:
        NoResults, ResultsExpired
        ResultNotFound: the job has no such scan.
        WrongState: the scan has no prediction, since its result has not succeeded, or one for each of its frames.
        Invalid: the model has no such class.
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
    """The scan's result in this job. If the scan occurs several times, its results are equal."""
    require_prediction(view)
    found = _computed(session, view.job.id, scan_id) or _any_result(session, view.job.id, scan_id)
    if view.terminal:
        kept.require_kept(session, view.job.id)
    if found is None:
        raise ResultNotFound
    if found.state != ResultState.SUCCEEDED:
        raise WrongState(f"The scan's result is {found.state}: a truth is told of a prediction that has succeeded.")
    if found.frame is not None:
        raise WrongState("The file holds several slices, and a truth is of one: send each slice as a file of its own.")
    return found


def _computed(session: Session, job_id: uuid.UUID, scan_id: uuid.UUID) -> ScanResult | None:
    """The scan's computed result, by its index. With LIMIT or ORDER BY Postgres might read the whole job instead."""
    mine = select(ScanResult).where(COMPUTED, ScanResult.scan_id == scan_id, ScanResult.job_id == job_id)
    return min(session.scalars(mine), key=lambda result: result.ordinal, default=None)


def _any_result(session: Session, job_id: uuid.UUID, scan_id: uuid.UUID) -> ScanResult | None:
    mine = select(ScanResult).where(ScanResult.job_id == job_id, ScanResult.scan_id == scan_id)
    succeeded_first = (ScanResult.state == ResultState.SUCCEEDED).desc(), ScanResult.ordinal
    return session.scalar(mine.order_by(*succeeded_first).limit(1))


def _patient(session: Session, tenant_id: str, scan_id: uuid.UUID, result: ScanResult) -> str | None:
    """The client's patient key: of this result, of another computed result of the scan, or of earlier feedback."""
    if result.patient is not None:
        return result.patient
    others = select(ScanResult.patient).where(COMPUTED, ScanResult.scan_id == scan_id)
    keyed = others.where(ScanResult.tenant_id == tenant_id, ScanResult.patient.is_not(None))
    latest_keyed = keyed.order_by(ScanResult.finished_at.desc()).limit(1)
    return session.scalar(latest_keyed) or _patient_of_feedback(session, tenant_id, scan_id)


def _patient_of_feedback(session: Session, tenant_id: str, scan_id: uuid.UUID) -> str | None:
    # Via the versions: the index of feedback begins with the model.
    versions = select(ModelVersion.id).where(ModelVersion.tenant_id == tenant_id)
    feedback = select(Truth.patient).where(Truth.model_id.in_(versions), Truth.scan_id == scan_id)
    known = feedback.where(Truth.tenant_id == tenant_id, Truth.patient.is_not(None))
    return session.scalar(known.order_by(Truth.id.desc()).limit(1))


def latest(session: Session, view: JobView, scan_id: uuid.UUID) -> Truth:
    """The latest feedback on the scan, for any prediction of it by the job's model.

    Raises:
        NoResults
        TruthNotFound: there is no feedback.
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
    """The true labels of these scans, from feedback on this model's predictions. None, the id of a scan that is not
    stored, has none."""
    if model_id is None or not scan_ids:
        return {}
    feedback = select(Truth.scan_id, Truth.label).where(Truth.model_id == model_id, Truth.scan_id.in_(scan_ids))
    rows = session.execute(feedback.ext(distinct_on(Truth.scan_id)).order_by(Truth.scan_id, Truth.id.desc()))
    return {row.scan_id: row.label for row in rows}


def counts_by_day(session: Session, version: ModelVersion, first: dt.date) -> dict[dt.date, ConfusionCounts]:
    """The version's counts by the day (UTC) of its predictions, from `first` on.

    Rejected scans are left out: their class must not be used.
    """
    feedback = select(Truth).where(Truth.model_id == version.id)
    last = feedback.ext(distinct_on(Truth.scan_id)).order_by(Truth.scan_id, Truth.id.desc()).subquery()
    day = cast(func.timezone("UTC", last.c.predicted_at), Date).label("day")
    counted = select(day, last.c.label, last.c.predicted, func.count().label("scans"))
    counted = counted.where(day >= first, last.c.disposition.is_distinct_from(REJECTED))
    positive, found = of_metrics(version.metrics) or [], dict[dt.date, ConfusionCounts]()
    for row in session.execute(counted.group_by(day, last.c.label, last.c.predicted)):
        found[row.day] = found.get(row.day, ConfusionCounts()) + _counts(row.label, row.predicted, row.scans, positive)
    return found


def _counts(label: str, predicted: str, scans: int, positive: Sequence[str]) -> ConfusionCounts:
    right = scans if label == predicted else 0
    if not positive:
        return ConfusionCounts(scans, right)
    called = scans if predicted in positive else 0
    if label in positive:
        return ConfusionCounts(scans, right, positives=scans, true_positives=called)
    return ConfusionCounts(scans, right, negatives=scans, true_negatives=scans - called)
