"""Slices become studies: which belong together, in what order, and what is answered for them."""

import uuid
from dataclasses import dataclass, replace
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from jobs.db import NOW, Sessions
from jobs.errors import NoResults, QuotaExceeded, StudyNotFound
from jobs.queue import lifecycle, submission
from jobs.queue.outcomes import ScanOutcome
from jobs.queue.submission import NewJob, NewResult, Quota, submit
from jobs.results import queries, scan_registry, studies
from jobs.results.cache import cached_results
from jobs.results.job_filter import JobFilter
from jobs.results.study_answers import StudyAnswer, StudyPolicy, answer_of, in_order
from jobs.settings import Settings
from jobs.states import JobKind, Lane
from jobs.tables import Job, Json, ModelVersion, ScanResult, Unit
from ml.spec.pooling import Pooling
from tests import builders
from tests.builders import BROKEN, TENANT
from tests.plans import most_rows

SURE = StudyPolicy(("Tumor",), Pooling("max", 1), 0.3, 0.7)


@dataclass(frozen=True)
class Slice:
    """A row of `scan_results`, as far as answers read it."""

    ordinal: int = 0
    probability: float | None = 0.1
    identity: Json | None = None
    state: str = "succeeded"
    disposition: str | None = "normal"
    reason: str | None = None
    error: Json | None = None
    frame: int | None = None
    custom_id: str | None = None
    patient: str | None = None
    study: str | None = None

    @property
    def probabilities(self) -> dict[str, float] | None:
        """As a network gives them."""
        return None if self.probability is None else {"Normal": 1 - self.probability, "Tumor": self.probability}


def answered(*slices: Slice, policy: StudyPolicy = SURE) -> StudyAnswer:
    """The answer of these slices."""
    return answer_of(Job(), [replace(one, ordinal=number) for number, one in enumerate(slices)], policy)


LOST = Slice(probability=None, state="failed", disposition=None, error=BROKEN)
FOREIGN = Slice(0, 0.99, disposition="rejected", reason="Its modality is MR.")
DISPOSITIONS: dict[str, tuple[list[Slice], str, str | None]] = {
    "one positive slice": ([Slice(probability=p) for p in (0.1, 0.9, 0.2)], "tumor", None),
    "no positive slice": ([Slice(probability=p) for p in (0.1, 0.2, 0.05)], "normal", None),
    "between": ([Slice(probability=p) for p in (0.1, 0.5)], "indeterminate", "The network is unsure: Tumor has 0.50."),
    "a rejected slice decides nothing": ([FOREIGN, Slice(), Slice()], "normal", None),
    "all rejected": ([FOREIGN] * 2, "rejected", "None of its 2 slices can be used. Most often: Its modality is MR."),
    "all failed": ([LOST] * 3, "rejected", "None of its 3 slices can be used. Most often: It broke."),
    "most failed": (
        [LOST, LOST, Slice()],
        "indeterminate",
        "Only 1 of its 3 slices could be used: look at the others yourself.",
    ),
    "half failed": ([LOST, Slice()], "normal", None),
}


@pytest.mark.parametrize(("slices", "disposition", "reason"), DISPOSITIONS.values(), ids=DISPOSITIONS)
def test_what_may_be_done_with_an_answer(slices: list[Slice], disposition: str, reason: str | None) -> None:
    found = answered(*slices)
    assert (found.disposition, found.reason) == (disposition, reason)
    assert found.slices == len(slices)
    assert found.used + found.rejected + found.failed == len(slices)


def test_an_answer_that_threshold_and_limits_judge_differently_is_indeterminate() -> None:
    low, high = (replace(SURE, pooling=Pooling("max", 1, threshold)) for threshold in (0.1, 0.9))
    sensitive, specific = (answered(Slice(probability=p), policy=q) for p, q in ((0.2, low), (0.8, high)))
    assert (sensitive.label, sensitive.disposition) == ("Tumor", "indeterminate")
    assert (specific.label, specific.disposition) == ("Normal", "indeterminate")


def test_a_model_that_names_no_finding_answers_by_the_mean_and_needs_to_be_sure() -> None:
    policy = replace(SURE, positive=())
    assert answered(Slice(probability=0.95), Slice(probability=0.1), policy=policy).disposition == "indeterminate"
    assert answered(Slice(probability=0.1), Slice(probability=0.1), policy=policy).disposition == "normal"


def test_the_deciding_slices_are_named() -> None:
    slices = [Slice(probability=p, identity={"sop_uid": f"1.{n}"}) for n, p in enumerate((0.2, 0.9, 0.8, 0.1))]
    found = answered(*slices, policy=replace(SURE, pooling=Pooling("top", 2)))
    assert [(one["ordinal"], one["sop_uid"]) for one in found.deciding] == [(1, "1.1"), (2, "1.2")]
    assert found.confidence == pytest.approx(0.85)


def placed(*places: tuple[str, float | None, int | None]) -> list[Slice]:
    """Slices of (series, position, InstanceNumber)."""
    named = ("series_uid", "position_mm", "instance_number")
    return [Slice(n, identity=dict(zip(named, place, strict=True))) for n, place in enumerate(places)]


