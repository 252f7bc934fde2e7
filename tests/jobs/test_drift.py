"""Predictions are counted once and compared with the test scans; false alarms are rare."""

import datetime as dt
import random
import threading
import uuid
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, func, insert, select, text
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.models import drift, feedback
from jobs.models.drift import DriftPolicy, chance_limit, drift_limit, psi
from jobs.models.feedback import ConfusionCounts
from jobs.queue import leases, lifecycle
from jobs.queue.leases import Claim
from jobs.queue.outcomes import CLASS, DISPOSITION, ScanOutcome
from jobs.settings import Settings
from jobs.states import JobKind
from jobs.tables import Delivery, Json, ModelVersion, PredictionCount, Webhook
from tests import builders
from tests.builders import TENANT
from worker.dispatcher.loop import Dispatcher

POLICY = DriftPolicy(bound=0.25, least_studies=50)
SCANS = 93
"""Scans of the reference: a test set of typical size."""
FIGURES = ("brightness", "contrast", "black", "sharpness", "colour", "confidence")


def reference(seed: int = 0) -> Json:
    """Histograms of test scans whose figures are uniform between 0 and 1."""
    rng, statistics = random.Random(seed), {}
    for name in FIGURES:
        values = sorted(rng.random() for _ in range(SCANS))
        edges = [values[SCANS * number // 9] for number in range(1, 9)]
        counted = Counter(bisect_right(edges, value) for value in values)
        statistics[name] = {"edges": edges, "counts": [counted[number] for number in range(9)]}
    return {"scans": SCANS, "statistics": statistics, "classes": {"Normal": 48, "Tumor": 45}, "rejected": 2}


def outcome(ordinal: int, rng: random.Random, shift: float = 0.0, disposition: str = "tumor") -> ScanOutcome:
    """A prediction distributed like the reference; `shift` makes the scan brighter."""
    figures = {name: rng.random() for name in FIGURES}
    confidence, label = figures.pop("confidence"), rng.choice(("Normal", "Tumor"))
    statistics = {**figures, "brightness": min(1.0, figures["brightness"] + shift)}
    probabilities = {label: confidence}
    return ScanOutcome(
        ordinal, label, confidence, probabilities, "torch-fp32", disposition=disposition, statistics=statistics
    )


@pytest.fixture
def champion(sessions: Sessions) -> ModelVersion:
    """A champion without a reference."""
    with sessions.begin() as session:
        return builders.make_model(session)


def referred(session: Session, version: ModelVersion) -> ModelVersion:
    """The version, with a reference."""
    mine = session.get_one(ModelVersion, version.id)
    mine.reference, mine.metrics = reference(), {**mine.metrics, "positive": "Tumor"}
    session.flush()
    return mine


def batch(session: Session, version: ModelVersion, scans: int, chunk: int = 1000) -> list[Claim]:
    """A batch on the version, its units claimed."""
    new = {"tenant_id": version.tenant_id, "model_id": version.id}
    job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=scans, chunk=chunk, **new)
    return [builders.claim(session, unit) for unit in builders.units_of(session, job)]


def counts(session: Session, version: ModelVersion, what: str) -> dict[str, int]:
    """The version's counts of one figure, over all days."""
    rows = select(PredictionCount.bin, func.sum(PredictionCount.scans)).group_by(PredictionCount.bin)
    found = session.execute(rows.where(PredictionCount.model_id == version.id, PredictionCount.what == what))
    return {bin_: int(scans) for bin_, scans in found}


def day_of(session: Session, version: ModelVersion, days_ago: int, scans: int, shift: float = 0.0) -> None:
    """Predictions of a day."""
    (held,) = batch(session, version, scans)
    rng = random.Random(days_ago)
    lifecycle.succeed(session, held, outcomes=[outcome(number, rng, shift) for number in range(scans)])
    moved = "UPDATE prediction_counts SET day = day - :ago WHERE day = (clock_timestamp() AT TIME ZONE 'UTC')::date"
    session.execute(text(moved), {"ago": days_ago})


def seen(session: Session, version: ModelVersion, days: int = 30, policy: DriftPolicy = POLICY) -> drift.DriftReport:
    """The version's drift."""
    return drift.drift(session, version, policy, days)


# --- the index ---


def test_psi_of_equal_histograms_is_zero_and_of_an_empty_bin_finite() -> None:
    assert psi([10, 20, 30], [10, 20, 30]) == 0
    assert psi([10, 20, 30], [100, 200, 300]) == pytest.approx(0, abs=0.01)
    assert 1 < psi([30, 30, 0], [0, 30, 30]) < 20


def test_psi_matches_its_definition() -> None:
    """Shares 0.5 and 0.5 against 0.8 and 0.2: 0.3 ln 1.6 - 0.3 ln 0.4."""
    assert psi([5000, 5000], [8000, 2000]) == pytest.approx(0.4159, abs=0.001)


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=20))
def test_psi_is_non_negative_and_symmetric(pairs: list[tuple[int, int]]) -> None:
    old, new = zip(*pairs, strict=True)
    assert psi(old, new) >= 0
    assert psi(old, new) == pytest.approx(psi(new, old))


