"""Scores of versions by the set of test scans: two versions are comparable if both have scores on the same set."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, aliased

from jobs.models import registry
from jobs.models.gate_rules import NOT_SHARED, ChampionComparison
from jobs.models.reproduction import differences
from jobs.tables import Json, ModelEvaluation, ModelVersion
from ml.spec.registry import spec_of

PAIRED, AGAINST = "paired", "against"
"""Keys of a version's scores: the paired tests, and the id of the version that they are against."""


@dataclass(frozen=True)
class PairedScores:
    """Metrics of the champion at a training's start and of the new network, on the same `scans` test scans, which
    neither was trained on, and the paired tests on them. If there are none, `why` gives the reason."""

    champion_id: uuid.UUID
    why: str = ""
    test_digest: str | None = None
    scans: int = 0
    candidate: Json | None = None
    champion: Json | None = None
    paired: Json | None = None


@dataclass(frozen=True)
class SharedScores:
    """Two versions' metrics on the same test scans, and the paired tests of a against b, if they were computed."""

    test_digest: str
    scans: int
    a: Json
    b: Json
    paired: Json | None = None


@dataclass(frozen=True)
class Comparison:
    """Two versions side by side: `metrics` by name as [a's, b's], on the same `scans` test scans.

    `metrics` is empty if there are no such scans; `note` says so in words. `differences` are [a's, b's] as well.
    `paired`: the paired tests of a against b (`ml.evaluation.paired`) with the number of their `scans`; None if no
    training computed any.
    """

    a: ModelVersion
    b: ModelVersion
    scans: int | None
    metrics: dict[str, list[float | None]]
    test_digest: str | None
    differences: Json
    note: str
    paired: Json | None = None


# --- scores ---


def save_scores(session: Session, version: ModelVersion, paired: PairedScores | None) -> None:
    """Store the scores that the version's training computed: its own, and both versions' on the shared test scans.

    Its own are left out if it was trained on scans that it was tested on: they are comparable to nothing.
    """
    own = version.metrics.get("test_digest")
    if own is not None and not any((version.metrics.get("leaks") or {}).values()):
        _upsert(session, version, version.id, own, int(version.metrics.get("held_out") or 0), version.metrics)
    if (
        paired is None
        or paired.test_digest is None
        or _is_outdated(session.get(ModelVersion, paired.champion_id), paired)
    ):
        return
    tests = {PAIRED: {**paired.paired, AGAINST: str(paired.champion_id)}} if paired.paired else {}
    for model_id, metrics in ((version.id, paired.candidate), (paired.champion_id, paired.champion)):
        if metrics is not None:
            more = tests if model_id == version.id else {}
            _upsert(session, version, model_id, paired.test_digest, paired.scans, {**metrics, **more})


def _is_outdated(champion: ModelVersion | None, paired: PairedScores) -> bool:
    """Whether the champion was scored at another threshold than it has now."""
    now, then = (each.get("threshold") for each in (champion.metrics if champion else {}, paired.champion or {}))
    return None not in (now, then) and now != then


def _upsert(
    session: Session, trained: ModelVersion, model_id: uuid.UUID, test_digest: str, scans: int, metrics: Json
) -> None:
    scores = {"job_id": trained.job_id, "scans": scans, "metrics": metrics}
    row = insert(ModelEvaluation).values(
        model_id=model_id, test_digest=test_digest, tenant_id=trained.tenant_id, **scores
    )
    # Both versions' rows come from the same run: older scores may be of another machine, and differ by its rounding.
    session.execute(
        row.on_conflict_do_update(
            index_elements=["model_id", "test_digest"], set_={**scores, "created_at": func.clock_timestamp()}
        )
    )


def shared_scores(
    session: Session, a: ModelVersion, b: ModelVersion, paired_first: bool = False
) -> SharedScores | None:
    """Both versions' metrics on the largest set of test scans that both were scored on.

    `paired_first`: a set with paired tests of the two comes before larger ones.
    """
    of_a, of_b = aliased(ModelEvaluation), aliased(ModelEvaluation)
    rows = session.execute(
        select(of_a.test_digest, of_a.scans, of_a.metrics.label("a"), of_b.metrics.label("b"))
        .join(of_b, of_b.test_digest == of_a.test_digest)
        .where(of_a.model_id == a.id, of_b.model_id == b.id)
        .order_by(of_a.scans.desc(), of_a.created_at.desc())
    )
    found = [SharedScores(row.test_digest, row.scans, row.a, row.b, _tests(a, b, row.a, row.b)) for row in rows]
    with_tests = [each for each in found if each.paired]
    return next(iter((with_tests if paired_first else []) + found), None)


