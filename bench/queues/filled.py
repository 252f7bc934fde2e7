"""Databases filled with waiting units, and the questions that the queue is asked all the time."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from flask.testing import FlaskClient
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from api import create_app
from api.http.context import EXTENSION
from bench.queues.databases import Backend, Statements, migrated
from bench.queues.product import KIND, WORKERS, Planner, waiting_state
from jobs import keys
from jobs.db import Sessions, async_commit_engine, session_factory
from jobs.events import deliveries
from jobs.queue import dispatch, leases, lifecycle
from jobs.queue.submission import NewJob, submit
from jobs.results import queries
from jobs.settings import Settings
from jobs.states import JobKind, Lane

TENANT, WORKER, LEASE_SECONDS = "tenant-0", "bench/1/1", 45.0
RECEIVERS, THEIRS = 20, 50
"""Webhooks beside the one whose receiver is dead, and due deliveries of each."""
FILL = (
    "SET LOCAL session_replication_role = replica",  # no trigger looks at each row
    # Single jobs, and one batch that is a tenth of them.
    """INSERT INTO jobs (id, tenant_id, kind, lane, state, params, metadata, total)
        SELECT uuidv7(), 'tenant-' || n % :tenants, 'ingest', 'batch', 'queued', '{}', '{}',
            CASE WHEN n = 0 THEN :length / 10 ELSE 1 END
        FROM generate_series(0, :length) AS n""",
    f"""INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state, attempt, failures, rings, not_before{KIND})
        SELECT uuidv7(), tenant_id, jobs.id, n, 'batch', :state, 0, 0, 0,
            clock_timestamp() + make_interval(secs => :ahead){KIND}
        FROM jobs CROSS JOIN LATERAL generate_series(0, total - 1) AS n""",  # noqa: S608
    "INSERT INTO tenant_loads (tenant_id, scans, batches) SELECT tenant_id, sum(total), 0 FROM jobs GROUP BY tenant_id",
    """INSERT INTO processes (name, kind, lanes, broker_reachable, seen_at)
        SELECT 'bench-' || n || '@host/1', 'worker', '{urgent,batch}', true, clock_timestamp() + interval '1 day'
        FROM generate_series(1, :workers) AS n""",
    """INSERT INTO webhooks (id, tenant_id, url, events, secret)
        SELECT uuidv7(), 'tenant-' || n, 'http://127.0.0.1/', '{job.succeeded}', 'whsec_' || n
        FROM generate_series(0, :receivers) AS n""",
    """INSERT INTO deliveries (id, tenant_id, webhook_id, event_id, type, data, attempts)
        SELECT uuidv7(), tenant_id, webhooks.id, 'event-' || n, 'job.succeeded', '{}', 0
        FROM webhooks CROSS JOIN LATERAL
            generate_series(1, CASE WHEN tenant_id = 'tenant-0' THEN :length ELSE :theirs END) AS n""",
)


@dataclass
class Costs:
    """What one question took, each time: milliseconds on the clock and of the processors, and pages (where counted)."""

    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class Queue:
    """A database with so many waiting units, and what each question cost there.

    `single` commits without waiting for the disk, as workers' claims and beats and the dispatcher's looks do.
    """

    def __init__(self, url: str, length: int, client: FlaskClient) -> None:
        self.url, self.length, self._client = url, length, client
        # One connection each: its process is measured, and EXPLAIN finds there what was prepared.
        self.sessions = session_factory(url, 1, "bench")
        self.single = sessionmaker(async_commit_engine(url, "bench"), expire_on_commit=False)
        self._api: Sessions = client.application.extensions[EXTENSION].sessions
        self._backends = {id(each): Backend(each.kw["bind"]) for each in (self.sessions, self.single, self._api)}
        self.planner = Planner()
        self.deep: list[uuid.UUID] = []
        self.costs: defaultdict[str, Costs] = defaultdict(Costs)
        self._counts_pages = False

    def timed(self, name: str, question: Callable[[Session], Any], sessions: Sessions) -> Any:
        """The answer, in a transaction of its own."""
        with self._measured(name, sessions), sessions.begin() as session:
            return question(session)

    @contextmanager
    def _measured(self, name: str, sessions: Sessions) -> Iterator[None]:
        backend, costs = self._backends[id(sessions)], self.costs[name]
        pages = backend.pages() if self._counts_pages else 0
        cpu, started = backend.cpu_ms(), time.perf_counter()
        yield
        costs.ms.append((time.perf_counter() - started) * 1e3)
        costs.cpu_ms.append(backend.cpu_ms() - cpu)
        if self._counts_pages:
            costs.pages.append(backend.pages() - pages)

    def _get(self, name: str, path: str, **headers: str) -> Any:
        with self._measured(name, self._api):
            return self._client.get(path, headers=headers)

    def ask(self, number: int) -> None:
        """Every question once, each on its own."""
        new = NewJob(TENANT, JobKind.INGEST, Lane.BATCH)
        job_id = self.timed("submit", lambda session: submit(session, new), self.sessions).id
        train = [Lane.TRAIN]  # not its lane: the look finds it
        self.timed("dispatch new", lambda s: dispatch.dispatch_new(s, str(job_id), 0, train), self.single)
        self.timed("look", self.planner.look, self.single)
        with self.sessions() as session:
            unit_id = session.scalar(text("SELECT id FROM units WHERE job_id = :id"), {"id": job_id})
        self.work(unit_id)
        self.timed("claim next", lambda s: leases.claim_next(s, Lane.BATCH, WORKER, LEASE_SECONDS), self.single)
        polled = self.deep[number % len(self.deep)]
        self.timed("poll", lambda session: queries.job(session, TENANT, polled), self.sessions)
        answer = self._get("GET", f"/jobs/{polled}")
        again = self._get("GET, not modified", f"/jobs/{polled}", **{"If-None-Match": answer.headers["ETag"]})
        assert (answer.status_code, again.status_code) == (200, 304), (answer.text, again.text)
        self.timed("deliver", lambda session: deliveries.claim(session, 30, [], []), self.single)

    def work(self, unit_id: uuid.UUID, reports: int = 1) -> None:
        """What a worker asks for a unit."""
        claimed = self.timed("claim", lambda s: leases.claim(s, unit_id, WORKER, LEASE_SECONDS), self.single)
        assert claimed is not None
        self.timed("beat", lambda session: leases.beat(session, claimed, LEASE_SECONDS), self.single)
        for _ in range(reports):
            self.timed("report", lambda session: lifecycle.report(session, claimed), self.sessions)
        self.timed("end", lambda session: lifecycle.succeed(session, claimed), self.sessions)

    def measure(self, work: Callable[[], object], rounds: int) -> dict[str, Costs]:
        """What each question of the work costs."""
        self.costs = defaultdict(Costs)
        for _ in range(rounds):
            work()
        return dict(self.costs)

    def pages_touched(self, work: Callable[[], object], rounds: int) -> dict[str, float]:
        """How many pages each question of the work touches: medians."""
        self._counts_pages = True
        nothing = self.measure(lambda: self.timed("", lambda s: s.execute(text("SELECT 1")), self.single), rounds)
        found = self.measure(work, rounds)
        self._counts_pages = False
        own = median(nothing[""].pages)
        return {name: median(costs.pages) - own for name, costs in found.items()}

    def explained(self) -> dict[str, list[str]]:
        """The plans of looks, polls and deliveries, with their costs and pages."""
        questions = {
            "look": (self.planner.look, self.single),
            "poll": (lambda session: queries.job(session, TENANT, self.deep[0]), self.sessions),
            "deliver": (lambda session: deliveries.claim(session, 30, [], []), self.single),
        }
        return {name: self._explained(*question) for name, question in questions.items()}

    def _explained(self, question: Callable[[Any], Any], sessions: Sessions) -> list[str]:
        engine = sessions.kw["bind"]
        with Statements(engine) as statements, sessions.begin() as session:
            question(session)
        with engine.connect() as connection:
            return statements.plans(connection, "(ANALYZE, BUFFERS)")

    def plans(self) -> list[str]:
        """The plans of all questions."""
        engines = [sessions.kw["bind"] for sessions in (self.sessions, self.single)]
        with Statements(engines[0]) as durable, Statements(engines[1]) as single:
            self.ask(0)
        lines: list[str] = []
        for engine, statements in zip(engines, (durable, single), strict=True):
            with engine.connect() as connection:
                lines += statements.plans(connection)
        return lines

    def vacuum(self) -> None:
        """VACUUM ANALYZE of all tables."""
        with self.sessions.kw["bind"].connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))

    def close(self) -> None:
        """Close its connections."""
        self._client.application.extensions[EXTENSION].listener.close()
        for sessions in (self._api, self.sessions, self.single):
            sessions.kw["bind"].dispose()


def filled(server: str, home: Path, name: str, length: int, tenants: int = 1, ahead: float = 0.0) -> Queue:
    """A new queue of so many single jobs and a batch of a tenth of them.

    Args:
        ahead: seconds until its units are due.
    """
    url = migrated(server, name)
    client = create_app(Settings(home=home / name, database_url=url, db_pool=1)).test_client()
    queue = Queue(url, length, client)
    numbers = {"length": length, "tenants": tenants, "ahead": ahead, "state": waiting_state(ahead > 0)}
    numbers |= {"workers": WORKERS, "receivers": RECEIVERS, "theirs": THEIRS}
    with queue.sessions.begin() as session:
        for statement in FILL:
            session.execute(text(statement), {k: v for k, v in numbers.items() if f":{k}" in statement})
        secret = keys.create(session, "bench", [keys.Scope.ADMIN], TENANT).secret
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {secret}"
    queue.vacuum()
    with queue.sessions() as session:
        deep = text("SELECT id FROM jobs WHERE tenant_id = :tenant ORDER BY id DESC LIMIT 10")
        queue.deep = list(session.scalars(deep, {"tenant": TENANT}))
    return queue
