"""Retention of results: what is deleted, what stays, and what readers get."""

import uuid

import pytest
from sqlalchemy import func, select, text

from jobs.db import Sessions
from jobs.errors import ResultsExpired, WrongState
from jobs.queue import lifecycle, submission
from jobs.queue.explanations import artifact_name
from jobs.results import queries, summary
from jobs.retention import results
from jobs.settings import Settings
from jobs.states import JobKind, JobState
from jobs.storage.blobs import BlobStore
from jobs.tables import Artifact, Job, JobEvent, ScanResult
from tests import builders

SOON = 1e-9
"""Retention time (days) that every ended job has passed."""


def ended(sessions: Sessions, scans: int = 3, failed: int = 0, kind: JobKind = JobKind.PREDICT_BATCH) -> uuid.UUID:
    with sessions.begin() as session:
        job = builders.make_job(session, kind, scans=scans)
        held = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held, failed))
        return job.id


def expire(sessions: Sessions, days: float = SOON, rows: int = results.ROWS) -> bool:
    with sessions.begin() as session:
        return results.expire(session, days, rows)


def left(sessions: Sessions, job_id: uuid.UUID) -> list[int]:
    with sessions() as session:
        mine = select(ScanResult.ordinal).where(ScanResult.job_id == job_id).order_by(ScanResult.ordinal)
        return list(session.scalars(mine))


def job(sessions: Sessions, job_id: uuid.UUID) -> Job:
    with sessions() as session:
        return session.get_one(Job, job_id)


def test_expired_results_are_deleted_and_the_job_stays(sessions: Sessions) -> None:
    job_id = ended(sessions, failed=1)
    before = job(sessions, job_id)
    assert expire(sessions) is False
    after = job(sessions, job_id)
    assert left(sessions, job_id) == []
    assert after.results_expired_at is not None
    for name in ("state", "total", "succeeded", "failed", "model_id", "finished_at", "error"):
        assert getattr(after, name) == getattr(before, name), name
    with sessions() as session:
        types = session.scalars(select(JobEvent.type).where(JobEvent.job_id == job_id).order_by(JobEvent.id)).all()
    assert types == ["submitted", "claimed", "partially_succeeded", "results_expired"]


def test_recent_results_are_kept(sessions: Sessions) -> None:
    recent, running = ended(sessions), ended(sessions)
    with sessions.begin() as session:
        running = builders.make_job(session, JobKind.PREDICT_BATCH, JobState.RUNNING, scans=2).id
        training = builders.make_job(session, state=JobState.SUCCEEDED).id
    assert expire(sessions, days=1) is False
    assert len(left(sessions, recent)) == 3
    expire(sessions)
    assert (left(sessions, recent), left(sessions, running)) == ([], [0, 1])
    assert job(sessions, training).results_expired_at is None


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
def test_results_of_failed_predictions_expire(sessions: Sessions, state: JobState) -> None:
    with sessions.begin() as session:
        job_id = builders.make_job(session, JobKind.PREDICT, state, scans=1).id
    expire(sessions)
    assert left(sessions, job_id) == []
    assert job(sessions, job_id).state == state


def explained(sessions: Sessions, scans: int = 3) -> uuid.UUID:
    """An ended job with explanations of its scans, and two other artifacts."""
    job_id = ended(sessions, scans)
    with sessions.begin() as session:
        for name in (*map(artifact_name, range(scans)), "explanations.txt", "report.html"):
            blob = {"sha256": "a" * 64, "size": 1, "media_type": "image/png"}
            session.add(Artifact(job_id=job_id, name=name, tenant_id=builders.TENANT, **blob))
    return job_id


def test_explanations_expire_and_other_artifacts_stay(sessions: Sessions) -> None:
    explained(sessions)
    while expire(sessions, rows=2):
        pass
    with sessions() as session:
        assert session.scalars(select(Artifact.name).order_by(Artifact.name)).all() == [
            "explanations.txt",
            "report.html",
        ]


def test_explanations_are_listed_all_or_none(sessions: Sessions) -> None:
    job_id = explained(sessions)
    with sessions() as session:
        assert len(queries.artifacts(session, job_id).data) == 5
    expire(sessions, rows=5)
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Artifact)) == 3
        assert [row.name for row in queries.artifacts(session, job_id).data] == ["explanations.txt", "report.html"]
        with pytest.raises(ResultsExpired):  # all of them are gone, and the job is not marked yet
            queries.results(session, queries.job(session, builders.TENANT, job_id))


def test_batch_of_deletions_is_bounded_and_ordered(sessions: Sessions) -> None:
    first, second = ended(sessions, 5), ended(sessions, 5)
    assert expire(sessions, rows=3) is True
    assert (left(sessions, first), len(left(sessions, second))) == ([3, 4], 5)
    assert expire(sessions, rows=3) is True
    assert (left(sessions, first), left(sessions, second)) == ([], [1, 2, 3, 4])
    assert job(sessions, first).results_expired_at is not None
    assert job(sessions, second).results_expired_at is None
    while expire(sessions, rows=3):
        pass
    assert left(sessions, second) == []
    with sessions() as session:
        assert session.scalar(select(func.count()).where(JobEvent.type == "results_expired")) == 2


def test_batch_of_deletions_is_bounded_in_jobs(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "JOBS", 2)
    jobs = [ended(sessions, 1, kind=JobKind.PREDICT) for _ in range(3)]
    assert expire(sessions) is True
    assert [len(left(sessions, each)) for each in jobs] == [0, 0, 1]
    assert expire(sessions) is False
    assert left(sessions, jobs[2]) == []


def test_partly_deleted_results_read_as_expired(sessions: Sessions) -> None:
    job_id = ended(sessions, 4, failed=2)
    with sessions() as session:
        view = queries.job(session, builders.TENANT, job_id)
        assert len(queries.results(session, view).data) == 4
        expire(sessions, rows=1)
        for read in (queries.results, summary.summary):
            with pytest.raises(ResultsExpired, match="RENALQ_RESULTS_DAYS"):
                read(session, view)
        with pytest.raises(WrongState, match="expired"):
            submission.retry(session, builders.TENANT, job_id)


def test_retry_made_before_expiry_is_still_returned(sessions: Sessions) -> None:
    job_id = ended(sessions, 2, failed=1)
    with sessions.begin() as session:
        new = submission.retry(session, builders.TENANT, job_id).id
    expire(sessions)
    with sessions.begin() as session:
        assert submission.retry(session, builders.TENANT, job_id).id == new


def test_two_dispatchers_expire_different_jobs(sessions: Sessions) -> None:
    first, second = ended(sessions), ended(sessions)
    with sessions.begin() as one:
        one.execute(text("SELECT FROM jobs WHERE id = :id FOR NO KEY UPDATE"), {"id": first})
        expire(sessions)
        assert (len(left(sessions, first)), left(sessions, second)) == (3, [])
    expire(sessions)
    assert left(sessions, first) == []


@pytest.mark.parametrize(
    ("days", "kept"),
    [({}, 3), ({"results_days": 30}, 3), ({"results_days": SOON}, 0), ({"results_days": 30, "job_days": SOON}, 0)],
)
def test_results_expire_by_the_settings(
    sessions: Sessions, settings: Settings, days: dict[str, float], kept: int
) -> None:
    """A job is deleted after its results, so these go with whichever of the two comes first."""
    job_id = ended(sessions)
    assert results.step(sessions, BlobStore(settings.artifacts), settings.model_copy(update=days)) is False
    assert len(left(sessions, job_id)) == kept
