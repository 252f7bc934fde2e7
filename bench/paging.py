"""What ten million results cost who reads them: `python -m bench.paging`. 10,000 against 10,000,000 rows, in one run.

Two databases on one Postgres, each under an API of its own, asked in turn by Flask's test client: a page of results at
the beginning, the middle and the end of a batch, those that failed, a page while the batch runs, the job, the list of
jobs. Prints medians, their ratio, and the plan of each statement; none may scan all results. Writes
bench/out/paging.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from flask.testing import FlaskClient
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, text

from api import create_app
from api.http.context import EXTENSION
from bench.queues.databases import Statements, migrated
from bench.train import ROOT, machine
from cli.stack.embedded import embedded_postgres
from jobs import keys, logs
from jobs.settings import Settings

OUT = ROOT / "bench" / "out" / "paging.json"
FEW, MANY = 10_000, 10_000_000
BATCHES = {FEW: 10}
"""Batches that share the rows, 100 where nothing else is said; the last one runs still, its second half to come. The
smaller ones have full pages too."""
SCAN = "Seq Scan on scan_results"
OTHERS = 60
"""Jobs without results, so that both lists are full pages."""
FILL = (
    "SET session_replication_role = replica",  # no trigger looks at each row: millions of them are made in minutes
    """INSERT INTO jobs (id, tenant_id, kind, lane, state, params, metadata, total, succeeded, failed, model_version,
            started_at, finished_at)
        SELECT uuidv7(), 'default', 'predict_batch', 'batch', CASE WHEN n = :jobs THEN 'running' ELSE 'succeeded' END,
            '{}', '{}', :each, CASE WHEN n = :jobs THEN :each / 2 ELSE :each - :each / 5 END,
            CASE WHEN n = :jobs THEN 0 ELSE :each / 5 END, 1, now(), CASE WHEN n < :jobs THEN now() END
        FROM generate_series(1, :jobs) AS n""",
    """INSERT INTO jobs (id, tenant_id, kind, lane, state, params, metadata, total, succeeded, started_at, finished_at)
        SELECT uuidv7(), 'default', 'ingest', 'batch', 'succeeded', '{}', '{}', 1, 1, now(), now()
        FROM generate_series(1, :others) AS n""",
    """INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state, attempt, failures, rings, scans, finished_at)
        SELECT uuidv7(), 'default', id, n, 'batch',
            CASE WHEN finished_at IS NULL AND n >= :units / 2 THEN 'queued' ELSE 'succeeded' END, 1, 0, 0, :chunk,
            CASE WHEN finished_at IS NULL AND n >= :units / 2 THEN NULL ELSE now() END
        FROM jobs CROSS JOIN generate_series(0, :units - 1) AS n WHERE kind = 'predict_batch'""",
    """INSERT INTO scan_results (job_id, ordinal, tenant_id, unit_id, scan_id, name, state, label, confidence,
            probabilities, engine, error, finished_at)
        SELECT units.job_id, units.ordinal * :chunk + n, 'default', units.id, uuidv7(), n || '.dcm', made.state,
            CASE WHEN made.state = 'succeeded' THEN 'Tumor' END, CASE WHEN made.state = 'succeeded' THEN random() END,
            CASE WHEN made.state = 'succeeded' THEN '{"Normal": 0.25, "Tumor": 0.75}'::jsonb END, 'openvino-bf16',
            CASE WHEN made.state = 'failed' THEN '{"code": "BAD_IMAGE", "detail": "…"}'::jsonb END, units.finished_at
        FROM units CROSS JOIN generate_series(0, :chunk - 1) AS n CROSS JOIN LATERAL (
            SELECT CASE WHEN units.finished_at IS NULL THEN 'pending'
                WHEN n % 5 = 3 THEN 'failed' ELSE 'succeeded' END AS state) AS made""",
    "SET session_replication_role = DEFAULT",
)


@dataclass
class Side:
    """A database of so many results, an API on it, and how long each question took there (ms)."""

    rows: int
    client: FlaskClient
    engine: Engine
    questions: dict[str, str]
    taken: dict[str, list[float]] = field(default_factory=dict)

    def ask(self, name: str) -> None:
        """One question, to the last byte of its answer."""
        started = time.perf_counter()
        answer = self.client.get(self.questions[name])
        content = answer.get_data()
        self.taken.setdefault(name, []).append((time.perf_counter() - started) * 1e3)
        assert answer.status_code == 200, content
        assert json.loads(content), name


def main(argv: Sequence[str] | None = None) -> int:
    """Fill, ask in turn, report."""
    parsed = _parser().parse_args(argv)
    logs.configure("bench", "WARNING")
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as name:
        folder = Path(name)
        with embedded_postgres(folder / "postgres", fsync=False) as url:
            few, many = _side(folder, url, FEW), _side(folder, url, parsed.rows)
            for number in range(parsed.times):
                for side in (few, many) if number % 2 else (many, few):
                    for question in side.questions:
                        side.ask(question)
            plans = {question: _plans(many, question) for question in many.questions}
            for side in (few, many):
                services = side.client.application.extensions[EXTENSION]
                services.listener.close()
                services.sessions.kw["bind"].dispose()
    return _report(few, many, plans)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.paging")
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--rows", type=int, default=MANY)
    return parser


def _side(folder: Path, url: str, rows: int) -> Side:
    name = f"results_{rows}"
    Console().print(f"{rows:,} results …")
    own = migrated(url, name)
    app = create_app(Settings(home=folder / name, database_url=own))
    sessions = app.extensions[EXTENSION].sessions
    _fill(sessions.kw["bind"], rows)
    with sessions.begin() as session:
        secret = keys.create(session, name="bench", scopes=[keys.Scope.ADMIN]).secret
        ids = list(session.scalars(text("SELECT id FROM jobs WHERE kind = 'predict_batch' ORDER BY id")))
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {secret}"
    return Side(rows, client, sessions.kw["bind"], _questions(ids, rows // len(ids)))


def _fill(engine: Engine, rows: int) -> None:
    batches = BATCHES.get(rows, 100)
    each = rows // batches
    chunk = min(1000, each // 2)
    numbers = {"jobs": batches, "each": each, "chunk": chunk, "units": each // chunk, "others": OTHERS}
    with engine.begin() as connection:
        for statement in FILL:
            known = {name: value for name, value in numbers.items() if f":{name}" in statement}
            connection.execute(text(statement), known)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


def _questions(ids: list[Any], each: int) -> dict[str, str]:
    ended, running = f"/jobs/{ids[len(ids) // 2]}", f"/jobs/{ids[-1]}"
    return {
        "first page": f"{ended}/results",
        "middle page": f"{ended}/results?after={each // 2}",
        "last page": f"{ended}/results?after={each - 101}",
        "failed": f"{ended}/results?state=failed&after={each // 2}",
        "running, first page": f"{running}/results",
        "running, last page": f"{running}/results?after={each // 2 - 50}",
        "job": ended,
        "running job": running,
        "list": "/jobs",
        "list of the running": "/jobs?state=running",
    }


def _plans(side: Side, question: str) -> list[str]:
    """The plans of what the question asks of Postgres, with the values that it asks with."""
    with Statements(side.engine) as statements:
        side.ask(question)
    with side.engine.connect() as connection:
        return statements.plans(connection)


def _report(few: Side, many: Side, plans: dict[str, list[str]]) -> int:
    rows = {name: _compared(few.taken[name], many.taken[name]) for name in many.taken}
    scans = {name: [line.strip() for line in plan if SCAN in line] for name, plan in plans.items()}
    results = {"machine": machine(), "few": few.rows, "many": many.rows, "questions": rows, "scans": scans}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({**results, "plans": plans}, indent=1) + "\n", encoding="utf-8")
    table = Table("question", f"{few.rows:,} results", f"{many.rows:,} results", "ratio", title="Medians in ms")
    for name, row in rows.items():
        table.add_row(name, *(f"{figure:.2f}" for figure in row.values()))
    console = Console()
    console.print(table)
    console.print(f"plans that scan all results: {sum(map(len, scans.values()))}; written: {OUT.relative_to(ROOT)}")
    return 1 if any(row["many_ms"] > 20 or row["ratio"] > 1.2 for row in rows.values()) else 0


def _compared(few: list[float], many: list[float]) -> dict[str, float]:
    ratio = median(many) / median(few)
    return {"few_ms": round(median(few), 3), "many_ms": round(median(many), 3), "ratio": round(ratio, 3)}


if __name__ == "__main__":
    raise SystemExit(main())
