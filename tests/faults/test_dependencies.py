"""Cases 17–27 of the acceptance: Redis, Postgres, the disk, the clock and MLflow fail, and nothing is lost."""

import datetime as dt
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path

import psutil
import psycopg2
import pytest
from alembic import command
from sqlalchemy.engine import make_url

from cli.stack.postgres import create_database, postgres_answers
from cli.stack.redis_server import ask_redis
from cli.stack.server_plan import free_port
from jobs.db import Sessions, make_engine, session_factory
from jobs.queue import processes as living
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore
from tests.api.conftest import png
from tests.databases import alembic_config
from tests.faults.disk import small_disk
from tests.faults.proxy import proxy
from tests.faults.rest import rest
from tests.faults.sabotage import Sabotage
from tests.faults.servers import Server, own_postgres, own_redis
from tests.faults.work import (
    attempts,
    batch,
    champion,
    events,
    expected,
    labels,
    single,
    tally,
    training,
    units,
    words,
    wrong,
)
from tests.processes import Stack, count, eventually, stack
from tests.tracking_server import mlflow_server

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Redis that may be mistreated."""
    with own_redis(tmp_path_factory.mktemp("own-redis")) as server:
        yield server


@pytest.fixture
def redis(redis_server: Server) -> Server:
    """The module's Redis, running and empty."""
    lose_redis(redis_server)
    redis_server.start()
    return redis_server


@pytest.fixture
def fragile(fast: Settings, sessions: Sessions, redis: Server) -> Iterator[Stack]:
    """A stack, without processes yet, on a Redis that may be mistreated."""
    with stack(fast.model_copy(update={"redis_url": redis.url}), sessions) as empty:
        yield empty


