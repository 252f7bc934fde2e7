"""A thread that does what a worker would, for tests in which somebody waits for an answer."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from sqlalchemy import select

from jobs.db import Sessions
from jobs.queue import lifecycle
from jobs.queue.leases import Claim
from jobs.queue.outcomes import ScanOutcome
from jobs.states import JobState
from jobs.tables import Job
from tests import builders
from tests.processes import eventually

Outcomes = Callable[[list[int]], list[ScanOutcome]]


def tumors(ordinals: list[int]) -> list[ScanOutcome]:
    """Each scan shows a tumor, a little less surely than the one before."""
    sure = [0.94563 - 0.1 * number for number in range(len(ordinals))]
    return [
        ScanOutcome(ordinal, "Tumor", share, {"Normal": 1 - share, "Tumor": share}, "torch-fp32")
        for ordinal, share in zip(ordinals, sure, strict=True)
    ]


@contextmanager
def worker(
    sessions: Sessions, outcomes: Outcomes = tumors, before: Callable[[Claim], None] = lambda held: None
) -> Iterator[None]:
    """Meanwhile the newest job is done, or the first that comes; `before` is called with its unit claimed. What fails
    in here fails the test."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(_work, sessions, outcomes, before)
        try:
            yield
        finally:
            done.result()


def _work(sessions: Sessions, outcomes: Outcomes, before: Callable[[Claim], None]) -> None:
    held = _claimed(sessions)
    before(held)
    with sessions.begin() as session:
        ordinals = [outcome.ordinal for outcome in builders.outcomes_of(session, held)]
        lifecycle.succeed(session, held, outcomes=outcomes(ordinals))


def _claimed(sessions: Sessions) -> Claim:
    def queued() -> Job | None:
        with sessions() as session:
            return session.scalar(select(Job).where(Job.state == JobState.QUEUED).order_by(Job.id.desc()))

    job = eventually(queued, 20)
    with sessions.begin() as session:
        (unit,) = builders.units_of(session, session.get_one(Job, job.id))
        return builders.claim(session, unit)