ORDERS: dict[str, tuple[list[Slice], list[int]]] = {
    "by position, whatever the numbers say": (placed(("a", 20, 1), ("a", -5, 2), ("a", 10, 3)), [1, 2, 0]),
    "by number where one has no position": (placed(("a", 20, 3), ("a", None, 1), ("a", 10, 2)), [1, 2, 0]),
    "series after series": (placed(("b", 2, 1), ("a", 1, 1), ("b", 1, 1), ("a", 0, 1)), [2, 0, 3, 1]),
    "by number at one position": (placed(("a", 1, 9), ("a", 1, 2)), [1, 0]),
    "without a number last": (placed(("a", None, None), ("a", None, 2)), [1, 0]),
    "by frame": ([Slice(0, frame=2), Slice(1, frame=0), Slice(2, frame=1)], [1, 2, 0]),
    "as they came": ([Slice(0), Slice(1)], [0, 1]),
}


@pytest.mark.parametrize(("slices", "right"), ORDERS.values(), ids=ORDERS)
def test_slices_are_put_in_order(slices: list[Slice], right: list[int]) -> None:
    assert [one.ordinal for one in in_order(slices)] == right


# --- in the database ---


def batch(session: Session, model: ModelVersion, given: list[tuple[Json, Any]], **new: Any) -> Job:
    """An ended batch of scans with these fields of the client's, and their identities; None: the scan failed."""
    scans = [NewResult(builders.make_scan(session, new.get("tenant_id", TENANT)).id, **own) for own, _ in given]
    named: Json = {"tenant_id": TENANT, "model_id": model.id, **new}
    job = submit(session, NewJob(kind=JobKind.PREDICT_BATCH, lane=Lane.BATCH, **named), scans)
    (unit,) = builders.units_of(session, job)
    held = builders.claim(session, unit)
    good = builders.outcomes_of(session, held)
    outcomes = [
        ScanOutcome(one.ordinal, error=BROKEN) if identity is None else replace(one, identity=identity)
        for one, (_, identity) in zip(good, given, strict=True)
    ]
    lifecycle.succeed(session, held, outcomes=outcomes)
    session.refresh(job)
    return job


GIVEN: list[tuple[Json, Any]] = [
    ({}, {"study_uid": "1.1", "patient_hash": "p"}),
    ({}, {"study_uid": "1.2", "patient_hash": "p"}),
    ({}, {"study_uid": "1.1", "patient_hash": "p"}),
    ({"study": "ct-9", "patient": "p"}, {}),
    ({"study": "ct-9"}, {"study_uid": "1.7"}),
    ({}, {}),
    ({}, None),
]


def answers(session: Session, job: Job, **options: Any) -> list[StudyAnswer]:
    """All of them."""
    view = queries.job(session, job.tenant_id, job.id)
    return list(studies.studies(session, view, Settings(), **options).data)