@pytest.fixture(scope="module")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Postgres that may be mistreated, with all tables."""
    with own_postgres(tmp_path_factory.mktemp("own-postgres")) as server:
        create_database(server.url, "renalq")
        engine = make_engine(server.url)
        with engine.connect() as connection:
            command.upgrade(alembic_config(connection), "head")
        engine.dispose()
        yield server


@pytest.fixture
def on_own_postgres(fast: Settings, postgres_server: Server) -> Iterator[Stack]:
    """A stack, without processes yet, on a Postgres that may be mistreated; a database of its own there."""
    postgres_server.start()
    name = f"test_{uuid.uuid4().hex[:12]}"
    with closing(psycopg2.connect(_plain(postgres_server.url, "postgres"))) as connection:
        connection.autocommit = True
        connection.cursor().execute(f'CREATE DATABASE "{name}" TEMPLATE renalq')
    url = make_url(postgres_server.url).set(database=name).render_as_string(hide_password=False)
    sessions = session_factory(url, pool_size=5)
    with stack(fast.model_copy(update={"database_url": url}), sessions) as empty:
        yield empty
    sessions.kw["bind"].dispose()


def lose_redis(server: Server) -> None:
    """Kill it, and lose all it had."""
    server.kill()
    server.wipe()


def test_17_redis_restarted_without_its_data(fragile: Stack, redis: Server, plan: Sabotage) -> None:
    """Redis restarted without its data → every job finishes.

    Guard: the row is the truth, and the dispatcher rings again. Without that the queued messages vanish, and their jobs
    stay queued for ever.
    """
    plan.network()
    fragile.start("dispatcher")
    jobs = [single(fragile) for _ in range(4)]
    eventually(lambda: ":1" in ask_redis(redis.url, "LLEN urgent"), 30, fragile.logs)
    lose_redis(redis)
    redis.start()
    fragile.start("predict", environ=plan.environ())
    assert [fragile.wait_for(job_id).state for job_id in jobs] == ["succeeded"] * 4, fragile.logs()

    lose_redis(redis)  # and once more under a worker that listens
    redis.start()
    assert fragile.wait_for(batch(fragile, words(20))).state == "succeeded", fragile.logs()
    assert wrong(fragile) == []


def test_18_redis_dies_while_a_unit_finishes(fragile: Stack, redis: Server, plan: Sabotage) -> None:
    """Redis dies while a unit finishes → succeeded.

    Guard: a unit's end is written to Postgres alone (`task_ignore_result`). Were the state kept in Celery's result
    backend, this would be recorded as FAILURE.
    """
    plan.network()
    end = plan.at("jobs.queue.lifecycle:succeed", "pause")
    fragile.start("dispatcher")
    fragile.start("predict", environ=plan.environ())
    job_id = batch(fragile, words(10))
    eventually(lambda: end.happened() or fragile.job(job_id).finished_at, 30, fragile.logs)
    redis.kill()
    end.release()
    assert fragile.wait_for(job_id).state == "succeeded", fragile.logs()
    assert attempts(fragile, job_id) == [1]

    redis.start()
    assert fragile.wait_for(single(fragile)).state == "succeeded", "the worker has come back"
    assert wrong(fragile) == []


def test_19_redis_half_open(fast: Settings, sessions: Sessions, redis: Server, plan: Sabotage) -> None:
    """Redis half-open → recovers in 60 s; no API request blocks.

    The connections from before stay dead for ever, as after a power cut of Redis' machine; only new ones work again.
    Guard: `socket_timeout` and `health_check_interval` of the transport. With kombu's defaults the worker reads from
    the dead connection without end.
    """
    plan.network()
    address = make_url(redis.url)
    with proxy(str(address.host), int(address.port or 0)) as line:
        through = address.set(port=line.port).render_as_string(hide_password=False)
        with stack(fast.model_copy(update={"redis_url": through}), sessions, "dispatcher") as processes:
            processes.start("predict", environ=plan.environ())
            processes.alive()
            assert processes.wait_for(single(processes)).state == "succeeded", processes.logs()
            line.freeze()
            with rest(processes) as api:
                started = time.monotonic()
                answer = api.client().post("/jobs/predict", data={"file": (BytesIO(png()), "scan.png")})
                assert answer.status_code == 202, answer.json
                assert time.monotonic() - started < 2
            eventually(lambda: "broker_unreachable" in processes.log("dispatcher"), 30, processes.logs)
            line.thaw()
            thawed = time.monotonic()
            job_id = answer.json["id"] if answer.json else ""
            assert processes.wait_for(job_id, 60).state == "succeeded", processes.logs()
            assert time.monotonic() - thawed < 60
            assert wrong(processes) == []


def test_20_redis_down_at_submit(fragile: Stack, redis: Server, plan: Sabotage) -> None:
    """Redis down at submit → 202, runs when it is back.

    Guard: a submit writes rows and touches no Redis. If it published, the client would get an error, or a job that no
    row knows.
    """
    plan.network()
    champion(fragile)
    redis.kill()
    fragile.start("dispatcher")
    fragile.start("predict", environ=plan.environ())
    with rest(fragile) as api:
        answer = api.client().post("/jobs/predict", data={"file": (BytesIO(png()), "scan.png")})
    assert answer.status_code == 202, answer.json
    assert answer.json is not None
    eventually(lambda: "broker_unreachable" in fragile.log("dispatcher"), 30, fragile.logs)
    redis.start()

    job = fragile.wait_for(answer.json["id"])
    assert (job.state, job.attempt) == ("succeeded", 1), fragile.logs()
    assert wrong(fragile) == []


def test_21_postgres_backends_killed_and_postgres_restarted(
    on_own_postgres: Stack, postgres_server: Server, plan: Sabotage
) -> None:
    """A Postgres backend killed, then an immediate restart of Postgres mid-batch → exact results.

    Guard: results, counters and the unit's end are one transaction, repeated while Postgres is away. Written one by
    one, scans would be counted twice or not at all.
    """
    network = plan.network(seconds=0.05)
    processes = on_own_postgres
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    scans = words(60)
    job_id = batch(processes, scans)
    eventually(lambda: tally(processes, job_id)["succeeded"] >= 10, 30, processes.logs)
    seen = len(network.seen())
    kill_a_backend(postgres_server, "renalq-worker")
    eventually(lambda: len(network.seen()) >= seen + 5, 30, processes.logs)
    postgres_server.quit()
    postgres_server.start()

    job = processes.wait_for(job_id)
    assert (job.state, job.succeeded) == ("succeeded", 60), processes.logs()
    assert labels(processes, job_id) == expected(scans)
    assert wrong(processes) == []


def kill_a_backend(server: Server, application: str) -> None:
    """kill -9 of one server process of Postgres, which then restarts all others as well."""
    with closing(psycopg2.connect(_plain(server.url, "postgres"))) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pid FROM pg_stat_activity WHERE application_name = %s LIMIT 1", (application,))
        (pid,) = cursor.fetchone() or (None,)
    assert pid is not None
    psutil.Process(pid).kill()
    eventually(lambda: postgres_answers(server.url), 30)


def _plain(url: str, database: str) -> str:
    return make_url(url).set(drivername="postgresql", database=database).render_as_string(hide_password=False)


def test_22_postgres_down(on_own_postgres: Stack, postgres_server: Server, plan: Sabotage) -> None:
    """Postgres down → submit 503 with Retry-After, live 200, ready 503; workers stop claiming and come back by
    themselves.

    Guard: the dispatcher's and the workers' loops wait Postgres out, and the API answers its absence in one place.
    Without the first they end at the first error; without the second clients see 500.
    """
    plan.network()
    processes = on_own_postgres
    champion(processes)
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    processes.alive()
    with processes.sessions.begin() as session:
        living.upsert(session, living.Heartbeat("train@test/1", living.WORKER, ["train"]))
    with rest(processes) as api:
        client = api.client()
        eventually(lambda: client.get("/health/ready").status_code == 200, 30, processes.logs)
        postgres_server.quit()
        refused = client.post("/jobs/predict", data={"file": (BytesIO(png()), "scan.png")})
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert client.get("/health/live").status_code == 200
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json and ready.json["reasons"]) == (
            503,
            ["database: Postgres does not answer."],
        )
        eventually(lambda: "database_lost" in processes.log("dispatcher"), 30, processes.logs)
        eventually(lambda: "process_heartbeat_failed" in processes.log("predict"), 30, processes.logs)
        postgres_server.start()
        taken = client.post("/jobs/predict", data={"file": (BytesIO(png()), "scan.png")})
        assert taken.status_code == 202
    assert taken.json is not None
    assert processes.wait_for(taken.json["id"]).state == "succeeded", processes.logs()
    assert [process.poll() for process in processes.running.values()] == [None, None], "the same processes"
    assert wrong(processes) == []


def test_23_a_dispatcher_killed_between_commit_and_publish(processes: Stack, plan: Sabotage) -> None:
    """Dispatcher killed between commit and publish → rung again.

    Guard: a unit that was rung and not claimed is rung again. Without it the row says `dispatched`, and no message was
    ever sent.
    """
    plan.network()
    death = plan.at("worker.app:publish_unit", "kill")
    processes.start("predict", environ=plan.environ())
    processes.start("dispatcher", environ=plan.environ())
    job_id = single(processes)
    eventually(death.happened, 30, processes.logs)
    processes.running["dispatcher"].wait(10)
    (unit,) = units(processes, job_id)
    assert (unit.state, unit.rings) == ("dispatched", 1)
    processes.start("dispatcher", "another", environ=plan.environ())

    assert processes.wait_for(job_id).state == "succeeded", processes.logs()
    (unit,) = units(processes, job_id)
    assert (unit.attempt, unit.rings) == (1, 2)
    assert wrong(processes) == []


def test_24_two_dispatchers(processes: Stack, plan: Sabotage) -> None:
    """Two dispatchers → nothing claimed twice. (test_webhooks.py: no webhook sent twice for one event.)

    Guard: `FOR UPDATE SKIP LOCKED` and the due check in `doorbells.dispatch`, and behind them the claim. Without both a
    unit that both have rung runs twice.
    """
    network = plan.network()
    jobs = [batch(processes, words(40), chunk=4) for _ in range(3)] + [single(processes) for _ in range(10)]
    for name in ("one", "other"):
        processes.start("dispatcher", name)
        processes.start("predict", f"worker-{name}", environ=plan.environ())

    assert [processes.wait_for(job_id).state for job_id in jobs] == ["succeeded"] * 13, processes.logs()
    assert [attempts(processes, job_id) for job_id in jobs[3:]] == [[1]] * 10, "a chunk may have made room for them"
    assert len(network.seen()) == 130, "each scan was looked at once"
    assert wrong(processes) == []


def test_25_a_full_disk_while_an_artifact_is_written(fast: Settings, sessions: Sessions, plan: Sabotage) -> None:
    """Disk full while an artifact is written → STORAGE_FULL, old files whole, nothing half-written visible.

    Guard: a blob is written to a temporary file and named when it is complete; the error is known by its number.
    Without the first a torn file would stand under a good name.
    """
    disk = fast.home / "small"
    plan.training(seconds=0, model_bytes=8_000_000)
    with small_disk(disk, megabytes=4) as mounted:
        if not mounted:
            plan.at("jobs.storage.blobs:BlobStore.put_file", "enospc", once=False)
        settings = fast.model_copy(update={"artifacts_url": str(disk), "work_dir": fast.home / "work"})
        with stack(settings, sessions, "dispatcher") as processes:
            old = BlobStore(str(disk)).put(BytesIO(os.urandom(1_000_000)))
            processes.start("train", environ=plan.environ())
            job = processes.wait_for(training(processes))
            assert job.error is not None, processes.logs()
            assert (job.state, job.error["code"]) == ("failed", "STORAGE_FULL"), processes.logs()
            assert count(sessions, "SELECT count(*) FROM artifacts") == 0
            assert count(sessions, "SELECT count(*) FROM model_versions") == 0
            assert wrong(processes) == []
        with BlobStore(str(disk)).open(old.sha256) as stream:
            assert hashlib.sha256(stream.read()).hexdigest() == old.sha256
        files = [path for path in disk.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
        assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in files), files


def test_26_a_worker_whose_clock_is_two_hours_ahead(processes: Stack, plan: Sabotage, tmp_path: Path) -> None:
    """Worker's clock two hours ahead → no second execution.

    Guard: only Postgres' clock decides (`clock_timestamp()` in every verb). Were leases reckoned by `datetime.now()`, a
    dispatcher that is ahead would take every unit back at once.
    """
    network = plan.network()
    plan.clock(7200)
    processes.start("dispatcher", environ=plan.environ())
    processes.start("predict", environ=plan.environ())
    job_id = single(processes, "pause")
    eventually(network.paused, 30, processes.logs)
    (tmp_path / "right").mkdir()
    right = Sabotage(tmp_path / "right")
    right.network()
    processes.start("predict", "another", environ=right.environ())
    processes.alive(2)
    outlived = "SELECT count(*) FROM units WHERE clock_timestamp() > started_at + interval '4 seconds'"
    eventually(lambda: count(processes.sessions, outlived), 30, processes.logs)  # two leases long
    network.release()

    assert processes.wait_for(job_id).state == "succeeded", processes.logs()
    assert _hours_ahead(processes.log("predict")) == 2, "its clock was wrong indeed"
    assert (len(network.seen()), len(right.network().seen())) == (1, 0)
    assert attempts(processes, job_id) == [1]
    assert events(processes, job_id, "requeued") == []
    assert wrong(processes) == []


def _hours_ahead(log: str) -> int:
    """By how many hours the log's latest line is in the future."""
    latest = next(line for line in reversed(log.splitlines()) if line.startswith("{"))
    said = dt.datetime.fromisoformat(json.loads(latest)["timestamp"])
    return round((said - dt.datetime.now(dt.UTC)).total_seconds() / 3600)


