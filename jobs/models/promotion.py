"""Who is champion: promoted by the gate after a training, by request or by force, and rolled back.

A change of the champion takes effect with its transaction: jobs submitted afterwards are pinned to the new one, jobs
submitted before keep theirs. Nothing restarts.
"""

import uuid

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from jobs.errors import Invalid, NoChampion, NothingBefore, PromotionRefused
from jobs.events import webhooks
from jobs.events.webhooks import EventType
from jobs.models import cards, comparison, registry
from jobs.models.comparison import PairedScores
from jobs.models.gate import ChampionComparison, GatePolicy, Verdict, gate
from jobs.models.registry import NewModel
from jobs.paging import Page, page
from jobs.queue.leases import Claim, lock_held
from jobs.tables import Job, Json, ModelVersion, Promotion, PromotionMethod
from ml.spec.pipeline import DEFAULT_TASK, IMAGE
from ml.spec.registry import spec_of


def register(
    session: Session, claim: Claim, new: NewModel, policy: GatePolicy, paired: PairedScores | None = None
) -> ModelVersion:
    """Insert the version that the claimed training made, with its scores, and promote it if the gate passes.

    `paired`: the champion of the training's start, scored on the same test scans; None if there was no champion.

    Raises:
        LeaseLost: another worker holds the training, or it has ended; nothing was written.
    """
    registry.lock(session, claim.tenant_id)
    lock_held(session, claim)
    job = session.get_one(Job, claim.job_id)
    version = registry.insert(session, job, new)
    comparison.save_scores(session, version, paired)
    champion = registry.find_champion(session, claim.tenant_id, version.pipeline, version.task)
    versus = comparison.compare_with_champion(session, version, champion, comparison.missing_reason(champion, paired))
    verdict = _verdict(session, version, versus, job.promote, policy)
    version.gate = verdict.as_dict()
    job.model_id, job.model_version = version.id, version.version
    session.flush()
    data = {"model_version": str(version.version), "job_id": str(job.id), "promoted": verdict.promoted}
    webhooks.emit(session, claim.tenant_id, f"model_{version.id}_created", EventType.MODEL_CREATED, data)
    if verdict.promoted:
        before = current_promotion(session, champion)
        set_champion(session, version, PromotionMethod.GATE, before.id if before else None, verdict=version.gate)
    return version


def _verdict(
    session: Session, version: ModelVersion, versus: ChampionComparison | None, wanted: str, policy: GatePolicy
) -> Verdict:
    compared = versus.test_digest if versus else None
    choices = comparison.choices(session, version, compared or version.metrics.get("test_digest"))
    return gate(version.metrics, versus, wanted, policy, spec_of(version.pipeline).gate, choices)


def promote(
    session: Session,
    tenant_id: str,
    wanted: str,
    policy: GatePolicy,
    *,
    force: bool = False,
    reason: str | None = None,
    key_id: uuid.UUID | None = None,
) -> ModelVersion:
    """Make a version the champion if the gate passes, or with `force`, which needs a reason. Nothing is written if it
    is the champion already.

    Raises:
        ModelNotFound
        PromotionRefused: by the gate, with all reasons.
        Invalid: force without a reason.
    """
    reason = (reason or "").strip() or None
    if force and reason is None:
        raise Invalid("Force needs a reason: say why this version is to be champion against the gate.", "/reason")
    registry.lock(session, tenant_id)
    version = registry.resolve(session, tenant_id, wanted)
    champion = registry.find_champion(session, tenant_id, version.pipeline, version.task)
    if champion is not None and champion.id == version.id:
        return champion
    versus = comparison.compare_with_champion(session, version, champion)
    verdict = _verdict(session, version, versus, "auto", policy)
    if not verdict.promoted and not force:
        raise PromotionRefused(version.version, verdict.reasons)
    before = current_promotion(session, champion)
    how = PromotionMethod.FORCE if force else PromotionMethod.REQUEST
    set_champion(
        session, version, how, before.id if before else None, verdict=verdict.as_dict(), reason=reason, key_id=key_id
    )
    # `register` does not notify: MLflow must receive the training's run before its registry can refer to it.
    cards.notify_registry_sync(session)
    return version


