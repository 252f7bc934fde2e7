"""Slices of a study are alike: each study has one vote, so that few studies are no drift, and a shift still is."""

import datetime as dt
import random
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.models import drift
from jobs.models.drift import DayCounts, DriftPolicy, effective_studies
from jobs.models.feedback import ConfusionCounts
from jobs.queue import lifecycle
from jobs.queue.outcomes import CLASS, IN_STUDIES, SQUARES, STUDY, ScanOutcome
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.retention import study_counts
from jobs.settings import Settings
from jobs.states import JobKind, Lane
from jobs.storage.blobs import BlobStore
from jobs.tables import Job, ModelVersion, PredictionCount, StudyCount
from ml.image.pixels.statistics import MEANINGS
from ml.image.serving.drift_reference import drift_reference
from tests import builders

POLICY = DriftPolicy(bound=0.25, least_studies=30)
FIGURES = (*MEANINGS, "confidence")
START = dt.date(2026, 1, 1)


# --- the simulation ---


def slices(rng: np.random.Generator, studies: int, each: int, likeness: float, shift: float = 0.0) -> np.ndarray:
    """Figures [studies, each, figures] with mean 0 and variance 1, of which the study explains a share `likeness`.

    `shift`: of the first figure, in standard deviations.
    """
    size = len(FIGURES)
    of_study, of_slice = rng.normal(size=(studies, 1, size)), rng.normal(size=(studies, each, size))
    found = np.sqrt(likeness) * of_study + np.sqrt(1 - likeness) * of_slice
    found[..., 0] += shift
    return found


def version_of(rng: np.random.Generator, patients: int, each: int, likeness: float) -> ModelVersion:
    """A version whose test scans are of so many patients."""
    values = slices(rng, patients, each, likeness).reshape(-1, len(FIGURES))
    statistics = [dict(zip(MEANINGS, row, strict=False)) for row in values.tolist()]
    groups, labels = np.repeat(np.arange(patients), each), np.where(values[:, 1] > 0, "Tumor", "Normal").tolist()
    reference = drift_reference(statistics, values[:, -1].tolist(), labels, ("Normal", "Tumor"), None, groups)
    return ModelVersion(classes=["Normal", "Tumor"], metrics={}, reference=reference)


def add_study(counts: Counter[tuple[str, str]], version: ModelVersion, scans: np.ndarray, known: bool) -> None:
    """Count the scans of one study, [scans, figures], as `count_predictions` and `count_studies` do."""
    for number, name in enumerate(FIGURES):
        edges = version.reference["statistics"][name]["edges"]  # type: ignore[index]
        counts.update((name, str(bin_)) for bin_ in np.searchsorted(edges, scans[:, number], side="right"))
    counts.update((CLASS, "Tumor" if positive else "Normal") for positive in scans[:, 1] > 0)
    if known:
        counts[STUDY, IN_STUDIES] += len(scans)
        counts[STUDY, SQUARES] += len(scans) ** 2