def _tests(a: ModelVersion, b: ModelVersion, of_a: Json, of_b: Json) -> Json | None:
    """The paired tests of a against b, whichever of the two was trained beside the other."""
    tests, reverse = of_a.get(PAIRED) or {}, of_b.get(PAIRED) or {}
    if tests.get(AGAINST) == str(b.id):
        return tests
    if reverse.get(AGAINST) == str(a.id):
        return {**reverse, "differences": {name: _reversed(one) for name, one in reverse["differences"].items()}}
    return None


def _reversed(difference: Json) -> Json:
    low, high = (None if value is None else -value for value in (difference["high"], difference["low"]))
    ours, theirs = difference["theirs"], difference["ours"]
    return {"ours": ours, "theirs": theirs, "difference": ours - theirs, "low": low, "high": high}


def choices(session: Session, version: ModelVersion, test_digest: str | None) -> int:
    """How often these test scans have chosen among the versions of its pipeline and task, this version included."""
    others = select(func.count()).where(
        ModelVersion.tenant_id == version.tenant_id,
        ModelVersion.pipeline == version.pipeline,
        ModelVersion.task == version.task,
        ModelVersion.id != version.id,
        ModelVersion.gate["reported"]["test_digest"].astext == test_digest,
    )
    return 1 + (0 if test_digest is None else session.scalar(others) or 0)


def compare_with_champion(
    session: Session, version: ModelVersion, champion: ModelVersion | None, why: str | None = None
) -> ChampionComparison | None:
    """What the gate compares the version with. `why`: the reason to give if there are no shared scores."""
    if champion is None:
        return None
    found = shared_scores(session, version, champion, paired_first=True)
    if found is None:
        return ChampionComparison(champion.version, why=why or NOT_SHARED)
    return ChampionComparison(
        champion.version, found.scans, found.a, found.b,
        paired=found.paired, reported=_reported(champion), test_digest=found.test_digest,
    )  # fmt: skip


def _reported(champion: ModelVersion) -> float | None:
    value: float | None = (champion.gate.get("reported") or {}).get("value")
    return value


def missing_reason(champion: ModelVersion | None, paired: PairedScores | None) -> str | None:
    """Why a training has no comparison with the version that is champion at its end."""
    if champion is None:
        return None
    if paired is None or paired.champion_id != champion.id:
        return "the champion changed while it trained, and no test scans were scored with both"
    if _is_outdated(champion, paired):
        return "the champion's operating point was set anew while it trained"
    return paired.why or None


# --- two versions side by side ---


def compare(session: Session, tenant_id: str, a: str, b: str) -> Comparison:
    """Two versions, each given by its number or as `champion`.

    Raises:
        ModelNotFound, NoChampion
    """
    one, other = (registry.resolve(session, tenant_id, wanted) for wanted in (a, b))
    found = shared_scores(session, one, other)
    return Comparison(
        a=one,
        b=other,
        scans=found.scans if found else None,
        metrics=_figures(found, spec_of(one.pipeline).figures) if found else {},
        test_digest=found.test_digest if found else None,
        differences=_differences(one, other),
        note=_note(found),
        paired=_paired(shared_scores(session, one, other, paired_first=True)),
    )


def _paired(found: SharedScores | None) -> Json | None:
    return {**found.paired, "scans": found.scans} if found and found.paired else None


def _figures(found: SharedScores, figures: Sequence[str]) -> dict[str, list[float | None]]:
    both = found.a, found.b
    return {name: [each.get(name) for each in both] for name in figures if any(name in each for each in both)}


def _note(found: SharedScores | None) -> str:
    if found is not None:
        return f"Both were scored on the same {found.scans} test scans."
    return (
        "No test scans were scored with both, and figures on different scans compare roughly at best. A training "
        "scores the champion beside its own network: with one of the two as champion, train the other anew."
    )


def _differences(a: ModelVersion, b: ModelVersion) -> Json:
    sources = ({"dataset": each.dataset_digest, "code_revision": each.code_revision} for each in (a, b))
    return {
        "params": differences(a.params, b.params),
        "environment": differences(a.environment, b.environment),
        **differences(*sources),
    }
