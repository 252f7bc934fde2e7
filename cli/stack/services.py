"""The processes of a stack: one function for each, which returns its command and its environment."""

from __future__ import annotations

import http.client
import os
import signal
import sys
from pathlib import Path

from sqlalchemy.engine import make_url

from cli.stack.launch import with_pdeathsig
from cli.stack.orphan_reaper import Stage
from cli.stack.server_plan import LOOPBACK, ServerPlan
from cli.stack.supervisor import Service

REPOSITORY = Path(__file__).resolve().parent.parent.parent
MLFLOW_DATABASE = "renalq_mlflow"
"""A database of its own: MLflow and RenalQ both have a table `alembic_version`."""


def _python(*arguments: str) -> list[str]:
    return with_pdeathsig([sys.executable, "-m", *arguments])


def server(plan: ServerPlan) -> Service:
    """Postgres or Redis. The PG… variables of libpq are emptied: a Postgres server obeys them as well."""
    unset = {name: "" for name in ("PGDATA", "PGPORT", "PGOPTIONS") if name in os.environ}
    return Service(plan.name, plan.command, Stage.SERVERS, unset, stop_signal=plan.stop_signal, grace_seconds=15)


def migration(environ: dict[str, str]) -> Service:
    """Bring the tables up to date; ends by itself."""
    command = _python("alembic", "-c", str(REPOSITORY / "alembic.ini"), "upgrade", "head")
    return Service("migrate", command, Stage.SERVICES, environ)


def api(environ: dict[str, str]) -> Service:
    """The REST API. Waiting clients are disconnected after the grace time; they ask again."""
    conf = str(REPOSITORY / "api" / "gunicorn_conf.py")
    bind = f"{environ['RENALQ_HOST']}:{environ['RENALQ_PORT']}"
    command = _python("gunicorn", "-c", conf, "--bind", bind, "api:create_app()")
    # glibc gives threads their own heaps, up to eight per core, and never returns what they free.
    return Service("api", command, Stage.SERVICES, {**environ, "MALLOC_ARENA_MAX": "2"})


def dispatcher(environ: dict[str, str]) -> Service:
    """The dispatcher, the only publisher to Celery."""
    return Service("dispatcher", _python("worker.dispatcher"), Stage.SERVICES, environ)


def worker(name: str, queues: str, environ: dict[str, str]) -> Service:
    """One Celery worker. 15 s are enough to hand a unit back; a hung worker is killed, and its lease expires."""
    app = _python("celery", "-A", "worker.app", "worker")
    options = ["--queues", queues, "--concurrency", "1", "--hostname", f"{name}@%h", "--loglevel", "INFO"]
    return Service(f"worker-{name}", [*app, *options], Stage.WORKERS, environ, grace_seconds=15, restarts=True)


def mlflow(port: int, store: str, artifacts: Path, environ: dict[str, str]) -> Service:
    """The tracking server. The store's URL contains a password, so it is passed by environment, not by argument."""
    options = ["--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    command = _python("mlflow", "server", *options, "--artifacts-destination", str(artifacts))
    quiet = {
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # otherwise it runs task queues that are not used here
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    return Service("mlflow", command, Stage.SERVICES, {**environ, **quiet}, stop_signal=signal.SIGTERM)


def mlflow_store(database_url: str) -> str:
    """The URL of MLflow's own database beside ours."""
    return make_url(database_url).set(database=MLFLOW_DATABASE).render_as_string(hide_password=False)


FLOWER_OPTIONS = (
    # It only shows: a task that is revoked here would be dispatched again. POST /jobs/ID/cancel ends a job.
    "--read-only=true",
    "--persistent=true",
    "--state-save-interval=30000",  # ms, besides at its end: it may be killed
    "--max-tasks=10000",  # all of them are saved each time, in 0.2 s
    "--tasks-columns=name,state,received,runtime,worker,kwargs,result,exception,uuid",
)
"""Of Flower, here and in docker-compose.yml: what happened is told with the jobs' ids, and survives a restart."""


def flower(port: int, password: str, history: Path, environ: dict[str, str]) -> Service:
    """Celery's monitor, on loopback and with a password, which is passed by environment, not by argument."""
    place = [f"--address={LOOPBACK}", f"--port={port}", f"--db={history}"]
    command = _python("celery", "-A", "worker.app", "flower", *place, *FLOWER_OPTIONS)
    return Service("flower", command, Stage.WORKERS, {**environ, "FLOWER_BASIC_AUTH": f"renalq:{password}"})


def http_status(host: str, port: int, path: str, seconds: float = 5.0) -> int:
    """Status of a GET without proxies and redirects; 0 if there is no answer."""
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()