def alarms(version: ModelVersion, days: np.ndarray, known: bool = True) -> Iterator[bool | None]:
    """Whether each day, of `days` [days, studies, scans, figures], raises an alarm at any check; None: no verdict.

    It is checked ten times a day, or after each study."""
    counted: DayCounts = {}
    for number, studies in enumerate(days):
        day, verdicts = START + dt.timedelta(days=number), []
        counted[day] = Counter()
        for done, scans in enumerate(studies, 1):
            add_study(counted[day], version, scans, known)
            if done % max(1, len(studies) // 10) == 0:
                verdicts.append(drift._day(version, POLICY, counted, day, ConfusionCounts()))
        told = [bool(verdict.drifted) for verdict in verdicts if verdict.since is not None]
        yield any(told) if told else None


PATTERNS = [(60, 1), (4, 15), (2, 30), (10, 40)]
"""Studies a day, and slices of each."""


@pytest.mark.parametrize(("studies", "each"), PATTERNS)
@pytest.mark.parametrize("likeness", [0.8, 1.0])
def test_unchanged_studies_raise_false_alarms_on_at_most_one_day_in_twenty(
    studies: int, each: int, likeness: float
) -> None:
    rng, told = np.random.default_rng(studies), list[bool | None]()
    for patients, scans in ((93, 1), (31, 3), (12, 8)):
        days = slices(rng, 25 * studies, each, likeness).reshape(25, studies, each, -1)
        told += alarms(version_of(rng, patients, scans, likeness), days)
    verdicts = [alarm for alarm in told if alarm is not None]
    assert len(verdicts) >= 30
    assert sum(verdicts) <= 0.05 * len(verdicts)


@pytest.mark.parametrize(("studies", "each"), PATTERNS)
def test_a_scanner_that_shifts_is_found_once_there_are_enough_studies(studies: int, each: int) -> None:
    """A shift by 2.5 standard deviations, against the test scans of 31 patients."""
    rng = np.random.default_rng(each)
    days = slices(rng, 25 * studies, each, 0.8, shift=2.5).reshape(25, studies, each, -1)
    told = [alarm for alarm in alarms(version_of(rng, 31, 3, 0.8), days) if alarm is not None]
    assert told, "there are verdicts"
    assert sum(told) >= 0.9 * len(told)


def test_scans_of_unknown_studies_count_like_the_test_scans() -> None:
    """Where the client names no studies, 15 test scans a patient say how many scans are one vote."""
    rng = np.random.default_rng(3)
    days = slices(rng, 25 * 4, 15, 1.0).reshape(25, 4, 15, -1)
    told = list(alarms(version_of(rng, 30, 15, 1.0), days, known=False))
    assert told[:7] == [None] * 7, "60 scans a day are 4 votes, and a verdict needs 30"
    assert not any(told)


@pytest.mark.parametrize(
    ("sizes", "unknown", "per_study", "expected"),
    [
        ([1] * 60, 0, 1, 60),
        ([15] * 4, 0, 1, 4),
        ([30, 1, 1], 0, 1, 32**2 / 902),
        ([], 60, 15, 4),
        ([], 60, 1, 60),
        ([15] * 4, 60, 15, 8),
        ([], 0, 1, 0),
    ],
)
def test_studies_are_counted_as_kish_does(sizes: list[int], unknown: int, per_study: float, expected: float) -> None:
    squares = sum(size**2 for size in sizes)
    assert effective_studies(sum(sizes) + unknown, sum(sizes), squares, per_study) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reference", "metrics", "studies"),
    [
        ({"scans": 93, "studies": 31.5}, {"independent": 40}, 31.5),
        ({"scans": 93}, {"independent": 40}, 40),  # a version of before studies were counted
        ({"scans": 93}, {}, 93),
    ],
)
def test_references_of_earlier_versions_have_their_groups(reference: dict, metrics: dict, studies: float) -> None:
    assert drift.reference_studies(ModelVersion(reference=reference, metrics=metrics)) == studies


# --- counting ---


@pytest.fixture
def champion(sessions: Sessions) -> ModelVersion:
    with sessions.begin() as session:
        return builders.make_model(session)


def predicted(
    session: Session, version: ModelVersion, names: Sequence[tuple[str | None, str | None]], chunk: int = 100
) -> Job:
    """A batch with a scan for each patient and study, all predicted."""
    scans = [NewResult(builders.make_scan(session).id, patient=patient, study=study) for patient, study in names]
    new = NewJob(version.tenant_id, JobKind.PREDICT_BATCH, Lane.BATCH, model_id=version.id)
    job = submit(session, new, scans, chunk)
    for unit in builders.units_of(session, job):
        held = builders.claim(session, unit)
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))
    return job


def counted(session: Session, version: ModelVersion) -> tuple[int, int]:
    """Scans of known studies, and the sum of their squares, over all days."""
    rows = select(PredictionCount.bin, PredictionCount.scans)
    found = Counter[str]()
    for bin_, scans in session.execute(
        rows.where(PredictionCount.model_id == version.id, PredictionCount.what == STUDY)
    ):
        found[bin_] += scans
    return found[IN_STUDIES], found[SQUARES]


def test_a_study_is_one_however_many_chunks_and_jobs_bring_it(sessions: Sessions, champion: ModelVersion) -> None:
    """Checked against a count of the names."""
    rng = random.Random(5)
    names = [(f"patient {rng.randrange(3)}", f"study {rng.randrange(4)}") for _ in range(40)]
    with sessions.begin() as session:
        predicted(session, champion, names[:30], chunk=7)
        predicted(session, champion, names[30:])
        assert counted(session, champion) == (40, sum(size**2 for size in Counter(names).values()))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([(None, None)] * 5, (0, 0)),
        ([(None, "S"), (None, "S"), (None, None)], (2, 4)),
        ([("P", None), ("P", None), ("Q", None)], (3, 5)),
        ([("P", "1"), ("Q", "1")], (2, 2)),  # two patients, each with a first study
        ([("P1", "S"), ("P", "1S")], (2, 2)),
    ],
)
def test_the_study_is_what_the_client_names(
    names: list[tuple[str | None, str | None]], expected: tuple[int, int], sessions: Sessions, champion: ModelVersion
) -> None:
    with sessions.begin() as session:
        predicted(session, champion, names)
        assert counted(session, champion) == expected


