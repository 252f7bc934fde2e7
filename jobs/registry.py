"""Model versions: what trainings made, which one is champion, and which one a job is pinned to."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from jobs import training_params
from jobs.errors import Invalid, ModelNotFound, NoChampion
from jobs.gate import gate
from jobs.lifecycle import Claim
from jobs.tables import Job, Json, ModelVersion

CHAMPION = "champion"


@dataclass(frozen=True)
class NewModel:
    """What a training made."""

    weights_sha256: str
    classes: list[str]
    params: Json
    metrics: Json
    dataset_digest: str | None
    code_revision: str | None
    environment: Json = field(default_factory=dict)
    mlflow_run_id: str | None = None


def add(session: Session, held: Claim, new: NewModel, min_f1: float) -> ModelVersion:
    """Insert the version that the held training made, promoted where the gate says so."""
    # One at a time per tenant: version numbers have no gaps, and the champion is compared with the real one.
    session.execute(select(func.pg_advisory_xact_lock(func.hashtext("model_versions:" + held.tenant_id))))
    job = session.get_one(Job, held.job_id)
    champion = _champion(session, held.tenant_id)
    verdict = gate(new.metrics, champion.metrics if champion else None, job.promote, min_f1)
    if verdict.promoted:
        session.execute(_champions(held.tenant_id).values(champion=False))
    version = ModelVersion(
        tenant_id=held.tenant_id,
        version=_next_version(session, held.tenant_id),
        champion=verdict.promoted,
        promoted_at=session.scalar(select(func.clock_timestamp())) if verdict.promoted else None,
        job_id=job.id,
        dataset_id=job.dataset_id,
        gate={"promoted": verdict.promoted, "reasons": verdict.reasons},
        **vars(new),
    )
    session.add(version)
    session.flush()
    job.model_id, job.model_version = version.id, version.version
    session.flush()
    return version


def resolve(session: Session, tenant_id: str, wanted: str | None) -> ModelVersion:
    """The version that a prediction is pinned to: `champion` (the default) or a version's number.

    Raises:
        NoChampion, ModelNotFound
    """
    if wanted in (None, "", CHAMPION):
        champion = _champion(session, tenant_id)
        if champion is None:
            raise NoChampion
        return champion
    found = session.scalar(
        select(ModelVersion).where(ModelVersion.tenant_id == tenant_id, ModelVersion.version == _number(wanted))
    )
    if found is None:
        raise ModelNotFound
    return found


def refuse_unadmitted(version: ModelVersion, precision: str) -> None:
    """Refuse what no engine of this precision was admitted for, when the version was trained (see ml.admission).

    A version without trials is of an earlier RenalQ, and nothing is known of it: its worker decides.

    Raises:
        Invalid: it points at the field, and says what the trial showed.
    """
    trials: Json = version.metrics.get("engines") or {}
    mine = [trial for name, trial in trials.items() if name.endswith(f"-{precision}")]
    if precision in ("auto", "fp32") or not trials or any(trial["admitted"] for trial in mine):
        return
    why = mine[0]["reason"] if mine else "it was trained on a machine without it"
    raise Invalid(f"Version {version.version} is not admitted for {precision}: {why}. Use auto.", "/precision")


def base_of(session: Session, tenant_id: str, params: Json) -> ModelVersion | None:
    """The version that a training with `weights: version:N` begins from; None for other weights.

    Raises:
        Invalid: there is no such version, or its network is another than the parameters'; it points at the field.
    """
    number = training_params.base_version(params)
    if number is None:
        return None
    try:
        base = resolve(session, tenant_id, str(number))
    except ModelNotFound:
        detail = f"There is no version {number}: GET /models lists yours. Name one of them, or weights: imagenet."
        raise Invalid(detail, "/params/weights") from None
    theirs, ours = training_params.network(base.params), training_params.network(params)
    if theirs != ours:
        detail = f"Version {number} is a {theirs}, and network is {ours}: set network: {theirs}, or take other weights."
        raise Invalid(detail, "/params/network")
    return base


def listed(session: Session, tenant_id: str) -> Sequence[ModelVersion]:
    """The tenant's versions, newest first."""
    return session.scalars(
        select(ModelVersion).where(ModelVersion.tenant_id == tenant_id).order_by(ModelVersion.version.desc())
    ).all()


def by_id(session: Session, model_id: uuid.UUID) -> ModelVersion:
    """The version that a job was pinned to.

    Raises:
        ModelNotFound
    """
    found = session.get(ModelVersion, model_id)
    if found is None:
        raise ModelNotFound
    return found


def _number(wanted: Any) -> int:
    try:
        return int(wanted)
    except (TypeError, ValueError):
        raise ModelNotFound from None


def _champion(session: Session, tenant_id: str) -> ModelVersion | None:
    return session.scalar(select(ModelVersion).where(ModelVersion.tenant_id == tenant_id, ModelVersion.champion))


def _champions(tenant_id: str) -> Any:
    return update(ModelVersion).where(ModelVersion.tenant_id == tenant_id, ModelVersion.champion)


def _next_version(session: Session, tenant_id: str) -> int:
    last = select(func.coalesce(func.max(ModelVersion.version), 0)).where(ModelVersion.tenant_id == tenant_id)
    return (session.scalar(last) or 0) + 1
