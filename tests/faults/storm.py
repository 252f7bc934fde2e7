"""A storm: `python -m tests.faults.storm --seed 1 --minutes 10` (or `make storm SEED=1 MINUTES=10`).

Clients submit real trainings, batches and single scans by REST, each POST with an Idempotency-Key that it repeats until
it is answered, while a killer rages through workers, dispatcher, Redis and Postgres. Then the storm is over, everything
may finish, and the checker reads the database. What was accepted must have ended once, and every scan have one result.
Prints what it did to whom and the verdict; writes bench/out/storm-SEED.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alembic import command
from flask.testing import FlaskClient
from sqlalchemy import func, select, text

from cli.stack.postgres import create_database
from jobs import logs
from jobs.db import make_engine, session_factory
from jobs.settings import Settings
from jobs.tables import Job, ScanResult, Unit
from ml.synthetic import phantom_files
from tests.databases import ROOT, alembic_config
from tests.faults.killer import PROCESSES, Killer, recoveries, start
from tests.faults.rest import Rest, rest
from tests.faults.servers import own_postgres, own_redis
from tests.jobs.checker import faults
from tests.processes import Stack, stack

CLOCKS: dict[str, Any] = {
    "lease_seconds": 10,
    "beat_seconds": 2,
    "give_up_seconds": 7,
    "stall_seconds": 60,
    "ring_again_seconds": 5,
    "sweep_seconds": 0.5,
    "process_seconds": 2,
    "cancel_grace_seconds": 2,
    "checkpoint_seconds": 1,
    "chunk_scans": 32,
    "chunk_seconds": 0.02,  # so that a batch has many chunks
    "idempotency_hours": 24,
}
PARAMS = {"weights": "none", "augmentation": False, "learning_rate": 0.01, "image_size": [64, 64, 3]}
FINISH_SECONDS = 600.0
"""After the storm everything must have ended within this time."""
PATIENCE_SECONDS = 180.0
"""A client gives up, and with it the storm, when no POST is answered for so long."""


@dataclass
class Accepted:
    """What clients were promised: each id was answered with 202."""

    jobs: list[uuid.UUID] = field(default_factory=list)
    answers_lost: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Rage, finish, count. The exit code is 0 where nothing was lost."""
    parsed = _parser().parse_args(argv)
    logs.configure("api", "ERROR")
    with ExitStack() as everything:
        folder = Path(everything.enter_context(tempfile.TemporaryDirectory(prefix="renalq-storm-")))
        killer, processes, api = _prepare(folder, parsed, everything)
        accepted = _storm(killer, processes, api, parsed)
        stuck = _finish(killer, processes)
        verdict = _verdict(killer, processes, accepted, stuck, parsed)
    _report(verdict, parsed.seed)
    return 0 if verdict["verdict"] == "nothing was lost" else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.storm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--mean-pause", type=float, default=8.0, help="mean seconds between two blows")
    return parser


# --- before the storm ---


def _prepare(folder: Path, parsed: argparse.Namespace, everything: ExitStack) -> tuple[Killer, Stack, Rest]:
    postgres = everything.enter_context(own_postgres(folder / "postgres"))
    redis = everything.enter_context(own_redis(folder / "redis"))
    create_database(postgres.url, "renalq")
    _migrate(postgres.url)
    settings = Settings(home=folder, database_url=postgres.url, redis_url=redis.url, **CLOCKS)
    sessions = session_factory(postgres.url, pool_size=4, application="storm")
    processes = everything.enter_context(stack(settings, sessions))
    for name in PROCESSES:
        start(processes, name)
    api = everything.enter_context(rest(processes))
    return Killer(processes, redis, postgres, parsed.seed, parsed.mean_pause), processes, api


def _migrate(url: str) -> None:
    engine = make_engine(url)
    with engine.connect() as connection:
        command.upgrade(alembic_config(connection), "head")
    engine.dispose()


# --- the clients ---


class Client:
    """Somebody who wants things done, and asks again until he has an answer."""

    def __init__(self, api: Rest, accepted: Accepted, seed: int) -> None:
        self._client: FlaskClient = api.client()
        self._accepted, self._pick = accepted, random.Random(seed)
        self.dataset_id, self.scan_ids = "", list[str]()

    def prepare(self, folder: Path, processes: Stack) -> None:
        """Upload a dataset and scans, and train a first model, while it is still calm."""
        phantom_files.write_zip(folder / "kidneys.zip", patients=12, slices=3, seed=7)
        with (folder / "kidneys.zip").open("rb") as file:
            answer = self._client.post("/datasets", data={"file": (file, "kidneys.zip")})
        self.dataset_id = answer.json["id"]  # type: ignore[index]
        processes.wait_for(uuid.UUID(answer.json["job_id"]), 120)  # type: ignore[index]
        phantom_files.write_dataset(folder / "new", patients=10, slices=4, seed=99)
        for path in sorted((folder / "new").rglob("*.png")):
            with path.open("rb") as file:
                self.scan_ids.append(self._client.post("/scans", data={"file": (file, path.name)}).json["id"])  # type: ignore[index]
        processes.wait_for(self.train(epochs=2), 240)

    def train(self, epochs: int, augmentation: bool = False) -> uuid.UUID:
        """A training, accepted."""
        params = {**PARAMS, "epochs": epochs, "augmentation": augmentation}
        body = {"dataset_id": self.dataset_id, "params": params, "promote": "auto"}
        return self._submit("/jobs/train", body)

    def live(self, processes: Stack, over: threading.Event) -> None:
        """Submit until the storm is over."""
        training: uuid.UUID | None = None
        while not over.wait(self._pick.expovariate(0.7)):
            if training is None or (self._pick.random() < 0.1 and _has_ended(processes, training)):
                training = self.train(self._pick.randint(20, 60), augmentation=True)
            elif self._pick.random() < 0.1 and self._accepted.jobs:
                self._disturb(self._pick.choice(self._accepted.jobs))
            elif self._pick.random() < 0.3:
                scans = self._pick.choices(self.scan_ids, k=self._pick.randint(20, 150))
                self._submit("/jobs/predict/batch", {"scan_ids": scans, "model": "1"})
            else:
                self._submit("/jobs/predict", {"scan_id": self._pick.choice(self.scan_ids), "model": "1"})

    def _disturb(self, job_id: uuid.UUID) -> None:
        """Cancel a job, or retry what is left of it. Either may be refused, since it has ended or has not."""
        verb = self._pick.choice(["cancel", "retry"])
        answer = self._client.post(f"/jobs/{job_id}/{verb}")
        if verb == "retry" and answer.status_code == 202:
            self._accepted.jobs.append(uuid.UUID(answer.json["id"]))  # type: ignore[index]

    def _submit(self, path: str, body: dict[str, Any]) -> uuid.UUID:
        key = {"Idempotency-Key": str(uuid.UUID(int=self._pick.getrandbits(128)))}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            answer = self._client.post(path, json=body, headers=key)
            if answer.status_code == 202:
                job_id = uuid.UUID(answer.json["id"])  # type: ignore[index]
                self._accepted.jobs.append(job_id)
                return job_id
            assert answer.status_code in (409, 429, 500, 503), answer.text
            self._accepted.answers_lost += 1
            time.sleep(0.5)
        raise AssertionError(f"POST {path} got no answer for {PATIENCE_SECONDS:.0f} s: {answer.text}")