def test_chance_limit_matches_the_chi_squared_distribution() -> None:
    """Upper points of the table: 15.507 (8 degrees of freedom, 5 %), 26.124 (8, 0.1 %), 3.841 (1, 5 %)."""
    for bins, risk, point in ((9, 0.05, 15.507), (9, 0.001, 26.124), (2, 0.05, 3.841)):
        assert chance_limit(bins, 100, 100, risk) == pytest.approx(point / 50, rel=0.03)
    assert chance_limit(1, 100, 100, 0.05) == 0


def test_drift_limit_of_many_scans_is_the_bound() -> None:
    assert drift_limit(9, 10**6, 10**6, 0.25) == pytest.approx(0.25, abs=0.001)
    assert drift_limit(9, 93, 200, 0.25) > 0.4


def test_false_alarms_are_rarer_than_one_day_in_a_hundred() -> None:
    """93 reference scans, 200 a day in chunks of ten; checked after every chunk from 50 scans on."""
    rng, alarms, days = random.Random(7), 0, 1000
    for _ in range(days):
        values = [[sorted(rng.random() for _ in range(SCANS)), [0] * 9] for _ in range(7)]
        edges = [[mine[SCANS * number // 9] for number in range(1, 9)] for mine, _ in values]
        old = {str(n): bins(mine, edges[n]) for n, (mine, _) in enumerate(values)}
        new = {str(n): found for n, (_, found) in enumerate(values)}
        for scan in range(1, 201):
            for n, found in enumerate(new.values()):
                found[bisect_right(edges[n], rng.random())] += 1
            if scan >= 50 and scan % 10 == 0 and alarmed(old, new, scan):
                alarms += 1
                break
    assert alarms < days / 100


def alarmed(old: dict[str, list[int]], new: dict[str, list[int]], studies: int) -> bool:
    return any(figure.drifted for figure in drift.figures(old, new, 0.25, SCANS, studies).values())


def bins(values: list[float], edges: list[float]) -> list[int]:
    counted = Counter(bisect_right(edges, value) for value in values)
    return [counted[number] for number in range(len(edges) + 1)]


# --- counting ---


def test_predictions_are_counted_per_figure_and_bin(sessions: Sessions, champion: ModelVersion) -> None:
    with sessions.begin() as session:
        version = referred(session, champion)
        (held,) = batch(session, version, 100)
        given = [outcome(number, random.Random(number)) for number in range(100)]
        edges = version.reference["statistics"]["contrast"]["edges"]  # type: ignore[index]
        given[0] = replace(given[0], statistics={**given[0].statistics, "contrast": edges[3]})  # type: ignore[dict-item]
        lifecycle.succeed(session, held, outcomes=given)
        for name in ("brightness", "contrast"):
            edges = version.reference["statistics"][name]["edges"]  # type: ignore[index]
            expected = Counter(str(bisect_right(edges, one.statistics[name])) for one in given)  # type: ignore[index]
            assert counts(session, version, name) == expected
        assert counts(session, version, "class") == Counter(one.label for one in given)
        assert counts(session, version, "disposition") == {"tumor": 100}
        assert sum(counts(session, version, "confidence").values()) == 100


def test_failures_and_cached_results_are_not_counted(sessions: Sessions, champion: ModelVersion) -> None:
    with sessions.begin() as session:
        (held,) = batch(session, referred(session, champion), 3)
        good = outcome(0, random.Random(0))
        known = replace(outcome(1, random.Random(1)), cached=True)
        lifecycle.succeed(session, held, outcomes=[good, known, ScanOutcome(2, error=builders.BROKEN)])
        assert counts(session, champion, "class") == {good.label: 1}


def test_version_without_reference_counts_classes_and_dispositions(
    sessions: Sessions,
    champion: ModelVersion,
) -> None:
    with sessions.begin() as session:
        day_of(session, champion, 0, 60)
        assert set(session.scalars(select(PredictionCount.what))) == {"class", "disposition"}
        found = seen(session, champion)
        assert (found.reference_scans, found.days[0].scans, found.days[0].since, found.drifted) == (
            None,
            60,
            None,
            False,
        )


def test_requeued_chunk_is_counted_once(sessions: Sessions, champion: ModelVersion) -> None:
    with sessions.begin() as session:
        (held,) = batch(session, referred(session, champion), 10)
        rng = random.Random(3)
        lifecycle.requeue(session, held, "DRAINED", outcomes=[outcome(number, rng) for number in range(4)])
        again = leases.claim(session, held.unit_id, "worker-b", 45)
        assert again is not None
        lifecycle.succeed(session, again, outcomes=[outcome(number, rng) for number in range(4, 10)])
        assert sum(counts(session, champion, "class").values()) == 10
        assert sum(counts(session, champion, "brightness").values()) == 10


def test_concurrent_chunks_are_counted_without_deadlock(
    sessions: Sessions,
    champion: ModelVersion,
) -> None:
    with sessions.begin() as session:
        version = referred(session, champion)
        jobs = [batch(session, version, 20, chunk=5) for _ in range(6)]
    errors: list[BaseException] = []

    def work(claims: list[Claim], number: int) -> None:
        rng = random.Random(number)
        try:
            for held in claims:
                with sessions.begin() as session:
                    ordinals = [one.ordinal for one in builders.outcomes_of(session, held)]
                    shuffled = rng.sample(ordinals, len(ordinals))
                    lifecycle.succeed(session, held, outcomes=[outcome(ordinal, rng) for ordinal in shuffled])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(claims, number)) for number, claims in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    with sessions() as session:
        for what in ("class", "disposition", "brightness", "confidence"):
            assert sum(counts(session, champion, what).values()) == 120, what


# --- verdicts ---


def test_brighter_scans_drift_and_similar_scans_do_not(sessions: Sessions, champion: ModelVersion) -> None:
    with sessions.begin() as session:
        version = referred(session, champion)
        day_of(session, version, 1, 200)
        day_of(session, version, 0, 200, shift=0.4)
        usual, bright = seen(session, version).days
        assert usual.drifted == []
        assert bright.drifted == ["brightness"]
        assert bright.figures["brightness"].psi > 0.5 > usual.figures["brightness"].psi
        assert set(bright.figures) == {*FIGURES, "class", "rejected"}
        assert seen(session, version).drifted
        assert not seen(session, version, policy=DriftPolicy(bound=50, least_studies=50)).drifted


def test_predicting_one_class_only_is_drift(sessions: Sessions, champion: ModelVersion) -> None:
    with sessions.begin() as session:
        version = referred(session, champion)
        (held,) = batch(session, version, 100)
        given = [replace(outcome(number, random.Random(number)), label="Tumor") for number in range(100)]
        lifecycle.succeed(session, held, outcomes=given)
        assert seen(session, version).days[0].drifted == ["class"]


def test_many_rejected_scans_are_drift(sessions: Sessions, champion: ModelVersion) -> None:
    with sessions.begin() as session:
        version = referred(session, champion)
        (held,) = batch(session, version, 100)
        words = ["rejected"] * 30 + ["tumor"] * 70
        given = [outcome(number, random.Random(number), disposition=word) for number, word in enumerate(words)]
        lifecycle.succeed(session, held, outcomes=given)
        (day,) = seen(session, version).days
        assert (day.drifted, day.rejected_share) == (["rejected"], 0.3)


def test_unreadable_reference_does_not_fail_predictions(
    sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    with sessions.begin() as session:
        session.get_one(ModelVersion, champion.id).reference = {"statistics": {"brightness": {"edges": [0.5]}}}
        day_of(session, champion, 0, 60)
        job = builders.make_job(session, JobKind.PREDICT, scans=1)
    rung: list[str] = []
    Dispatcher(settings, sessions, publish=lambda *given: rung.append(given[2])).step()
    assert len(rung) == 1
    with sessions() as session:
        assert rung == [str(unit.id) for unit in builders.units_of(session, job)]


def test_days_with_few_scans_are_pooled_with_earlier_days(sessions: Sessions, champion: ModelVersion) -> None:
    with sessions.begin() as session:
        version = referred(session, champion)
        for ago in (40, 4, 2, 0):
            day_of(session, version, ago, 20, shift=0.5)
        first, second, third = seen(session, version).days
        assert [first.since, second.since] == [None, None], "20 and 40 scans are too few, and 40 days ago is long ago"
        assert first.figures == second.figures == {}
        assert (third.scans, third.since, third.drifted) == (20, first.day, ["brightness"])
        (short,) = seen(session, version, days=1).days
        assert short == third, "the length of the report changes no verdict"


def test_day_with_feedback_only_has_no_verdict(sessions: Sessions, champion: ModelVersion) -> None:
    with sessions.begin() as session:
        version = referred(session, champion)
        day_of(session, version, 1, 200, shift=0.6)
        judged(session, version, "Tumor", "Tumor")
        judged(session, version, "Tumor", "Normal", days_ago=40)
        found = seen(session, version)
    counted, feedback_only = found.days
    assert feedback_only.day - counted.day == dt.timedelta(days=1)
    assert (feedback_only.scans, feedback_only.rejected_share, feedback_only.since, feedback_only.figures) == (
        0,
        None,
        None,
        {},
    )
    assert feedback_only.truths == found.truths == ConfusionCounts(known=1, right=1, positives=1, true_positives=1)
    assert (found.latest, found.drifted) == (counted, True), "the latest day with predictions is the one that counts"


def test_report_without_predictions_has_no_days(sessions: Sessions, champion: ModelVersion) -> None:
    with sessions.begin() as session:
        found = seen(session, champion)
        assert (found.days, found.latest, found.drifted, found.truths) == ([], None, False, ConfusionCounts())


# --- the event ---


def listener(session: Session, tenant_id: str = TENANT) -> uuid.UUID:
    webhook = Webhook(tenant_id=tenant_id, url="https://example.org/", events=["model.drifted"], secret="whsec_x")
    session.add(webhook)
    session.flush()
    return webhook.id


def looked(session: Session) -> None:
    assert drift.check_drift(session, POLICY, after=None) is None


def drift_events(session: Session) -> list[Delivery]:
    return list(session.scalars(select(Delivery).where(Delivery.type == "model.drifted")))


def test_drift_event_is_emitted_once_per_day(
    sessions: Sessions,
    settings: Settings,
    champion: ModelVersion,
) -> None:
    with sessions.begin() as session:
        listener(session)
        listener(session, "elsewhere")
        version = referred(session, champion)
        day_of(session, version, 0, 100)
        looked(session)
        assert drift_events(session) == [], "nothing has drifted"
    with sessions.begin() as session:
        day_of(session, version, 0, 200, shift=0.6)
    dispatcher = Dispatcher(settings, sessions, publish=lambda *_: None)
    dispatcher.step()
    with sessions.begin() as session:
        looked(session)
        (event,) = drift_events(session)
        today = dt.datetime.now(dt.UTC).date()
        assert event.tenant_id == TENANT
        assert event.event_id == f"drift_{version.id}_{today}"
        assert event.data == {"model_version": "1", "day": str(today), "figures": ["brightness"]}


def test_drift_of_other_versions_emits_no_event(
    sessions: Sessions,
    settings: Settings,
    champion: ModelVersion,
) -> None:
    with sessions.begin() as session:
        listener(session)
        version = referred(session, champion)
        version.champion = False
        day_of(session, version, 0, 200, shift=0.6)
        assert seen(session, version).drifted
    Dispatcher(settings, sessions, publish=lambda *_: None).step()
    with sessions() as session:
        assert drift_events(session) == []


@pytest.mark.parametrize("broken", [0, 1])
def test_unreadable_reference_does_not_block_other_champions(
    broken: int, sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    with sessions.begin() as session:
        other = builders.make_model(session, tenant_id="elsewhere")
        for version in (champion, other):
            listener(session, version.tenant_id)
            day_of(session, referred(session, version), 0, 200, shift=0.6)
        ill, well = [(champion, other), (other, champion)][broken]
        ill_id, well_tenant = str(ill.id), well.tenant_id
        session.get_one(ModelVersion, ill.id).reference = {"statistics": {"brightness": {"edges": [0.5]}}}
    with structlog.testing.capture_logs() as logged:
        Dispatcher(settings, sessions, publish=lambda *_: None).step()
    with sessions() as session:
        assert [event.tenant_id for event in drift_events(session)] == [well_tenant]
    complaint = {"event": "drift_check_failed", "model": ill_id, "error": "KeyError"}
    assert complaint | {"log_level": "error"} in logged


def test_queries_of_a_check_do_not_grow_with_the_champions(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    with sessions.begin() as session:
        for number in range(3):
            version = builders.make_model(session, tenant_id=f"tenant-{number}")
            day_of(session, referred(session, version), 0, 200, shift=0.6)
            listener(session, version.tenant_id)
    reads: list[str] = []
    event.listen(sessions.kw["bind"], "before_cursor_execute", lambda *call: reads.append(call[2]))
    monkeypatch.setattr(drift, "CHECKED_AT_ONCE", 2)
    with sessions.begin() as session:
        last = drift.check_drift(session, POLICY)
        assert len([read for read in reads if read.lstrip().startswith("SELECT")]) == 3, "clock, versions, counts"
        assert (last is not None, len(drift_events(session))) == (True, 2)
        assert drift.check_drift(session, POLICY, last) is None
        assert len(drift_events(session)) == 3


def test_drift_check_reads_no_feedback(sessions: Sessions, champion: ModelVersion) -> None:
    with sessions.begin() as session:
        listener(session)
        day_of(session, referred(session, champion), 0, 200, shift=0.6)
    with sessions.begin() as holding, sessions.begin() as session:
        holding.execute(text("LOCK TABLE truths IN ACCESS EXCLUSIVE MODE"))
        session.execute(text("SET LOCAL lock_timeout = '200ms'"))
        looked(session)
        assert len(drift_events(session)) == 1


# --- truths ---


def judged(
    session: Session, version: ModelVersion, label: str, predicted: str, days_ago: int = 0, **more: Any
) -> uuid.UUID:
    """Feedback on a prediction so many days ago. Returns its scan."""
    scan_id = more.pop("scan_id", None) or builders.make_scan(session).id
    then = dt.datetime.now(dt.UTC) - dt.timedelta(days=days_ago)
    row = {"scan_id": scan_id, "label": label, "predicted": predicted, "predicted_at": then, "confidence": 0.9, **more}
    session.execute(insert(feedback.Truth).values(tenant_id=TENANT, model_id=version.id, **row))
    return scan_id


def test_feedback_counts_by_day_of_prediction_and_latest_wins(
    sessions: Sessions,
    champion: ModelVersion,
) -> None:
    today = dt.datetime.now(dt.UTC).date()
    with sessions.begin() as session:
        version = referred(session, champion)
        first = judged(session, version, "Normal", "Tumor")
        judged(session, version, "Tumor", "Tumor", scan_id=first)
        rows = [("Tumor", "Normal", 0), ("Normal", "Normal", 1), ("Normal", "Tumor", 1), ("Normal", "Normal", 1)]
        for label, predicted, ago in [*rows, ("Tumor", "Tumor", 40)]:
            judged(session, version, label, predicted, ago)
        found = feedback.counts_by_day(session, version, today - dt.timedelta(days=29))
    assert found[today] == ConfusionCounts(known=2, right=1, positives=2, true_positives=1)
    assert found[today - dt.timedelta(days=1)] == ConfusionCounts(known=3, right=2, negatives=3, true_negatives=2)
    together = sum(found.values(), ConfusionCounts())
    assert (together.known, together.accuracy, together.sensitivity) == (5, 3 / 5, 1 / 2)
    assert together.specificity == pytest.approx(2 / 3)
    assert (ConfusionCounts().accuracy, ConfusionCounts().sensitivity, ConfusionCounts().specificity) == (
        None,
        None,
        None,
    )


def test_feedback_on_rejected_scans_is_not_counted(sessions: Sessions, champion: ModelVersion) -> None:
    """The class of a rejected scan must not be used, so it is neither right nor wrong."""
    with sessions.begin() as session:
        version = referred(session, champion)
        for disposition, label in ((None, "Tumor"), ("tumor", "Normal"), ("rejected", "Normal"), ("rejected", "Tumor")):
            judged(session, version, label, "Tumor", disposition=disposition)
        judged(session, version, "Tumor", "Tumor", days_ago=1, disposition="rejected")
        found = feedback.counts_by_day(session, version, dt.date(2000, 1, 1))
    assert list(found.values()) == [
        ConfusionCounts(known=2, right=1, positives=1, true_positives=1, negatives=1, true_negatives=0)
    ]


def test_a_new_threshold_is_no_drift_and_begins_its_count_anew(sessions: Sessions, champion: ModelVersion) -> None:
    """All 200 scans of each of four days were called Normal; from two days ago on the reference expects that."""
    today = dt.datetime.now(dt.UTC).date()
    with sessions.begin() as session:
        mine = referred(session, champion)
        for days_ago in (0, 1, 2, 3):
            for what, bin_ in ((CLASS, "Normal"), (DISPOSITION, "normal")):
                day = today - dt.timedelta(days=days_ago)
                key = {"model_id": mine.id, "tenant_id": mine.tenant_id, "what": what, "bin": bin_, "day": day}
                session.add(PredictionCount(**key, scans=200))
        session.flush()
        assert all("class" in day.drifted for day in seen(session, mine).days)
        mine.reference = {**reference(), "classes": {"Normal": 100, "Tumor": 0}}
        mine.reference["decided_since"] = (today - dt.timedelta(days=2)).isoformat()
        days = seen(session, mine).days
    assert [day.drifted for day in days] == [[]] * 4
    assert ["class" in day.figures for day in days] == [False, False, True, True]


def test_days_before_a_new_threshold_are_not_pooled_with_those_after(
    sessions: Sessions, champion: ModelVersion
) -> None:
    today = dt.datetime.now(dt.UTC).date()
    with sessions.begin() as session:
        mine = referred(session, champion)
        day_of(session, mine, 1, POLICY.least_studies)
        day_of(session, mine, 0, POLICY.least_studies // 2)
        assert seen(session, mine).days[-1].since == today - dt.timedelta(days=1)
        mine.reference = {**reference(), "decided_since": (today - dt.timedelta(days=1)).isoformat()}
        assert seen(session, mine).days[-1].since is None
