"""Reads of model versions: pages, the data of a model card, and the names that MLflow's registry uses."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs.events.job_events import UNITS_CHANNEL
from jobs.models import operating_points
from jobs.paging import Page, page
from jobs.tables import Dataset, Job, ModelEvaluation, ModelVersion, OperatingPointChange, Promotion

REGISTRY_SYNC = "mirror"
"""Payload of the notification that makes the dispatcher sync MLflow's registry at once."""
MAX_ROWS = 20
"""Evaluations and promotions on a card; `GET /models/promotions` has all promotions."""


@dataclass(frozen=True)
class ModelCardData:
    """A version with its related rows. `dataset` is None if it was deleted, `base` if the training started from no
    version. Evaluations, promotions and changes of the operating point: the newest `MAX_ROWS`, oldest first."""

    version: ModelVersion
    dataset: Dataset | None
    base: ModelVersion | None
    evaluations: Sequence[ModelEvaluation]
    promotions: Sequence[Promotion]
    point_changes: Sequence[OperatingPointChange] = ()


def list_versions(
    session: Session,
    tenant_id: str,
    limit: int,
    after: int | None,
    pipeline: str | None = None,
    task: str | None = None,
) -> Page[ModelVersion]:
    """The tenant's versions, newest first; of one pipeline or task, if named."""
    query = select(ModelVersion).where(ModelVersion.tenant_id == tenant_id).order_by(ModelVersion.version.desc())
    for column, wanted in ((ModelVersion.pipeline, pipeline), (ModelVersion.task, task)):
        query = query if wanted is None else query.where(column == wanted)
    if after is not None:
        query = query.where(ModelVersion.version < after)
    return page(session.scalars(query.limit(limit + 1)).all(), limit, lambda version: version.version)


def model_card_data(session: Session, version: ModelVersion) -> ModelCardData:
    """The version with the rows that its model card shows."""
    base_id = session.scalar(select(Job.base_model_id).where(Job.id == version.job_id))
    evaluations = select(ModelEvaluation).where(ModelEvaluation.model_id == version.id)
    promotions = select(Promotion).where(Promotion.model_id == version.id)
    evaluations = evaluations.order_by(ModelEvaluation.created_at.desc()).limit(MAX_ROWS)
    promotions = promotions.order_by(Promotion.id.desc()).limit(MAX_ROWS)
    return ModelCardData(
        version,
        session.get(Dataset, version.dataset_id) if version.dataset_id else None,
        session.get(ModelVersion, base_id) if base_id else None,
        session.scalars(evaluations).all()[::-1],
        session.scalars(promotions).all()[::-1],
        operating_points.changes(session, version, MAX_ROWS),
    )


def mlflow_model_name(tenant_id: str) -> str:
    """The name of the tenant's model in MLflow's registry."""
    return f"renalq-{tenant_id}"


def notify_registry_sync(session: Session) -> None:
    """Sync MLflow's registry right after the commit, instead of at the dispatcher's next interval."""
    session.execute(select(func.pg_notify(UNITS_CHANNEL, REGISTRY_SYNC)))
