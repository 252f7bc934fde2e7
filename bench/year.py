"""A year of nights: `python -m bench.year`. Does the database stay bounded, and as quick as on the first day?

Each simulated night submits batches, dispatches, claims, beats and ends their units, and explains some scans, by
RenalQ's own functions on a real Postgres. Two databases in turn: one with retention, which then deletes what is older
than some nights, and one without. After each night both are vacuumed, as autovacuum does in the day between (its
settings are for tables of full size). Measured each night: bytes of tables and indexes, dead rows before the vacuum,
and medians of a claim, the dispatcher's look and a status poll. Prints the nights and what a year of a million scans a
night would take, writes bench/out/year.json. Fails where retention leaves growth.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import select, text

from bench.queues.databases import migrated
from bench.train import ROOT, machine
from cli.stack.embedded import embedded_postgres
from jobs.db import Sessions, session_factory
from jobs.queue import dispatch, leases, lifecycle
from jobs.queue.outcomes import ScanOutcome
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.results import queries
from jobs.retention.services import services
from jobs.settings import Settings
from jobs.states import JobKind, Lane
from jobs.storage.blobs import BlobStore
from jobs.tables import Unit

OUT = ROOT / "bench" / "out" / "year.json"
TENANT, WORKER = "hospital", "predict@bench/1/1"
CHUNK, BATCHES, BEATS = 128, 4, 2
EXPLAINED = 50
"""One scan of so many is explained: an overlay and a heatmap."""
PROBES = 30
PROBED = ("claim", "look", "poll")
YEAR_NIGHTS, REAL_SCANS = 365, 1_000_000
MOST_GROWTH = 1.1
"""Of the last nights over those right after the horizon of retention."""

SCANS = """
INSERT INTO scans (id, tenant_id, sha256, size, media_type, width, height)
SELECT uuidv7(), :tenant, encode(sha256(uuidv7()::text::bytea), 'hex'), 250000, 'image/png', 512, 512
FROM generate_series(1, :scans) RETURNING id
"""
EXPLANATIONS = """
INSERT INTO artifacts (job_id, name, tenant_id, sha256, size, media_type)
SELECT job_id, 'explanations/' || lpad(ordinal::text, 6, '0') || part, tenant_id,
    encode(sha256((job_id::text || ordinal || part)::bytea), 'hex'), 90000, 'image/png'