def _has_ended(processes: Stack, job_id: uuid.UUID) -> bool:
    try:
        return processes.job(job_id).finished_at is not None
    except Exception:  # Postgres is being restarted
        return False


# --- the storm and after ---


def _storm(killer: Killer, processes: Stack, api: Rest, parsed: argparse.Namespace) -> Accepted:
    accepted, over = Accepted(), threading.Event()
    client = Client(api, accepted, parsed.seed)
    client.prepare(processes.settings.home, processes)
    print(f"calm: {len(client.scan_ids)} scans stored, one model trained. {parsed.minutes} minutes of storm follow.")
    threading.Timer(parsed.minutes * 60, over.set).start()
    with _alongside(client.live, processes, over):
        # Not in a thread: Linux would end the servers that it starts anew together with the thread.
        killer.rage(over)
    return accepted


@contextmanager
def _alongside(work: Any, *arguments: Any) -> Iterator[None]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work(*arguments)
        except BaseException as error:  # a storm whose client or killer died has shown nothing
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    if errors:
        raise errors[0]


def _finish(killer: Killer, processes: Stack) -> int:
    """Wait until everything has ended. Returns how many jobs have not in time."""
    unfinished = select(func.count()).select_from(Job).where(Job.finished_at.is_(None))
    deadline = time.monotonic() + FINISH_SECONDS
    left = -1
    while left and time.monotonic() < deadline:
        time.sleep(1)
        killer.mend()
        with processes.sessions() as session:
            left = session.scalar(unfinished) or 0
    return left


def _verdict(
    killer: Killer, processes: Stack, accepted: Accepted, stuck: int, parsed: argparse.Namespace
) -> dict[str, Any]:
    with processes.sessions() as session:
        known = set(session.scalars(select(Job.id)))
        doubled = "SELECT count(*) FROM (SELECT job_id, ordinal FROM scan_results GROUP BY 1, 2 HAVING count(*) > 1) d"
        scans = dict(session.execute(select(ScanResult.state, func.count()).group_by(ScanResult.state)).all())  # type: ignore[arg-type]
        found: dict[str, Any] = {
            "seed": parsed.seed,
            "minutes": parsed.minutes,
            "blows": dict(killer.done),
            "kills": sum(killer.done.values()),
            "answers_lost_and_asked_again": accepted.answers_lost,
            "jobs": dict(session.execute(select(Job.state, func.count()).group_by(Job.state)).all()),  # type: ignore[arg-type]
            "scans": scans,
            "units": session.scalar(select(func.count()).select_from(Unit)),
            "units_rerun": session.scalar(select(func.count()).select_from(Unit).where(Unit.attempt > 1)),
            "resumed_trainings": session.scalar(text("SELECT count(*) FROM job_events WHERE type = 'resumed'")),
            "jobs_lost": len(set(accepted.jobs) - known),
            "jobs_stuck": stuck,
            "scans_lost": scans.get("pending", 0),
            "scans_doubled": session.scalar(text(doubled)),
            "faults": faults(session),
        }
    took = recoveries(processes.sessions, killer.losses)
    found["losses"], found["longest_recovery_seconds"] = len(took), round(max(took, default=0.0), 1)
    found["recovery_bound_seconds"] = processes.settings.lease_seconds + 15
    found["verdict"] = _word(found)
    return found


def _word(found: dict[str, Any]) -> str:
    lost = [name for name in ("jobs_lost", "jobs_stuck", "scans_lost", "scans_doubled", "faults") if found[name]]
    if found["longest_recovery_seconds"] > found["recovery_bound_seconds"]:
        lost.append("longest_recovery_seconds")
    return "nothing was lost" if not lost else "LOST: " + ", ".join(lost)


def _report(verdict: dict[str, Any], seed: int) -> None:
    out = ROOT / "bench" / "out" / f"storm-{seed}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(verdict, indent=1) + "\n", encoding="utf-8")
    for name, value in verdict.items():
        print(f"{name.replace('_', ' '):30} {value}")
    print(f"written: {out.relative_to(ROOT)}")


if __name__ == "__main__":
    raise SystemExit(main())