def test_a_file_that_tells_its_study_needs_no_name(sessions: Sessions, champion: ModelVersion) -> None:
    """Two studies by their UIDs, of three slices and one; a third by the client's name."""
    told = [{"study_uid": "1.2.3", "patient_hash": "a"}] * 3 + [{"study_uid": "1.2.4", "patient_hash": "a"}, {}]
    with sessions.begin() as session:
        scans = [NewResult(builders.make_scan(session).id, study=name) for name in (None, None, None, None, "S")]
        new = NewJob(champion.tenant_id, JobKind.PREDICT_BATCH, Lane.BATCH, model_id=champion.id)
        (unit,) = builders.units_of(session, submit(session, new, scans, 10))
        good: Any = {"label": "Tumor", "confidence": 0.9, "probabilities": {"Tumor": 0.9}, "engine": "torch-fp32"}
        outcomes = [ScanOutcome(number, **good, identity=one) for number, one in enumerate(told)]
        lifecycle.succeed(session, builders.claim(session, unit), outcomes=outcomes)
        assert counted(session, champion) == (5, 9 + 1 + 1)


def test_failed_and_cached_results_have_no_vote(sessions: Sessions, champion: ModelVersion) -> None:
    with sessions.begin() as session:
        scans = [NewResult(builders.make_scan(session).id, study="S") for _ in range(3)]
        new = NewJob(champion.tenant_id, JobKind.PREDICT_BATCH, Lane.BATCH, model_id=champion.id)
        (unit,) = builders.units_of(session, submit(session, new, scans, 10))
        good: dict[str, Any] = {
            "label": "Tumor",
            "confidence": 0.9,
            "probabilities": {"Tumor": 0.9},
            "engine": "torch-fp32",
        }
        outcomes = [ScanOutcome(0, **good), ScanOutcome(1, **good, cached=True), ScanOutcome(2, error=builders.BROKEN)]
        lifecycle.succeed(session, builders.claim(session, unit), outcomes=outcomes)
        assert counted(session, champion) == (1, 1)


def test_counts_by_study_hold_no_names_and_go_after_their_day(
    sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    with sessions.begin() as session:
        predicted(session, champion, [("Jane Doe", "CT 1")] * 2)
        assert "Jane" not in str(session.execute(text("SELECT * FROM study_counts")).all())
        for ago in (1, 2):
            moved = {"model_id": champion.id, "study": 7, "tenant_id": champion.tenant_id, "scans": 1}
            session.add(StudyCount(day=dt.datetime.now(dt.UTC).date() - dt.timedelta(days=ago), **moved))
    assert study_counts.step(sessions, BlobStore(settings.artifacts), settings) is False
    with sessions() as session:
        assert len(session.scalars(select(StudyCount)).all()) == 2
        assert counted(session, champion) == (2, 4), "what drift reads stays"


# --- what is told ---


def drifted_champion(session: Session, version: ModelVersion, label: str = "Tumor") -> uuid.UUID:
    """Forty studies predicted as Tumor by a version whose 60 test scans were all Normal. Returns the last job."""
    mine = session.get_one(ModelVersion, version.id)
    mine.reference = {"scans": 60, "studies": 60.0, "statistics": {}, "classes": {"Normal": 60, "Tumor": 0}}
    return predicted(session, mine, [(None, f"{label} {number}") for number in range(40)]).id


def test_the_check_keeps_whether_the_champion_has_drifted(sessions: Sessions, champion: ModelVersion) -> None:
    today = str(dt.datetime.now(dt.UTC).date())
    with sessions.begin() as session:
        drifted_champion(session, champion)
        drift.check_drift(session, POLICY)
    with sessions.begin() as session:
        version = session.get_one(ModelVersion, champion.id)
        assert version.drift == {"day": today, "figures": ["class"]}
        version.reference = {**(version.reference or {}), "classes": {"Normal": 0, "Tumor": 60}}
    with sessions.begin() as session:
        drift.check_drift(session, POLICY)
    with sessions() as session:
        assert session.get_one(ModelVersion, champion.id).drift is None, "the latest day has not drifted"
