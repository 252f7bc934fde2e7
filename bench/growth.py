"""What the queue's length costs: `python -m bench.growth`. 1,000 against 100,000 waiting units, in one run.

Two databases on one Postgres, one with few and one with many waiting, asked in turn: claim a unit, end it, the
dispatcher's look, the status poll of a waiting job (with its place in the queue), a submit. Prints medians, their
ratio, and the plan of each question; no plan may scan a table. Writes bench/out/growth.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import select, text
from sqlalchemy.engine import make_url

from bench.train import ROOT, machine
from cli.stack.embedded import embedded_postgres
from cli.stack.postgres import create_database
from jobs.db import Sessions, async_commit_sessions, session_factory
from jobs.queue import dispatch, leases, lifecycle, position
from jobs.queue.submission import NewJob, submit
from jobs.results import queries
from jobs.states import JobKind, Lane
from jobs.tables import Unit

OUT = ROOT / "bench" / "out" / "growth.json"
FEW, MANY = 1_000, 100_000
Taken = dict[str, list[float]]
"""How long each question took (ms)."""
PLANS = {
    "claim": f"EXECUTE claim_unit ('{'0' * 32}', 'w', 45)",
    "claim of a promise": "EXECUTE claim_next ('batch', 'w', 45)",
    "end": f"EXECUTE succeed_unit ('{'0' * 32}', '{'0' * 32}', 1, 'w', 1, 0, 1.0, NULL, '{{}}')",
    "end of the job": f"EXECUTE end_job ('{'0' * 32}')",
    "look": "EXECUTE snapshot (4, 15, 64, 15)",
}


@dataclass
class Queue:
    """A database with so many waiting units, and how long each question took there (ms)."""

    sessions: Sessions
    single: Sessions
    length: int
    unit_ids: list[Any] = field(default_factory=list)
    job_ids: list[Any] = field(default_factory=list)
    taken: dict[str, list[float]] = field(default_factory=dict)

    def fill(self) -> None:
        """One batch of a tenth, and single jobs of five tenants for the rest."""
        with self.sessions.begin() as session:
            template = submit(session, NewJob("filler", JobKind.INGEST, Lane.BATCH))
            fill = {"job": template.id, "jobs": self.length * 9 // 10, "units": self.length // 10}
            for statement in FILL:
                session.execute(text(statement), fill)
        with self.sessions.kw["bind"].connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
        with self.sessions() as session:
            waiting = (
                select(Unit.id, Unit.job_id).where(Unit.tenant_id != "filler").order_by(Unit.id.desc()).limit(2000)
            )
            rows = session.execute(waiting).all()
        self.unit_ids, self.job_ids = [row.id for row in rows], [row.job_id for row in rows]


FILL = (
    """INSERT INTO jobs (id, tenant_id, kind, lane, state, params, metadata, total)
        SELECT uuidv7(), 'tenant-' || n % 5, 'ingest', 'batch', 'queued', '{}', '{}', 1
        FROM generate_series(1, :jobs) AS n""",
    """INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state, attempt, failures, rings)
        SELECT uuidv7(), tenant_id, id, 0, 'batch', 'queued', 0, 0, 0 FROM jobs WHERE tenant_id <> 'filler'""",
    """INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state, attempt, failures, rings)
        SELECT uuidv7(), 'filler', :job, n, 'batch', 'queued', 0, 0, 0 FROM generate_series(1, :units) n""",
    "INSERT INTO tenant_loads SELECT tenant_id, count(*), 0 FROM jobs WHERE tenant_id <> 'filler' GROUP BY tenant_id",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Fill, ask in turn, report."""
    parsed = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as name, embedded_postgres(Path(name)) as url:
        few, many = (_queue(url, length) for length in (FEW, MANY))
        for number in range(parsed.times):
            for queue in (few, many) if number % 2 else (many, few):
                _ask(queue, number)
        plans = {length: _plans(queue) for length, queue in ((FEW, few), (MANY, many))}
    # A scan of a table whose rows are tenants or living processes is no scan of the queue.
    _, scanned = compared(OUT, (FEW, few.taken), (MANY, many.taken), plans[MANY], "waiting", ("units", "jobs"))
    return 1 if scanned else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.growth")
    parser.add_argument("--times", type=int, default=300)
    return parser