FROM scan_results, (VALUES ('.png'), ('.heatmap.png')) AS parts (part)
WHERE job_id = :job AND ordinal % :explained = 0
"""
SIZES = """
SELECT relname, pg_table_size(relid) AS table_bytes, pg_indexes_size(relid) AS index_bytes, n_dead_tup AS dead
FROM pg_stat_user_tables WHERE schemaname = 'public'
"""


@dataclass
class Night:
    """What one night left behind: bytes, dead rows, medians in ms, seconds of its work and of retention."""

    table_bytes: int = 0
    index_bytes: int = 0
    dead: int = 0
    ms: dict[str, float] = field(default_factory=dict)
    work_seconds: float = 0.0
    retention_seconds: float = 0.0
    tables: dict[str, int] = field(default_factory=dict)


@dataclass
class Side:
    """A database. `keep`: nights that retention keeps; None: all."""

    sessions: Sessions
    store: BlobStore
    keep: int | None
    ends: list[float] = field(default_factory=list)
    nights: list[Night] = field(default_factory=list)

    def live(self, scans: int) -> None:
        """One night, and the day after it."""
        night = Night()
        night.work_seconds = _seconds(lambda: _work(self.sessions, scans))
        self.ends.append(time.time())
        if self.keep is not None and len(self.ends) > self.keep:
            days = (time.time() - self.ends[-1 - self.keep]) / 86400
            night.retention_seconds = _seconds(lambda: self._retain(days))
        night.dead = sum(row.dead for row in self._sizes())
        with self.sessions.kw["bind"].connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM (ANALYZE)"))
        sizes = self._sizes()
        night.table_bytes, night.index_bytes = (sum(row[at] for row in sizes) for at in (1, 2))
        night.tables = {row.relname: row.table_bytes + row.index_bytes for row in sizes}
        night.ms = _probe(self.sessions)
        self.nights.append(night)

    def _retain(self, days: float) -> None:
        limits = {"results_days": days, "job_days": days, "scan_days": days, "feedback_days": days}
        settings = Settings(home=Path("unused"), **limits)
        for _ in range(2):  # the second time, an hour has passed for blobs that were set aside
            for service in services(self.sessions, self.store, settings):
                while service.step():
                    pass
            with self.sessions.begin() as session:
                session.execute(text("UPDATE released_blobs SET due_at = due_at - interval '1 hour' WHERE aside"))

    def _sizes(self) -> Sequence[Any]:
        with self.sessions.begin() as session:
            session.execute(text("SELECT pg_stat_force_next_flush()"))
        with self.sessions() as session:
            return session.execute(text(SIZES)).all()


def main(argv: Sequence[str] | None = None) -> int:
    """Live through the nights, and report."""
    parser = _parser()
    parsed = parser.parse_args(argv)
    if parsed.nights < parsed.keep + 3:
        parser.error("--nights: at least three more than --keep")
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as name, embedded_postgres(Path(name), False) as url:
        sides = {}
        for side, keep in (("retention", parsed.keep), ("everything", None)):
            sessions = session_factory(migrated(url, side), pool_size=2, application="bench")
            sides[side] = Side(sessions, BlobStore(f"{name}/{side}"), keep)
        for number in range(parsed.nights):
            Console(stderr=True).print(f"night {number + 1} of {parsed.nights} …")
            for side in sides.values():
                side.live(parsed.scans)
    return _report(sides, parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.year")
    parser.add_argument("--nights", type=int, default=24)
    parser.add_argument("--scans", type=int, default=4_000, help="scans a night")
    parser.add_argument("--keep", type=int, default=3, help="nights that retention keeps")
    return parser


# --- a night ---


def _work(sessions: Sessions, scans: int) -> None:
    for _ in range(BATCHES):
        _predict(sessions, _submitted(sessions, scans // BATCHES, CHUNK))


def _submitted(sessions: Sessions, scans: int, chunk: int) -> Any:
    with sessions.begin() as session:
        ids = session.scalars(text(SCANS), {"tenant": TENANT, "scans": scans}).all()
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH, metadata={"night": "shift"})
        return submit(session, new, [NewResult(one, f"{number}.png") for number, one in enumerate(ids)], chunk).id


def _predict(sessions: Sessions, job_id: Any) -> None:
    with sessions() as session:
        units = session.scalars(select(Unit.id).where(Unit.job_id == job_id).order_by(Unit.ordinal)).all()
    with sessions.begin() as session:
        dispatch.dispatch(session, units, 15)
    for unit_id in units:
        with sessions.begin() as session:
            held = leases.claim(session, unit_id, WORKER, 45)
        assert held is not None
        for _ in range(BEATS):
            with sessions.begin() as session:
                leases.beat(session, held, 45)
        _end(sessions, held)
    with sessions.begin() as session:
        session.execute(text(EXPLANATIONS), {"job": job_id, "explained": EXPLAINED})


def _end(sessions: Sessions, held: leases.Claim) -> None:
    given = {"label": "Normal", "confidence": 0.9, "probabilities": {"Normal": 0.9, "Tumor": 0.1}, "engine": "bench"}
    with sessions.begin() as session:
        ordinals = session.scalars(text("SELECT ordinal FROM scan_results WHERE unit_id = :id"), {"id": held.unit_id})
        lifecycle.succeed(session, held, outcomes=[ScanOutcome(ordinal, **given) for ordinal in ordinals])


def _probe(sessions: Sessions) -> dict[str, float]:
    """Medians of what must stay quick, in ms, beside a waiting batch."""
    job_id = _submitted(sessions, PROBES, 1)
    with sessions() as session:
        units = session.scalars(select(Unit.id).where(Unit.job_id == job_id)).all()
    taken: dict[str, list[float]] = {}

    def timed(name: str, ask: Callable[[Any], Any]) -> Any:
        started = time.perf_counter()
        with sessions.begin() as session:
            found = ask(session)
        taken.setdefault(name, []).append((time.perf_counter() - started) * 1e3)
        return found

    for unit_id in units:
        timed("look", lambda session: dispatch.QueueReader().read(session, 15, 15))
        timed("poll", lambda session: queries.job(session, TENANT, job_id))
        held = timed("claim", lambda session, unit_id=unit_id: leases.claim(session, unit_id, WORKER, 45))
        _end(sessions, held)
    return {name: round(median(values), 3) for name, values in taken.items()}


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return round(time.perf_counter() - started, 2)


# --- the report ---


def _report(sides: dict[str, Side], parsed: argparse.Namespace) -> int:
    kept, whole = (sides[name].nights for name in ("retention", "everything"))
    figures = _figures(kept, whole, parsed)
    nights = {name: [vars(night) for night in side.nights] for name, side in sides.items()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"machine": machine(), **vars(parsed), **figures, **nights}, indent=1) + "\n")
    console = Console(width=170)
    console.print(_table(kept, whole, parsed))
    for name, value in figures.items():
        console.print(f"{name.replace('_', ' ')}: {value}")
    console.print(f"written: {OUT.relative_to(ROOT)}")
    return 0 if figures["growth_after_the_horizon"] <= MOST_GROWTH else 1


def _figures(kept: list[Night], whole: list[Night], parsed: argparse.Namespace) -> dict[str, Any]:
    early, late = kept[parsed.keep + 1 :][:5], kept[-5:]
    scale = REAL_SCANS / parsed.scans
    per_night = (_bytes(whole[-1]) - _bytes(whole[0])) / max(1, len(whole) - 1)
    return {
        "growth_after_the_horizon": round(mean(map(_bytes, late)) / mean(map(_bytes, early)), 3),
        "median_ms_of_the_first_and_last_five_nights": {
            name: {"retention": _ms(kept, name), "none": _ms(whole, name)} for name in PROBED
        },
        "bytes_a_scan_without_retention": round(per_night / parsed.scans),
        "gb_after_a_year_of_a_million_a_night_without_retention": round(per_night * scale * YEAR_NIGHTS / 1e9, 1),
        f"gb_at_any_time_with_{parsed.keep}_nights_kept": round(mean(map(_bytes, late)) * scale / 1e9, 1),
        "seconds_of_retention_a_million_scans": round(mean(night.retention_seconds for night in late) * scale),
    }


def _ms(nights: list[Night], name: str) -> list[float]:
    return [round(median(night.ms[name] for night in some), 2) for some in (nights[:5], nights[-5:])]


def _bytes(night: Night) -> int:
    return night.table_bytes + night.index_bytes


def _table(kept: list[Night], whole: list[Night], parsed: argparse.Namespace) -> Table:
    title = f"Nights of {parsed.scans:,} scans: retention of {parsed.keep} nights | no retention"
    heads = ("tables MB", "indexes MB", "dead rows", " / ".join(PROBED) + " ms")
    table = Table("night", "retention s", *heads, *(f"| {head}" for head in heads), title=title)
    for number, (one, other) in enumerate(zip(kept, whole, strict=True), 1):
        table.add_row(str(number), f"{one.retention_seconds:.1f}", *_cells(one), *_cells(other))
    return table


def _cells(night: Night) -> list[str]:
    sizes = [f"{night.table_bytes / 1e6:.1f}", f"{night.index_bytes / 1e6:.1f}", f"{night.dead:,}"]
    return [*sizes, " / ".join(f"{night.ms[name]:.2f}" for name in PROBED)]


if __name__ == "__main__":
    raise SystemExit(main())
