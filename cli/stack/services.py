"""What a stack consists of: one function for each long-running process, with its command and its environment."""

from __future__ import annotations

import http.client
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import make_url

from cli.stack.launch import bound_to_us
from cli.stack.orphan_reaper import Stage
from cli.stack.server_plan import LOOPBACK, ServerPlan
from cli.stack.supervisor import Service

REPOSITORY = Path(__file__).resolve().parent.parent.parent
MLFLOW_DATABASE = "renalq_mlflow"
"""Its own: MLflow and we both keep a table `alembic_version`."""


@dataclass(frozen=True)
class Home:
    """Where the parts of RENALQ_HOME lie."""

    path: Path

    @property
    def logs(self) -> Path:
        """One file a process."""
        return self.path / "logs"

    @property
    def admin_key(self) -> Path:
        """The first key, 0600, written once."""
        return self.path / "admin.key"

    @property
    def flower(self) -> Path:
        """Flower's address, user and password, 0600."""
        return self.path / "flower.txt"

    @property
    def state(self) -> Path:
        """Process ids, ports and addresses of the running stack, without passwords."""
        return self.path / "stack.json"

    @property
    def lock(self) -> Path:
        """Held by the running stack."""
        return self.path / "stack.lock"


def _python(*arguments: str) -> list[str]:
    return bound_to_us([sys.executable, "-m", *arguments])


def server(plan: ServerPlan) -> Service:
    """Postgres or Redis. libpq's PG… variables are emptied, which a Postgres server would obey as well."""
    unset = {name: "" for name in ("PGDATA", "PGPORT", "PGOPTIONS") if name in os.environ}
    return Service(plan.name, plan.command, Stage.SERVERS, unset, stop_signal=plan.stop_signal, grace_seconds=15)


def migration(environ: dict[str, str]) -> Service:
    """One-shot: brings the tables up to date."""
    command = _python("alembic", "-c", str(REPOSITORY / "alembic.ini"), "upgrade", "head")
    return Service("migrate", command, Stage.SERVICES, environ)


def api(environ: dict[str, str]) -> Service:
    """The REST API. Waiting clients are cut off after the grace time; they ask again."""
    conf = str(REPOSITORY / "api" / "gunicorn_conf.py")
    bind = f"{environ['RENALQ_HOST']}:{environ['RENALQ_PORT']}"
    command = _python("gunicorn", "-c", conf, "--bind", bind, "api:create_app()")
    # glibc gives threads heaps of their own, up to eight a core, and what they free stays in them.
    return Service("api", command, Stage.SERVICES, {**environ, "MALLOC_ARENA_MAX": "2"})


def dispatcher(environ: dict[str, str]) -> Service:
    """The only publisher."""
    return Service("dispatcher", _python("worker.dispatcher"), Stage.SERVICES, environ)


def worker(name: str, queues: str, environ: dict[str, str]) -> Service:
    """One Celery worker. 15 s are enough to hand a unit back; one that hangs is killed, and its lease runs out."""
    app = _python("celery", "-A", "worker.app", "worker")
    options = ["--queues", queues, "--concurrency", "1", "--hostname", f"{name}@%h", "--loglevel", "INFO"]
    return Service(f"worker-{name}", [*app, *options], Stage.WORKERS, environ, grace_seconds=15, restarts=True)


def mlflow(port: int, store: str, artifacts: Path, environ: dict[str, str]) -> Service:
    """Tracking. The store's URL holds a password and so goes by environment, not by argument."""
    options = ["--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    command = _python("mlflow", "server", *options, "--artifacts-destination", str(artifacts))
    quiet = {
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else it runs task queues that we have no use for
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    return Service("mlflow", command, Stage.SERVICES, {**environ, **quiet}, stop_signal=signal.SIGTERM)


def mlflow_store(database_url: str) -> str:
    """The URL of MLflow's own database beside ours."""
    return make_url(database_url).set(database=MLFLOW_DATABASE).render_as_string(hide_password=False)


def flower(port: int, password: str, environ: dict[str, str]) -> Service:
    """Celery's monitor, on loopback and behind a password, which goes by environment, not by argument."""
    command = _python("celery", "-A", "worker.app", "flower", f"--address={LOOPBACK}", f"--port={port}")
    return Service("flower", command, Stage.WORKERS, {**environ, "FLOWER_BASIC_AUTH": f"renalq:{password}"})


def http_status(host: str, port: int, path: str, seconds: float = 5.0) -> int:
    """Status of a GET without proxies and redirects; 0 if nobody answers."""
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()