def _queue(url: str, length: int) -> Queue:
    own = migrated(url, f"queue_{length}")
    queue = Queue(session_factory(own, application="bench"), async_commit_sessions(own, "bench"), length)
    queue.fill()
    return queue


def migrated(url: str, name: str) -> str:
    """A new database with our tables on the server: its URL."""
    create_database(url, name)
    own = make_url(url).set(database=name).render_as_string(hide_password=False)
    environ = {**os.environ, "RENALQ_DATABASE_URL": own}
    subprocess.run([sys.executable, "-m", "alembic", "upgrade", "head"], cwd=ROOT, env=environ, check=True)
    return own


def _ask(queue: Queue, number: int) -> None:
    """Every question once, each on its own."""
    unit_id, job_id = queue.unit_ids[number], queue.job_ids[-1 - number]
    single = queue.single

    def timed(name: str, sessions: Sessions, question: Callable[..., Any]) -> Any:
        started = time.perf_counter()
        with sessions.begin() as session:
            answer = question(session)
        queue.taken.setdefault(name, []).append((time.perf_counter() - started) * 1e3)
        return answer

    new = NewJob("tenant-1", JobKind.INGEST, Lane.BATCH)
    tenant = "tenant-" + "01234"[number % 5]
    timed("submit", queue.sessions, lambda session: submit(session, new))
    timed("look", single, lambda session: dispatch.snapshot(session, 15, 4, 15))
    held = timed("claim", single, lambda session: leases.claim(session, unit_id, "bench", 45))
    timed("end", queue.sessions, lambda session: lifecycle.succeed(session, held))
    with queue.sessions() as session:
        tenant = session.scalar(text("SELECT tenant_id FROM jobs WHERE id = :id"), {"id": job_id})
    timed("status poll", queue.sessions, lambda session: queries.job(session, tenant, job_id))


def _plans(queue: Queue) -> dict[str, list[str]]:
    """The plans, on a connection on which all statements have been prepared."""
    with queue.sessions.begin() as session:
        dispatch.snapshot(session, 15, 4, 15)
        leases.claim_next(session, Lane.BATCH, "bench", 45)
        held = leases.claim(session, queue.unit_ids[-1], "bench", 45)
        assert held is not None
        lifecycle.succeed(session, held)
        found = {name: list(session.scalars(text("EXPLAIN " + question))) for name, question in PLANS.items()}
        asked = {"ids": [queue.job_ids[-1]]}
        found["status poll"] = list(session.scalars(text("EXPLAIN " + position.POSITIONS.text), _with_bounds(asked)))
    return found


def _with_bounds(asked: dict[str, Any]) -> dict[str, Any]:
    return {**{name: bound.value for name, bound in position.POSITIONS._bindparams.items() if bound.value}, **asked}


def compared(
    out: Path,
    few: tuple[int, Taken],
    many: tuple[int, Taken],
    plans: dict[str, list[str]],
    what: str,
    tables: Sequence[str],
) -> tuple[dict[str, dict[str, float]], int]:
    """Print and write two sides of so many `what`: medians, ratios and plans. Returns the figures by question, and how
    often a plan scans one of the tables."""
    rows = {name: _compared(few[1][name], many[1][name]) for name in many[1]}
    scanning = tuple(f"Seq Scan on {table}" for table in tables)
    scans = {name: [line.strip() for line in plan if any(s in line for s in scanning)] for name, plan in plans.items()}
    results = {"machine": machine(), "few": few[0], "many": many[0], "questions": rows, "scans": scans, "plans": plans}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = Table("question", f"{few[0]:,} {what}", f"{many[0]:,} {what}", "ratio", title="Medians in ms")
    for name, row in rows.items():
        table.add_row(name, *(f"{figure:.2f}" for figure in row.values()))
    console = Console()
    for name, plan in plans.items():
        console.print(f"── {name}", *plan, sep="\n", markup=False, highlight=False)
    console.print(table)
    scanned = sum(map(len, scans.values()))
    console.print(f"tables scanned: {scanned}; written: {out.relative_to(ROOT)}")
    return rows, scanned


def _compared(few: list[float], many: list[float]) -> dict[str, float]:
    ratio = median(many) / median(few)
    return {"few_ms": round(median(few), 3), "many_ms": round(median(many), 3), "ratio": round(ratio, 3)}


if __name__ == "__main__":
    raise SystemExit(main())
