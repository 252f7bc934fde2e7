"""The operating point of a version: pinned by each prediction job, and set anew on request, with a reason, without a
training. Figures, gate and drift reference follow it, so that what is shown is what is served."""

import uuid
from collections.abc import Sequence

from sqlalchemy import Date, cast, delete, func, select
from sqlalchemy.orm import Session

from jobs.errors import Invalid, WrongState
from jobs.models import comparison, registry
from jobs.models.figures import figures_at, reference_at
from jobs.models.patient_figures import by_patient_at, pooling_at
from jobs.tables import Job, Json, ModelEvaluation, ModelVersion, OperatingPointChange
from ml.spec.operating_point import NoChoice, OperateAt, OperatingPoint, Scored, operating_point, without_threshold
from ml.spec.pooling import Pooling
from ml.spec.positive_class import of_metrics


def pin(version: ModelVersion) -> Json | None:
    """What a prediction job keeps of the version's point, whatever becomes of it; None where there is none."""
    positive, threshold = of_metrics(version.metrics), version.metrics.get("threshold")
    if not positive or threshold is None:
        return None
    return {"positive": positive, "threshold": threshold, "pooling": version.metrics.get("pooling")}


def pinned(job: Job, version: ModelVersion) -> tuple[Sequence[str] | None, float | None]:
    """Positive classes and threshold of a prediction job; its version's, if the job is of an earlier release."""
    point = job.operating_point or pin(version)
    if point is None:
        return of_metrics(version.metrics), None
    return point["positive"], point["threshold"]


def set_point(
    session: Session,
    tenant_id: str,
    wanted: str,
    operate_at: OperateAt,
    reason: str,
    key_id: uuid.UUID | None = None,
) -> ModelVersion:
    """Choose a version's operating point anew on the scans that its training chose it on. Nothing is written if it is
    in force already. Jobs that were submitted before keep theirs.

    Raises:
        ModelNotFound, NoChampion
        WrongState: an earlier release trained it, and kept no scores to choose from.
        Invalid: it has no positive class, or no scan that the rule counts.
    """
    registry.lock(session, tenant_id)
    version = registry.resolve(session, tenant_id, wanted)
    session.refresh(version, ["metrics", "reference", "scan_scores"])
    old = version.metrics.get("operating_point")
    point = _chosen(version, operate_at, old)
    found = point.as_dict() | {"changes": (old or {}).get("changes", 0)}
    if old is not None and found == {"changes": 0, **old}:
        return version
    found["changes"] += 1
    _apply(session, version, found, operate_at)
    session.add(
        OperatingPointChange(
            tenant_id=tenant_id, model_id=version.id, point=found, replaced=old, reason=reason, by_key=key_id
        )
    )
    session.flush()
    return version


def _chosen(version: ModelVersion, operate_at: OperateAt, old: Json | None) -> OperatingPoint:
    if of_metrics(version.metrics) == []:
        raise Invalid("This version has no positive class: train it again with the parameter positive.", "/operate_at")
    if version.scan_scores is None or old is None:
        raise WrongState("This version keeps no scores to choose a threshold from: train it again.")
    validation, positive = version.scan_scores["validation"], version.scan_scores["positive"]
    labels = [version.scan_scores["classes"][label] in positive for label in validation["label"]]
    try:
        return operating_point(
            operate_at, Scored(labels, validation["score"], validation["group"]), old["best_f1"], old["chosen_on"]
        )
    except NoChoice as error:
        raise Invalid(str(error), "/operate_at") from error


def _apply(session: Session, version: ModelVersion, point: Json, operate_at: OperateAt) -> None:
    """Let figures, drift reference and scores follow the point. Scores beside other versions on other test sets were
    those of the old point, and are dropped."""
    scores, threshold = version.scan_scores or {}, point["threshold"]
    figures = figures_at(scores, threshold, version.metrics)
    patients = _of_patients(version.metrics, scores, threshold, operate_at)
    told = {"calibration": without_threshold(version.metrics.get("calibration") or "")}
    new = {"threshold": threshold, "operating_point": point}
    version.metrics = {**version.metrics, **figures, **patients, **told, **new}
    if version.reference is not None:
        today = session.scalars(select(cast(func.timezone("UTC", func.clock_timestamp()), Date))).one()
        version.reference = reference_at(scores, threshold, version.reference) | {"decided_since": today.isoformat()}
    session.execute(delete(ModelEvaluation).where(ModelEvaluation.model_id == version.id))
    comparison.save_scores(session, version, None)


def _of_patients(metrics: Json, scores: Json, threshold: float, operate_at: OperateAt) -> Json:
    """The pooling of a patient's slices and the figures by patient follow the point, in a version that has them."""
    if not metrics.get("by_patient"):
        return {}
    pooling = pooling_at(operate_at, scores, Pooling.of(metrics), threshold)
    return {"pooling": pooling.as_dict(), "by_patient": by_patient_at(scores, pooling, metrics["by_patient"])}


def changes(session: Session, version: ModelVersion, most: int) -> Sequence[OperatingPointChange]:
    """The newest changes of a version's point, oldest first."""
    mine = select(OperatingPointChange).where(OperatingPointChange.model_id == version.id)
    return session.scalars(mine.order_by(OperatingPointChange.id.desc()).limit(most)).all()[::-1]
