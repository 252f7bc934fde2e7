"""Scores of versions by the set of test scans: two versions compare where both have scores on the same set."""

import uuid
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, aliased

from jobs.models.gate import Against
from jobs.tables import Json, ModelEvaluation, ModelVersion


@dataclass(frozen=True)
class Measured:
    """What a training found that scored the champion of its start beside the new network: on the same `scans` test
    scans, of which neither has learnt. Without them `why` says why."""

    champion_id: uuid.UUID
    why: str = ""
    test_digest: str | None = None
    scans: int = 0
    candidate: Json | None = None
    champion: Json | None = None


@dataclass(frozen=True)
class Common:
    """Two versions' metrics on the same test scans."""

    test_digest: str
    scans: int
    one: Json
    other: Json


def keep(session: Session, version: ModelVersion, measured: Measured | None) -> None:
    """Keep the scores that the version's training brought: its own, and both on the scans that they share.

    Its own compare with nobody's where it has learnt from what it was tested on.
    """
    own = version.metrics.get("test_digest")
    if own is not None and not any((version.metrics.get("leaks") or {}).values()):
        _write(session, version, version.id, own, int(version.metrics.get("held_out") or 0), version.metrics)
    if measured is None or measured.test_digest is None:
        return
    for model_id, metrics in ((version.id, measured.candidate), (measured.champion_id, measured.champion)):
        if metrics is not None:
            _write(session, version, model_id, measured.test_digest, measured.scans, metrics)


def _write(
    session: Session, made: ModelVersion, model_id: uuid.UUID, test_digest: str, scans: int, metrics: Json
) -> None:
    found = {"job_id": made.job_id, "scans": scans, "metrics": metrics}
    row = insert(ModelEvaluation).values(model_id=model_id, test_digest=test_digest, tenant_id=made.tenant_id, **found)
    # The latest scores of both stand together: an older one's may be of another machine, and differ by its rounding.
    session.execute(
        row.on_conflict_do_update(
            index_elements=["model_id", "test_digest"], set_={**found, "created_at": func.clock_timestamp()}
        )
    )


def common(session: Session, one: ModelVersion, other: ModelVersion) -> Common | None:
    """Both versions' metrics on the largest set of test scans that both were scored on."""
    ours, theirs = aliased(ModelEvaluation), aliased(ModelEvaluation)
    row = session.execute(
        select(ours.test_digest, ours.scans, ours.metrics, theirs.metrics.label("theirs"))
        .join(theirs, theirs.test_digest == ours.test_digest)
        .where(ours.model_id == one.id, theirs.model_id == other.id)
        .order_by(ours.scans.desc(), ours.created_at.desc())
        .limit(1)
    ).first()
    return None if row is None else Common(row.test_digest, row.scans, row.metrics, row.theirs)


def against(
    session: Session, version: ModelVersion, champion: ModelVersion | None, why: str | None = None
) -> Against | None:
    """What the gate compares the version with. `why` there may be nothing: for the training's end (see `why_not`)."""
    if champion is None:
        return None
    found = common(session, version, champion)
    if found is None:
        return Against(champion.version, why=why) if why else Against(champion.version)
    return Against(champion.version, found.scans, found.one, found.other)


def why_not(champion: ModelVersion | None, measured: Measured | None) -> str | None:
    """Why a training has no comparison with who is champion at its end."""
    if champion is None:
        return None
    if measured is None or measured.champion_id != champion.id:
        return "the champion changed while it trained, and no test scans were scored with both"
    return measured.why or None