def test_27_mlflow_down(fast: Settings, sessions: Sessions, plan: Sabotage) -> None:
    """MLflow down → training succeeds; the run is recorded when it is back.

    Guard: tracking has a thread and a column of its own (`jobs.tracked_at`). Without the thread the training would wait
    for a server that is not there; without the column nobody would know what is still to be told.
    """
    plan.training(seconds=0)
    port = free_port()
    tracked = {"mlflow_url": f"http://127.0.0.1:{port}", "mlflow_log_weights": False, "track_again_seconds": 1}
    settings = fast.model_copy(update=tracked)
    with stack(settings, sessions, "dispatcher") as processes:
        processes.start("train", environ=plan.environ())
        job_id = training(processes, epochs=2)
        assert processes.wait_for(job_id).state == "succeeded", processes.logs()
        assert processes.job(job_id).tracked_at is None
        with mlflow_server(fast.home, port):
            eventually(lambda: processes.job(job_id).tracked_at, 120, processes.logs)
            from mlflow import MlflowClient

            run = MlflowClient(tracking_uri=settings.mlflow_url).get_run(str(processes.job(job_id).mlflow_run_id))
            assert (run.info.status, run.data.tags["renalq.job_id"]) == ("FINISHED", str(job_id))
            assert run.data.metrics["test_f1"] == 0.9
            assert run.data.metrics["val_accuracy"] == 0.8
        assert wrong(processes) == []


def test_27_mlflow_half_open(fast: Settings, sessions: Sessions, plan: Sabotage) -> None:
    """MLflow takes connections and never answers → training succeeds, and its worker lives on.

    Guard: the watch lets go of a unit that has ended. Without that it takes the wait for MLflow after a job's end for a
    body that does not listen, and kills its own process.
    """
    plan.training(seconds=0)
    with proxy("127.0.0.1", 1) as line:
        line.freeze()
        settings = fast.model_copy(update={"mlflow_url": f"http://127.0.0.1:{line.port}"})
        with stack(settings, sessions, "dispatcher") as processes:
            processes.start("train", environ=plan.environ())
            job_id = training(processes, epochs=2)
            assert processes.wait_for(job_id).state == "succeeded", processes.logs()
            past = "SELECT count(*) FROM jobs WHERE finished_at < clock_timestamp() - interval '2 seconds'"
            eventually(lambda: count(sessions, past), 30)  # four times the grace
            assert "hung_worker_killed" not in processes.log("train"), processes.logs()
            assert wrong(processes) == []
