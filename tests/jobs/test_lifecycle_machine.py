"""The lifecycle's SQL against a model: hypothesis searches for a series of transitions after which they disagree.

The model is what the docs promise, in plain Python; the checker looks at the database after every step. A second test
runs random transitions in threads: whichever wins, the database must stay consistent.
"""

import random
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from jobs.db import NOW, Sessions
from jobs.errors import LeaseLost, WrongState
from jobs.queue import completion, dispatch, leases, lifecycle, reaping, submission
from jobs.queue.leases import Claim
from jobs.queue.lifecycle import RetryPolicy
from jobs.queue.outcomes import ScanOutcome
from jobs.states import TERMINAL, UNIT_TERMINAL, JobKind, Lane
from jobs.tables import Job, ScanResult, Unit
from tests.builders import BROKEN, TENANT, make_job
from tests.depth import depth
from tests.jobs.checker import faults

RETRY = RetryPolicy(max_failures=3)
RETRY_LATER = RetryPolicy(max_failures=3, base=1e-9)
INLINE_ROWS = 8
"""Scans that `cancel` ends itself; the rest is left to the leader."""
SHAKY = {"code": "INTERNAL", "detail": "It may go well another time.", "retryable": True}
KINDS = st.sampled_from([JobKind.TRAIN, JobKind.PREDICT_BATCH])
SHARE = st.floats(0, 1)
PICK = st.randoms(use_true_random=False)


@dataclass
class ModelUnit:
    """A unit according to the documentation."""

    job_id: uuid.UUID
    state: str = "queued"
    failures: int = 0
    fence: int | None = None
    pending: set[int] = field(default_factory=set)


@dataclass
class ModelJob:
    """A job according to the documentation."""

    kind: JobKind
    total: int
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    cancel_requested: bool = False

    def state(self, units: list[ModelUnit]) -> str | None:
        """Its final state; None while a unit has not ended."""
        if any(unit.state not in UNIT_TERMINAL for unit in units):
            return None
        if self.succeeded == self.total:
            return "succeeded"
        if self.cancel_requested and self.cancelled:
            return "cancelled"
        return "failed" if self.succeeded == 0 else "partially_succeeded"


