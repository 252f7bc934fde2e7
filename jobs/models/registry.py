"""Model versions: what trainings made, which one is champion, and which one a job is pinned to."""

import uuid
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from jobs import training_params
from jobs.errors import Invalid, ModelNotFound, NoChampion
from jobs.events import webhooks
from jobs.events.webhooks import EventType
from jobs.models import comparison
from jobs.models.comparison import Measured
from jobs.models.gate import Policy, gate
from jobs.queue.job_events import wake_dispatcher
from jobs.queue.leases import Claim
from jobs.tables import How, Job, Json, ModelVersion, Promotion

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
    reference: Json | None = None


def add(session: Session, held: Claim, new: NewModel, policy: Policy, measured: Measured | None = None) -> ModelVersion:
    """Insert the version that the held training made, with its scores; promoted where the gate says so.

    `measured`: how the champion of the training's start did on the same test scans; None where there was no champion.
    """
    lock(session, held.tenant_id)
    job = session.get_one(Job, held.job_id)
    version = _inserted(session, job, new)
    comparison.keep(session, version, measured)
    champion = find_champion(session, held.tenant_id)
    against = comparison.against(session, version, champion, comparison.why_not(champion, measured))
    verdict = gate(new.metrics, against, job.promote, policy)
    version.gate = verdict.as_dict()
    job.model_id, job.model_version = version.id, version.version
    session.flush()
    made = {"model_version": str(version.version), "job_id": str(job.id), "promoted": verdict.promoted}
    webhooks.emit(session, held.tenant_id, f"model_{version.id}_created", EventType.MODEL_CREATED, made)
    if verdict.promoted:
        before = in_force(session, champion)
        crown(session, version, How.GATE, before.id if before else None, verdict=version.gate)
    return version


def _inserted(session: Session, job: Job, new: NewModel) -> ModelVersion:
    version = ModelVersion(
        tenant_id=job.tenant_id,
        version=_next_version(session, job.tenant_id),
        job_id=job.id,
        dataset_id=job.dataset_id,
        gate={},
        **vars(new),
    )
    session.add(version)
    session.flush()
    return version


# --- the champion ---


def lock(session: Session, tenant_id: str) -> None:
    """One at a time per tenant until the transaction's end: numbers have no gaps, and the champion is who it seems."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtext("model_versions:" + tenant_id))))


def find_champion(session: Session, tenant_id: str) -> ModelVersion | None:
    """The tenant's champion, as it is now."""
    mine = select(ModelVersion).where(ModelVersion.tenant_id == tenant_id, ModelVersion.champion)
    # What the session has read before the lock may be history.
    return session.scalar(mine.execution_options(populate_existing=True))


def in_force(session: Session, champion: ModelVersion | None) -> Promotion | None:
    """The promotion that made the champion. The code before migration 0006 wrote none: then it is written here."""
    if champion is None:
        return None
    mine = select(Promotion).where(Promotion.tenant_id == champion.tenant_id)
    latest = session.scalar(mine.order_by(Promotion.id.desc()).limit(1))
    if latest is not None and latest.model_id == champion.id:
        return latest
    missed = _promotion(champion, How.GATE, latest.id if latest else None, champion.gate)
    missed.replaced = latest.version if latest else None
    session.add(missed)
    session.flush()
    return missed


def crown(
    session: Session,
    version: ModelVersion,
    how: How,
    back_id: int | None,
    *,
    verdict: Json | None = None,
    reason: str | None = None,
    key_id: uuid.UUID | None = None,
) -> None:
    """Make the version the champion in place of whoever is, and write it into the history. `lock` must be held.

    `back_id`: the promotion that a rollback from here returns to.
    """
    mine = ModelVersion.tenant_id == version.tenant_id
    down = update(ModelVersion).where(mine, ModelVersion.champion).values(champion=False)
    replaced = session.scalar(down.returning(ModelVersion.version))
    up = update(ModelVersion).where(ModelVersion.id == version.id)
    session.execute(up.values(champion=True, promoted_at=func.clock_timestamp()))
    row = _promotion(version, how, back_id, verdict)
    row.replaced, row.reason, row.by_key = replaced, reason, key_id
    session.add(row)
    session.flush()
    session.refresh(version)
    _tell(session, row)
    wake_dispatcher(session)


def _tell(session: Session, row: Promotion) -> None:
    """Tell webhooks. Not the reason: it was written for people of the house, and may name anything."""
    type_ = EventType.MODEL_ROLLED_BACK if row.how == How.ROLLBACK else EventType.MODEL_PROMOTED
    replaced = None if row.replaced is None else str(row.replaced)
    data = {"model_version": str(row.version), "replaced": replaced, "how": str(row.how)}
    webhooks.emit(session, row.tenant_id, f"promotion_{row.id}", type_, data)


def _promotion(version: ModelVersion, how: How, back_id: int | None, verdict: Json | None) -> Promotion:
    return Promotion(
        tenant_id=version.tenant_id,
        model_id=version.id,
        version=version.version,
        how=how,
        back_id=back_id,
        verdict=verdict,
    )


# --- finding ---


def resolve(session: Session, tenant_id: str, wanted: str | None) -> ModelVersion:
    """The version that a prediction is pinned to: `champion` (the default) or a version's number.

    Raises:
        NoChampion, ModelNotFound
    """
    if wanted in (None, "", CHAMPION):
        champion = find_champion(session, tenant_id)
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
    """Refuse what no engine of this precision was admitted for, when the version was trained (see
    ml.image.engines.admission).

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


def _next_version(session: Session, tenant_id: str) -> int:
    last = select(func.coalesce(func.max(ModelVersion.version), 0)).where(ModelVersion.tenant_id == tenant_id)
    return (session.scalar(last) or 0) + 1
