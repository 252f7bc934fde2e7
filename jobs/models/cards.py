"""Model versions as people ask for them: pages, and all that a model card tells; and the ring for MLflow's registry."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs.paging import Page, page
from jobs.queue.job_events import UNITS_CHANNEL
from jobs.tables import Dataset, Job, ModelEvaluation, ModelVersion, Promotion

MIRROR = "mirror"
"""What the dispatcher hears when MLflow's registry is to follow at once."""
TOLD = 20
"""Most evaluations and promotions that a card tells; `GET /models/promotions` has all of the latter."""


@dataclass(frozen=True)
class Story:
    """A version with the rows around it. `dataset` is None where it was deleted, `base` where none was gone on from. Of
    a champion's many evaluations and promotions the newest, oldest first."""

    version: ModelVersion
    dataset: Dataset | None
    base: ModelVersion | None
    evaluations: Sequence[ModelEvaluation]
    promotions: Sequence[Promotion]


def listed(session: Session, tenant_id: str, limit: int, after: int | None) -> Page[ModelVersion]:
    """The tenant's versions, newest first."""
    query = select(ModelVersion).where(ModelVersion.tenant_id == tenant_id).order_by(ModelVersion.version.desc())
    if after is not None:
        query = query.where(ModelVersion.version < after)
    return page(session.scalars(query.limit(limit + 1)).all(), limit, lambda version: version.version)


def story(session: Session, version: ModelVersion) -> Story:
    """All that a model card tells of a version."""
    base_id = session.scalar(select(Job.base_model_id).where(Job.id == version.job_id))
    evaluations = select(ModelEvaluation).where(ModelEvaluation.model_id == version.id)
    promotions = select(Promotion).where(Promotion.model_id == version.id)
    evaluations = evaluations.order_by(ModelEvaluation.created_at.desc()).limit(TOLD)
    promotions = promotions.order_by(Promotion.id.desc()).limit(TOLD)
    return Story(
        version,
        session.get(Dataset, version.dataset_id) if version.dataset_id else None,
        session.get(ModelVersion, base_id) if base_id else None,
        session.scalars(evaluations).all()[::-1],
        session.scalars(promotions).all()[::-1],
    )


def mirrored_as(tenant_id: str) -> str:
    """What the tenant's model is called in MLflow's registry."""
    return f"renalq-{tenant_id}"


def mirror_soon(session: Session) -> None:
    """With the commit, let MLflow's registry follow: else it does at the dispatcher's next look."""
    session.execute(select(func.pg_notify(UNITS_CHANNEL, MIRROR)))