class Lifecycle(RuleBasedStateMachine):
    """Transitions in any order, by current and by stale workers."""

    sessions: Sessions

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[uuid.UUID, ModelJob] = {}
        self.units: dict[uuid.UUID, ModelUnit] = {}
        self.claims: list[Claim] = []
        with self.sessions.begin() as session:
            session.execute(text("TRUNCATE jobs, units, scan_results, job_events, tenant_loads, scans CASCADE"))

    # --- rules ---

    @rule(kind=KINDS, scans=st.integers(1, 20), chunk=st.sampled_from([1, 4, 20]))
    def submit(self, kind: JobKind, scans: int, chunk: int) -> None:
        with self.sessions.begin() as session:
            job = make_job(session, kind, scans=scans if kind == JobKind.PREDICT_BATCH else 0, chunk=chunk)
            self.jobs[job.id] = ModelJob(kind, job.total)
            self._learn_units(session, job.id)

    @rule(promise=st.booleans())
    def ring(self, promise: bool) -> None:
        with self.sessions.begin() as session:
            waiting = dispatch.QueueReader().read(session, 15, 15).waiting
            new = [unit.unit_id for unit in waiting if not unit.overdue]
            if promise:
                dispatch.reserve(session, new)
            else:
                dispatch.dispatch(session, new, 15)
        for unit_id in new:
            assert self.units[unit_id].state in ("queued", "dispatched")
            assert not self.jobs[self.units[unit_id].job_id].cancel_requested
            self.units[unit_id].state = "dispatched"

    @rule()
    def enqueue_due(self) -> None:
        scheduled = [unit for unit in self.units.values() if unit.state == "scheduled"]
        with self.sessions.begin() as session:
            assert len(lifecycle.enqueue_due(session)) == len(scheduled)
        for unit in scheduled:
            unit.state = "queued"

    @rule()
    def end_cancelled(self) -> None:
        _end_cancelled(self.sessions)
        for job_id, job in self.jobs.items():
            if job.cancel_requested:
                self._cancel_waiting(job_id)

    @precondition(lambda self: self.units)
    @rule(pick=PICK)
    def claim(self, pick: random.Random) -> None:
        unit_id = pick.choice(list(self.units))
        unit = self.units[unit_id]
        with self.sessions.begin() as session:
            held = leases.claim(session, unit_id, "worker", 45)
        free = unit.state in ("queued", "dispatched") and not self.jobs[unit.job_id].cancel_requested
        assert (held is not None) == free
        self._remember(held)

    @rule()
    def claim_next(self) -> None:
        with self.sessions.begin() as session:
            held = leases.claim_next(session, Lane.BATCH, "worker", 45)
        if held is not None:
            assert self.units[held.unit_id].state == "dispatched"
        self._remember(held)

    @precondition(lambda self: self.claims)
    @rule(pick=PICK)
    def beat(self, pick: random.Random) -> None:
        held = pick.choice(self.claims)
        with self.sessions.begin() as session:
            assert leases.beat(session, held, 45).held == self._is_current(held)
            standing = leases.poll_status(session, held)
        wanted = self._is_current(held) and self.jobs[held.job_id].cancel_requested
        assert (standing.held, standing.cancel_requested) == (self._is_current(held), wanted)

    @precondition(lambda self: self.claims)
    @rule(pick=PICK, good=SHARE)
    def succeed(self, pick: random.Random, good: float) -> None:
        held = pick.choice(self.claims)
        ordinals = sorted(self.units[held.unit_id].pending)
        cut = int(good * len(ordinals))
        outcomes = [_good(o) for o in ordinals[:cut]] + [ScanOutcome(o, error=BROKEN) for o in ordinals[cut:]]
        if self._write(held, lambda session: lifecycle.succeed(session, held, outcomes=outcomes)):
            job = self.jobs[held.job_id]
            self._end_unit(held, "succeeded")
            job.succeeded += cut if ordinals else 1
            job.failed += len(ordinals) - cut

    @precondition(lambda self: self.claims)
    @rule(pick=PICK, done=SHARE, retryable=st.booleans(), later=st.booleans())
    def fail(self, pick: random.Random, done: float, retryable: bool, later: bool) -> None:
        held = pick.choice(self.claims)
        outcomes = self._part(held, done)
        error, policy = SHAKY if retryable else BROKEN, RETRY_LATER if later else RETRY
        if self._write(held, lambda session: lifecycle.fail(session, held, error, policy, outcomes)):
            self._take(held, outcomes)
            self._failed(held, retryable, later)

    @precondition(lambda self: self.claims)
    @rule(pick=PICK, progress=st.sampled_from([None, 0.5]))
    def report(self, pick: random.Random, progress: float | None) -> None:
        held = pick.choice(self.claims)
        self._write(held, lambda session: lifecycle.report(session, held, progress=progress))

    @precondition(lambda self: self.claims)
    @rule(pick=PICK, done=SHARE)
    def drain(self, pick: random.Random, done: float) -> None:
        held = pick.choice(self.claims)
        outcomes = self._part(held, done)
        if self._write(held, lambda session: lifecycle.requeue(session, held, "DRAINED", outcomes)):
            self._take(held, outcomes)
            self._hand_back(held)

    @precondition(lambda self: self.claims)
    @rule(pick=PICK, done=SHARE)
    def stop_because_cancelled(self, pick: random.Random, done: float) -> None:
        held = pick.choice(self.claims)
        if not self.jobs[held.job_id].cancel_requested:
            return
        outcomes = self._part(held, done)
        if self._write(held, lambda session: lifecycle.confirm_cancel(session, held, outcomes)):
            self._take(held, outcomes)
            self._cancel_unit(held.unit_id)

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK)
    def cancel(self, pick: random.Random) -> None:
        job_id = pick.choice(list(self.jobs))
        job = self.jobs[job_id]
        ended = job.state(self._units_of(job_id))
        try:
            with self.sessions.begin() as session:
                lifecycle.cancel(session, TENANT, job_id)
        except WrongState:
            assert ended not in (None, "cancelled")
            return
        assert ended in (None, "cancelled")
        if ended is None:
            first, job.cancel_requested = not job.cancel_requested, True
            if first and job.total - job.succeeded - job.failed <= INLINE_ROWS:
                self._cancel_waiting(job_id)

    @precondition(lambda self: any(unit.state == "running" for unit in self.units.values()))
    @rule(pick=PICK)
    def lose_the_worker(self, pick: random.Random) -> None:
        unit_id = pick.choice([id_ for id_, unit in self.units.items() if unit.state == "running"])
        with self.sessions.begin() as session:
            over = update(Unit).where(Unit.id == unit_id).values(lease_expires_at=NOW - text("interval '1 s'"))
            session.execute(over)
        with self.sessions.begin() as session:
            assert reaping.reap(session, retry=RETRY, stall=900) == 1
            assert reaping.reap(session, retry=RETRY, stall=900) == 0
        unit = self.units[unit_id]
        held = Claim(unit_id, unit.job_id, TENANT, self.jobs[unit.job_id].kind, 0, unit.fence or 0, "worker")
        if self.jobs[unit.job_id].cancel_requested:
            self._cancel_unit(unit_id)
        else:
            self._failed(held, retryable=True)

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK)
    def retry(self, pick: random.Random) -> None:
        job_id = pick.choice(list(self.jobs))
        ended = self.jobs[job_id].state(self._units_of(job_id))
        try:
            with self.sessions.begin() as session:
                again = submission.retry(session, TENANT, job_id, chunk=4)
                if again.id not in self.jobs:
                    self.jobs[again.id] = ModelJob(JobKind(again.kind), again.total)
                    self._learn_units(session, again.id)
        except WrongState:
            assert ended in (None, "succeeded")
        else:
            assert ended not in (None, "succeeded")

    # --- what must hold after each ---

    @invariant()
    def database_and_model_agree(self) -> None:
        with self.sessions() as session:
            assert faults(session) == []
            for row in session.execute(select(Unit.id, Unit.state, Unit.failures)):
                model = self.units[row.id]
                assert (row.state, row.failures) == (model.state, model.failures)
            for job in session.scalars(select(Job)):
                self._compare(job)

    def _compare(self, job: Job) -> None:
        model = self.jobs[job.id]
        counts = model.total, model.succeeded, model.failed, model.cancelled
        assert (job.total, job.succeeded, job.failed, job.cancelled) == counts
        end = model.state(self._units_of(job.id))
        assert job.state == end if end else job.state in ("queued", "running")

    # --- the model's own moves ---

    def _learn_units(self, session: Session, job_id: uuid.UUID) -> None:
        pending = func.array_agg(ScanResult.ordinal).filter(ScanResult.state == "pending")
        rows = session.execute(
            select(Unit.id, Unit.failures, pending.label("pending"))
            .join(ScanResult, ScanResult.unit_id == Unit.id, isouter=True)
            .where(Unit.job_id == job_id, Unit.state == "queued")
            .group_by(Unit.id)
        )
        for row in rows:
            self.units[row.id] = ModelUnit(job_id, failures=row.failures, pending=set(row.pending or ()))

    def _units_of(self, job_id: uuid.UUID) -> list[ModelUnit]:
        return [unit for unit in self.units.values() if unit.job_id == job_id]

    def _remember(self, held: Claim | None) -> None:
        if held is not None:
            self.units[held.unit_id].state = "running"
            self.units[held.unit_id].fence = held.fence
            self.claims.append(held)

    def _is_current(self, held: Claim) -> bool:
        unit = self.units[held.unit_id]
        return unit.state == "running" and unit.fence == held.fence

    def _write(self, held: Claim, verb: object) -> bool:
        """Whether the write succeeded: exactly if the claim is current."""
        try:
            with self.sessions.begin() as session:
                verb(session)  # type: ignore[operator]
        except LeaseLost:
            assert not self._is_current(held)
            return False
        assert self._is_current(held)
        return True

    def _part(self, held: Claim, share: float) -> list[ScanOutcome]:
        ordinals = sorted(self.units[held.unit_id].pending)
        return [_good(ordinal) for ordinal in ordinals[: int(share * max(0, len(ordinals) - 1))]]

    def _take(self, held: Claim, outcomes: list[ScanOutcome]) -> None:
        self.units[held.unit_id].pending -= {outcome.ordinal for outcome in outcomes}
        self.jobs[held.job_id].succeeded += len(outcomes)

    def _end_unit(self, held: Claim, state: str) -> None:
        self.units[held.unit_id].state = state
        self.units[held.unit_id].pending = set()

    def _failed(self, held: Claim, retryable: bool, later: bool = False) -> None:
        unit, job = self.units[held.unit_id], self.jobs[held.job_id]
        unit.failures += 1
        if not retryable or unit.failures >= RETRY.max_failures:
            job.failed += len(unit.pending) or (1 if job.kind == JobKind.TRAIN else 0)
            self._end_unit(held, "failed")
        elif unit.failures == RETRY.max_failures - 1 and len(unit.pending) > 1:
            self._split(held, later)
        else:
            self._hand_back(held, later)

    def _split(self, held: Claim, later: bool) -> None:
        """The parts hold the unit's scans, each once. If the job was cancelled, all have ended."""
        before = self.units.pop(held.unit_id)
        with self.sessions() as session:
            of_job = session.execute(select(Unit.id, Unit.state, Unit.failures).where(Unit.job_id == held.job_id)).all()
            parts = [row for row in of_job if row.id not in self.units]
            held_by = {
                row.id: set(session.scalars(select(ScanResult.ordinal).where(ScanResult.unit_id == row.id)))
                for row in parts
            }
        assert set().union(*held_by.values()) >= before.pending
        assert sum(len(ordinals & before.pending) for ordinals in held_by.values()) == len(before.pending)
        for row in parts:
            pending = held_by[row.id] & before.pending
            self.units[row.id] = ModelUnit(held.job_id, failures=row.failures, pending=pending)
            assert row.failures == RETRY.max_failures - 2
            if later and row.id == held.unit_id:
                self.units[row.id].state = "scheduled"
        if self.jobs[held.job_id].cancel_requested:
            self._cancel_waiting(held.job_id)

    def _hand_back(self, held: Claim, later: bool = False) -> None:
        self.units[held.unit_id].state = "scheduled" if later else "queued"
        if self.jobs[held.job_id].cancel_requested:
            self._cancel_waiting(held.job_id)

    def _cancel_waiting(self, job_id: uuid.UUID) -> None:
        for unit_id, unit in self.units.items():
            if unit.job_id == job_id and unit.state in ("scheduled", "queued", "dispatched"):
                self._cancel_unit(unit_id)

    def _cancel_unit(self, unit_id: uuid.UUID) -> None:
        unit = self.units[unit_id]
        job = self.jobs[unit.job_id]
        job.cancelled += len(unit.pending) if job.kind != JobKind.TRAIN else 1
        unit.state, unit.pending = "cancelled", set()


