"""Who is champion: promoted by request or by force, rolled back, and how two versions compare.

A change of the champion takes effect with its transaction: what is submitted afterwards is pinned to the new one, and
what was submitted before keeps its own. Nothing restarts.
"""

import uuid
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.errors import Invalid, NoChampion, NothingBefore, PromotionRefused
from jobs.models import cards, comparison, registry
from jobs.models.comparison import Common
from jobs.models.gate import Policy, gate
from jobs.models.reproduction import different
from jobs.paging import Page, page
from jobs.tables import How, Json, ModelVersion, Promotion

FIGURES = (
    "accuracy", "precision", "recall", "f1", "specificity", "roc_auc", "pr_auc", "loss", "loss_calibrated", "ece",
    "ece_chance",
)  # fmt: skip
"""What versions are compared by."""


@dataclass(frozen=True)
class Comparison:
    """Two versions beside each other: `metrics` by name as [a's, b's], on the same `scans` test scans.

    Without such scans there are no metrics. `note` says either in words; `differences` are pairs as well.
    """

    a: ModelVersion
    b: ModelVersion
    scans: int | None
    metrics: dict[str, list[float | None]]
    test_digest: str | None
    differences: Json
    note: str


def promote(
    session: Session,
    tenant_id: str,
    wanted: str,
    policy: Policy,
    *,
    force: bool = False,
    reason: str | None = None,
    key_id: uuid.UUID | None = None,
) -> ModelVersion:
    """Make a version the champion: where the gate agrees, or by `force`, which needs a reason. One that is champion
    stays it, and nothing is written.

    Raises:
        ModelNotFound
        PromotionRefused: by the gate; it has all reasons.
        Invalid: force without a reason.
    """
    reason = (reason or "").strip() or None
    if force and reason is None:
        raise Invalid("Force needs a reason: say why this version is to be champion against the gate.", "/reason")
    registry.lock(session, tenant_id)
    version = registry.resolve(session, tenant_id, wanted)
    champion = registry.find_champion(session, tenant_id)
    if champion is not None and champion.id == version.id:
        return champion
    verdict = gate(version.metrics, comparison.against(session, version, champion), "auto", policy)
    if not verdict.promoted and not force:
        raise PromotionRefused(version.version, verdict.reasons)
    before = registry.in_force(session, champion)
    how = How.FORCE if force else How.REQUEST
    registry.crown(
        session, version, how, before.id if before else None, verdict=verdict.as_dict(), reason=reason, key_id=key_id
    )
    cards.mirror_soon(session)  # not where a training promotes: MLflow has its run to hear of first
    return version


def rollback(
    session: Session, tenant_id: str, *, reason: str | None = None, key_id: uuid.UUID | None = None
) -> ModelVersion:
    """Return to the champion before; once more, and to the one before that.

    Raises:
        NoChampion, NothingBefore
    """
    registry.lock(session, tenant_id)
    now = registry.in_force(session, registry.find_champion(session, tenant_id))
    if now is None:
        raise NoChampion
    if now.back_id is None:
        raise NothingBefore
    back = session.get_one(Promotion, now.back_id)
    version = session.get_one(ModelVersion, back.model_id)
    reason = (reason or "").strip() or None
    registry.crown(session, version, How.ROLLBACK, back.back_id, reason=reason, key_id=key_id)
    cards.mirror_soon(session)
    return version


def promotions(session: Session, tenant_id: str, limit: int, after: int | None = None) -> Page[Promotion]:
    """The changes of the tenant's champion, newest first. `after`: the id of the last one that the client has."""
    mine = select(Promotion).where(Promotion.tenant_id == tenant_id)
    if after is not None:
        mine = mine.where(Promotion.id < after)
    rows = session.scalars(mine.order_by(Promotion.id.desc()).limit(limit + 1)).all()
    return page(rows, limit, lambda row: row.id)


# --- two versions ---


def compare(session: Session, tenant_id: str, a: str, b: str) -> Comparison:
    """Two versions beside each other: numbers, or `champion`.

    Raises:
        ModelNotFound, NoChampion
    """
    one, other = (registry.resolve(session, tenant_id, wanted) for wanted in (a, b))
    found = comparison.common(session, one, other)
    return Comparison(
        a=one,
        b=other,
        scans=found.scans if found else None,
        metrics=_figures(found) if found else {},
        test_digest=found.test_digest if found else None,
        differences=_differences(one, other),
        note=_note(found),
    )


def _figures(found: Common) -> dict[str, list[float | None]]:
    both = found.one, found.other
    return {name: [each.get(name) for each in both] for name in FIGURES if any(name in each for each in both)}


def _note(found: Common | None) -> str:
    if found is not None:
        return f"Both were scored on the same {found.scans} test scans."
    return (
        "No test scans were scored with both, and figures on different scans compare roughly at best. A training "
        "scores the champion beside its own network: with one of the two as champion, train the other anew."
    )


def _differences(one: ModelVersion, other: ModelVersion) -> Json:
    """What made them differ: each pair is [a's, b's]."""
    made = ({"dataset": each.dataset_digest, "code_revision": each.code_revision} for each in (one, other))
    return {
        "params": different(one.params, other.params),
        "environment": different(one.environment, other.environment),
        **different(*made),
    }