def test_what_belongs_together_is_one_study(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = batch(session, builders.make_model(session), GIVEN)
        found = answers(session, job)
        assert [one.ordinals for one in found] == [[0, 2], [1], [3, 4], [5]], "the broken file is no study"
        assert [(one.study_uid, one.study) for one in found] == [
            ("1.1", None),
            ("1.2", None),
            ("1.7", "ct-9"),
            (None, None),
        ]


def test_what_belongs_to_a_patient_is_one_answer(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = batch(session, builders.make_model(session), GIVEN)
        found = answers(session, job, by="patient")
        assert [(one.patient, one.ordinals) for one in found] == [("p", [0, 1, 2, 3]), (None, [4]), (None, [5])]
        assert (found[0].study_uid, found[0].study_uids) == (None, ["1.1", "1.2"])


def test_pages_show_each_study_once(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    with sessions.begin() as session:
        job = batch(session, builders.make_model(session), GIVEN)
        view, after, seen = queries.job(session, TENANT, job.id), None, []
        for _ in range(4):
            page = studies.studies(session, view, Settings(), limit=1, after=after)
            seen += [one.first for one in page.data]
            after = int(page.next) if page.next else None
        assert (seen, after, page.has_more) == ([0, 1, 3, 5], None, False)
        assert studies.dispositions(session, view, Settings()) == {"tumor": 4}
        monkeypatch.setattr(studies, "MOST_COUNTED", 6)
        assert studies.dispositions(session, view, Settings()) is None


def test_a_running_prediction_has_no_answers_yet_and_a_training_none_at_all(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=2)
        page = studies.studies(session, queries.job(session, TENANT, job.id), Settings())
        assert (page.data, page.has_more, page.next) == ([], True, "-1")
        with pytest.raises(NoResults):
            studies.studies(session, queries.job(session, TENANT, builders.make_job(session).id), Settings())


def test_a_study_is_found_by_its_uid_by_its_owner_alone(sessions: Sessions) -> None:
    with sessions.begin() as session:
        model = builders.make_model(session)
        jobs = [batch(session, model, GIVEN) for _ in range(3)]
        found = studies.of_uid(session, TENANT, "1.1", Settings(), limit=2)
        assert [one.job.id for one in found.data] == [jobs[2].id, jobs[1].id]
        rest = studies.of_uid(session, TENANT, "1.1", Settings(), limit=2, after=uuid.UUID(found.next))
        assert [(one.job.id, one.ordinals) for one in rest.data] == [(jobs[0].id, [0, 2])]
        for tenant, uid in (("elsewhere", "1.1"), (TENANT, "1.3")):
            with pytest.raises(StudyNotFound):
                studies.of_uid(session, tenant, uid, Settings())


def test_jobs_are_found_by_the_clients_id_of_a_scan(sessions: Sessions) -> None:
    with sessions.begin() as session:
        model = builders.make_model(session)
        first = batch(session, model, [({"custom_id": "acc-1"}, {}), ({"custom_id": "acc-2"}, {})])
        second = batch(session, model, [({"custom_id": "acc-1"}, {}), ({"custom_id": "acc-1"}, {})])
        for custom_id, right in (("acc-1", [second, first]), ("acc-2", [first]), ("acc", [])):
            found = queries.jobs(session, TENANT, JobFilter(custom_id=custom_id), 10, None)
            assert [view.job.id for view in found.data] == [job.id for job in right]
        assert queries.jobs(session, "elsewhere", JobFilter(custom_id="acc-1"), 10, None).data == []


# --- frames ---


def test_a_file_of_several_frames_becomes_a_result_for_each(sessions: Sessions) -> None:
    with sessions.begin() as session:
        scan, other = builders.make_scan(session), builders.make_scan(session)
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH)
        job = submit(session, new, [NewResult(scan.id, "a.dcm", "own", frames=3), NewResult(other.id)], 2)
        rows = session.execute(
            select(ScanResult.scan_id, ScanResult.frame, ScanResult.custom_id, Unit.ordinal)
            .join(Unit, Unit.id == ScanResult.unit_id)
            .where(ScanResult.job_id == job.id)
            .order_by(ScanResult.ordinal)
        )
        assert job.total == 4
        frames = [(scan.id, frame, "own", unit) for frame, unit in ((0, 0), (1, 0), (2, 1))]
        assert [tuple(row) for row in rows] == [*frames, (other.id, None, None, 1)]


def test_frames_count_against_the_quota_before_they_are_rows(sessions: Sessions) -> None:
    with sessions.begin() as session:
        scan = NewResult(builders.make_scan(session).id, frames=10**9)
        with pytest.raises(QuotaExceeded):
            submit(session, NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH), [scan] * 3, quota=Quota(scans=1000))


def test_a_retry_repeats_the_frames_that_failed(sessions: Sessions) -> None:
    with sessions.begin() as session:
        scan = builders.make_scan(session)
        job = submit(session, NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH), [NewResult(scan.id, frames=3)])
        held = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held, failed=2))
        session.expire_all()
        again = submission.retry(session, TENANT, job.id)
        rows = session.scalars(
            select(ScanResult.frame).where(ScanResult.job_id == again.id).order_by(ScanResult.ordinal)
        )
        assert list(rows) == [0, 1]


def test_a_scan_that_was_stored_before_frames_were_counted_is_one(sessions: Sessions) -> None:
    with sessions.begin() as session:
        old, new = builders.make_scan(session), builders.make_scan(session)
        new.frames = 20
        session.flush()
        assert scan_registry.frames(session, TENANT, [old.id, new.id]) == {old.id: 1, new.id: 20}


def test_results_of_before_identities_were_read_are_not_reused(sessions: Sessions) -> None:
    """They would stand in no study. What writes them here is an earlier release's worker."""
    with sessions.begin() as session:
        model = builders.make_model(session)
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=2, model_id=model.id)
        ids = list(session.scalars(select(ScanResult.scan_id).where(ScanResult.job_id == job.id)))
        earlier = {"state": "succeeded", "label": "Tumor", "engine": "torch-fp32", "finished_at": NOW}
        rows = update(ScanResult).where(ScanResult.job_id == job.id)
        session.execute(rows.where(ScanResult.scan_id == ids[0]).values(**earlier))
        session.execute(rows.where(ScanResult.scan_id == ids[1]).values(**earlier, identity={}))
        assert list(cached_results(session, model.id, "torch-fp32", ids)) == [(ids[1], None)]


def test_finding_a_study_or_a_clients_id_reads_what_it_finds(sessions: Sessions) -> None:
    with sessions.begin() as session:
        model = builders.make_model(session)
        for number in range(30):
            own = [({"custom_id": f"acc-{number}-{one}"}, {"study_uid": f"1.{number}"}) for one in range(30)]
            batch(session, model, own)

        def by_custom_id(session: Session) -> None:
            assert len(queries.jobs(session, TENANT, JobFilter(custom_id="acc-7-3"), 10, None).data) == 1

        def by_uid(session: Session) -> None:
            assert studies.of_uid(session, TENANT, "1.7", Settings()).data[0].slices == 30

        most = [most_rows(session, find) for find in (by_custom_id, by_uid)]
        assert max(most) < 100, "of 900 results; all 31 jobs lie on a page"