def _good(ordinal: int) -> ScanOutcome:
    return ScanOutcome(ordinal, "Tumor", 0.9, {"Normal": 0.1, "Tumor": 0.9})


def test_transitions_match_the_model(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "INLINE_ROWS", INLINE_ROWS)
    monkeypatch.setattr(completion, "BATCH_ROWS", 3)
    machine = type("Machine", (Lifecycle,), {"sessions": sessions})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=depth(12, 300), stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# --- many at once ---


@settings(max_examples=depth(4, 60), deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_concurrent_transitions_keep_the_database_consistent(sessions: Sessions, seed: int) -> None:
    """Six workers, two dispatchers, a reaper, a canceller and a leader do random things to the same jobs at once."""
    with sessions.begin() as session:
        session.execute(text("TRUNCATE jobs, units, scan_results, job_events, tenant_loads, scans CASCADE"))
        for number in range(6):
            kind = JobKind.TRAIN if number % 3 == 0 else JobKind.PREDICT_BATCH
            make_job(session, kind, scans=0 if kind == JobKind.TRAIN else 12, chunk=3)
    roles = [_work] * 6 + [_dispatch] * 2 + [_reap, _cancel, _lead]
    start = threading.Barrier(len(roles))

    def play(number: int) -> None:
        pick = random.Random(seed + number)
        start.wait()
        for _ in range(12):
            roles[number](sessions, pick)

    with ThreadPoolExecutor(len(roles)) as pool:
        for played in [pool.submit(play, number) for number in range(len(roles))]:
            played.result()
    _finish(sessions)
    with sessions() as session:
        assert faults(session) == []
        assert set(session.scalars(select(Job.state))) <= TERMINAL


def _work(sessions: Sessions, pick: random.Random) -> None:
    """Claim a unit and end it in a random way; a dead worker does not end it."""
    with sessions() as session:
        units = list(session.scalars(select(Unit.id).where(Unit.finished_at.is_(None))))
    if not units:
        return
    with sessions.begin() as session:
        promised = pick.random() < 0.3
        held = (
            leases.claim_next(session, Lane.BATCH, "worker", 45)
            if promised
            else leases.claim(session, pick.choice(units), "worker", 45)
        )
    if held is None:
        return
    way = pick.choice(["succeed", "succeed", "fail", "drain", "die", "hear"])
    try:
        with sessions.begin() as session:
            _end(session, held, way)
    except LeaseLost:
        pass


def _end(session: Session, held: Claim, way: str) -> None:
    pending = select(ScanResult.ordinal).where(ScanResult.unit_id == held.unit_id, ScanResult.state == "pending")
    outcomes = [_good(ordinal) for ordinal in session.scalars(pending.order_by(ScanResult.ordinal))]
    if way == "succeed":
        lifecycle.succeed(session, held, outcomes=outcomes)
    elif way == "fail":
        lifecycle.fail(session, held, SHAKY, RETRY_LATER, outcomes[:1])
    elif way == "drain":
        lifecycle.requeue(session, held, "DRAINED", outcomes[:1])
    elif way == "hear" and leases.poll_status(session, held).cancel_requested:
        lifecycle.confirm_cancel(session, held, outcomes[:1])


def _dispatch(sessions: Sessions, pick: random.Random) -> None:
    with sessions.begin() as session:
        waiting = [unit.unit_id for unit in dispatch.QueueReader().read(session, 15, 15).waiting]
        half = len(waiting) // 2
        dispatch.reserve(session, waiting[:half])
        dispatch.dispatch(session, waiting[half:], 15)


def _reap(sessions: Sessions, pick: random.Random) -> None:
    with sessions.begin() as session:
        lost = select(Unit.id).where(Unit.state == "running").order_by(func.random()).limit(1).with_for_update()
        over = update(Unit).where(Unit.id.in_(lost)).values(lease_expires_at=NOW - text("interval '1 s'"))
        session.execute(over.execution_options(synchronize_session=False))
    with sessions.begin() as session:
        reaping.reap(session, retry=RETRY, stall=900)


def _cancel(sessions: Sessions, pick: random.Random) -> None:
    with sessions() as session:
        jobs = list(session.scalars(select(Job.id)))
    if pick.random() < 0.3:
        try:
            with sessions.begin() as session:
                lifecycle.cancel(session, TENANT, pick.choice(jobs))
        except WrongState:
            pass


def _lead(sessions: Sessions, pick: random.Random) -> None:
    with sessions.begin() as session:
        lifecycle.enqueue_due(session)
    with sessions.begin() as session:
        completion.cancel_batch(session)


def _end_cancelled(sessions: Sessions) -> None:
    more = True
    while more:
        with sessions.begin() as session:
            more = completion.cancel_batch(session)


def _finish(sessions: Sessions) -> None:
    """Healthy workers do the rest; the leases of dead ones expire."""
    for _ in range(200):
        with sessions.begin() as session:
            session.execute(
                text("UPDATE units SET lease_expires_at = clock_timestamp() - interval '1 s' WHERE state = 'running'")
            )
        with sessions.begin() as session:
            while reaping.reap(session, retry=RETRY, stall=900):
                pass
        with sessions.begin() as session:
            lifecycle.enqueue_due(session)
        with sessions() as session:
            left = list(session.scalars(select(Unit.id).where(Unit.finished_at.is_(None))))
        if not left:
            return
        for unit_id in left:
            with sessions.begin() as session:
                held = leases.claim(session, unit_id, "honest", 45)
                if held is not None:
                    _end(session, held, "succeed")
    raise AssertionError("units are left that cannot be claimed")