def rollback(
    session: Session,
    tenant_id: str,
    *,
    pipeline: str = IMAGE,
    task: str = DEFAULT_TASK,
    reason: str | None = None,
    key_id: uuid.UUID | None = None,
) -> ModelVersion:
    """Return to the previous champion of the pipeline and task. Repeated rollbacks go back one more step each.

    Raises:
        NoChampion, NothingBefore
    """
    registry.lock(session, tenant_id)
    now = current_promotion(session, registry.find_champion(session, tenant_id, pipeline, task))
    if now is None:
        raise NoChampion
    back, version = _step_back(session, now)
    reason = (reason or "").strip() or None
    set_champion(session, version, PromotionMethod.ROLLBACK, back.back_id, reason=reason, key_id=key_id)
    cards.notify_registry_sync(session)
    return version


def _step_back(session: Session, now: Promotion) -> tuple[Promotion, ModelVersion]:
    """The promotion to return to, and its version; past those whose versions were deleted."""
    back_id = now.back_id
    while back_id is not None:
        back = session.get_one(Promotion, back_id)
        mine = ModelVersion.id == back.model_id, ModelVersion.tenant_id == now.tenant_id
        version = session.scalar(select(ModelVersion).where(*mine))
        if version is not None:
            return back, version
        back_id = back.back_id
    raise NothingBefore


# --- history ---


def promotions(session: Session, tenant_id: str, limit: int, after: int | None = None) -> Page[Promotion]:
    """The tenant's promotions, newest first. `after`: the id of the last one on the previous page."""
    mine = select(Promotion).where(Promotion.tenant_id == tenant_id)
    if after is not None:
        mine = mine.where(Promotion.id < after)
    rows = session.scalars(mine.order_by(Promotion.id.desc()).limit(limit + 1)).all()
    return page(rows, limit, lambda row: row.id)


def current_promotion(session: Session, champion: ModelVersion | None) -> Promotion | None:
    """The promotion that made the champion. Releases before migration 0006 wrote none; it is then inserted here."""
    if champion is None:
        return None
    query = select(Promotion).where(*_same_task(Promotion, champion))
    latest = session.scalar(query.order_by(Promotion.id.desc()).limit(1))
    if latest is not None and latest.model_id == champion.id:
        return latest
    missing = _promotion(champion, PromotionMethod.GATE, latest.id if latest else None, champion.gate)
    missing.replaced = latest.version if latest else None
    session.add(missing)
    session.flush()
    return missing


def set_champion(
    session: Session,
    version: ModelVersion,
    how: PromotionMethod,
    back_id: int | None,
    *,
    verdict: Json | None = None,
    reason: str | None = None,
    key_id: uuid.UUID | None = None,
) -> None:
    """Replace the champion of the version's pipeline and task with it, and append a promotion.
    `registry.lock` must be held.

    `back_id`: the promotion that a rollback of this one returns to.
    """
    demote = (
        update(ModelVersion).where(*_same_task(ModelVersion, version), ModelVersion.champion).values(champion=False)
    )
    replaced = session.scalar(demote.returning(ModelVersion.version))
    promoted = update(ModelVersion).where(ModelVersion.id == version.id)
    session.execute(promoted.values(champion=True, promoted_at=func.clock_timestamp()))
    row = _promotion(version, how, back_id, verdict)
    row.replaced, row.reason, row.by_key = replaced, reason, key_id
    session.add(row)
    session.flush()
    session.refresh(version)
    _emit_webhook(session, row)


def _emit_webhook(session: Session, row: Promotion) -> None:
    """The event leaves the reason out: it is internal free text, and may name anything."""
    type_ = EventType.MODEL_ROLLED_BACK if row.how == PromotionMethod.ROLLBACK else EventType.MODEL_PROMOTED
    replaced = None if row.replaced is None else str(row.replaced)
    data = {"model_version": str(row.version), "replaced": replaced, "how": str(row.how)}
    data |= {"pipeline": row.pipeline, "task": row.task}
    webhooks.emit(session, row.tenant_id, f"promotion_{row.id}", type_, data)


def _same_task(table: type[ModelVersion | Promotion], version: ModelVersion) -> list[ColumnElement[bool]]:
    """Rows of the version's tenant, pipeline and task."""
    return [
        table.tenant_id == version.tenant_id,
        table.pipeline == version.pipeline,
        table.task == version.task,
    ]


def _promotion(version: ModelVersion, how: PromotionMethod, back_id: int | None, verdict: Json | None) -> Promotion:
    return Promotion(
        tenant_id=version.tenant_id,
        pipeline=version.pipeline,
        task=version.task,
        model_id=version.id,
        version=version.version,
        how=how,
        back_id=back_id,
        verdict=verdict,
    )
