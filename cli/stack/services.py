"""The processes of a stack: one function for each, which returns its command and its environment."""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Callable
from pathlib import Path

from cli.stack.home import LOGIN_USER
from cli.stack.launch import with_pdeathsig
from cli.stack.orphan_reaper import Stage
from cli.stack.postgres import DatabaseUrls
from cli.stack.server_plan import LOOPBACK, ServerPlan
from cli.stack.supervisor import Service

REPOSITORY = Path(__file__).resolve().parent.parent.parent
OK, UNAUTHORIZED = 200, 401


def _python(*arguments: str) -> list[str]:
    return with_pdeathsig([sys.executable, "-m", *arguments])


def server(plan: ServerPlan) -> Service:
    """Postgres or Redis. The PG… variables of libpq are emptied: a Postgres server obeys them as well."""
    unset = {name: "" for name in ("PGDATA", "PGPORT", "PGOPTIONS") if name in os.environ}
    return Service(
        plan.name, plan.command, Stage.SERVERS, unset, plan.stop_signal, grace_seconds=15, answers=plan.answers
    )


def roles(urls: DatabaseUrls) -> Service:
    """Make databases and roles on a server of our own; ends by itself."""
    environ = {
        "RENALQ_SUPERUSER_URL": urls.superuser,
        "RENALQ_OWNER_URL": urls.owner,
        "RENALQ_DATABASE_URL": urls.application,
        "RENALQ_MLFLOW_STORE": urls.mlflow,
    }
    return Service("roles", _python("migrations.roles"), Stage.SERVICES, environ)


def migration(environ: dict[str, str], owner_url: str) -> Service:
    """Bring the tables up to date, as the role that owns them; ends by itself."""
    command = _python("alembic", "-c", str(REPOSITORY / "alembic.ini"), "upgrade", "head")
    return Service("migrate", command, Stage.SERVICES, {**environ, "RENALQ_DATABASE_URL": owner_url})


def api(environ: dict[str, str]) -> Service:
    """The REST API. Waiting clients are disconnected after the grace time; they ask again."""
    conf = str(REPOSITORY / "api" / "gunicorn_conf.py")
    bind = f"{environ['RENALQ_HOST']}:{environ['RENALQ_PORT']}"
    live = connectable(environ["RENALQ_HOST"]), int(environ["RENALQ_PORT"]), "/health/live"
    command = _python("gunicorn", "-c", conf, "--bind", bind, "api:create_app()")
    # glibc gives threads their own heaps, up to eight per core, and never returns what they free.
    return Service("api", command, Stage.SERVICES, {**environ, "MALLOC_ARENA_MAX": "2"}, answers=_gives(live, OK))


def dispatcher(environ: dict[str, str]) -> Service:
    """The dispatcher, the only publisher to Celery."""
    return Service("dispatcher", _python("worker.dispatcher"), Stage.SERVICES, environ)


def worker(name: str, queues: str, environ: dict[str, str]) -> Service:
    """One Celery worker. 15 s are enough to hand a unit back; a hung worker is killed, and its lease expires."""
    app = _python("celery", "-A", "worker.app", "worker")
    options = ["--queues", queues, "--concurrency", "1", "--hostname", f"{name}@%h", "--loglevel", "INFO"]
    return Service(f"worker-{name}", [*app, *options], Stage.WORKERS, environ, grace_seconds=15)


def mlflow(port: int, store: str, folder: Path, password: str) -> Service:
    """The tracking server, behind a login, and with no right to any other part of RENALQ_HOME than `folder`.

    Store and password are passed by environment, not by argument.
    """
    command = _python("worker.tracking.server", "--host", LOOPBACK, "--port", str(port), "--folder", str(folder))
    login = {"MLFLOW_AUTH_ADMIN_USERNAME": LOGIN_USER, "MLFLOW_AUTH_ADMIN_PASSWORD": password}
    environ, answers = {"MLFLOW_BACKEND_STORE_URI": store, **login}, _gives((LOOPBACK, port, "/health"), OK)
    return Service("mlflow", command, Stage.SERVICES, environ, essential=False, answers=answers)


def tracking_login(password: str) -> dict[str, str]:
    """What MLflow's client reads, to log in."""
    return {"MLFLOW_TRACKING_USERNAME": LOGIN_USER, "MLFLOW_TRACKING_PASSWORD": password}


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
    login = {"FLOWER_BASIC_AUTH": f"{LOGIN_USER}:{password}"}
    answers = _gives((LOOPBACK, port, "/"), UNAUTHORIZED)
    return Service("flower", command, Stage.WORKERS, {**environ, **login}, essential=False, answers=answers)


def connectable(host: str) -> str:
    """The address at which a server that binds to `host` is reached from this machine."""
    return LOOPBACK if host in ("0.0.0.0", "::", "") else host  # noqa: S104 (compared, not bound)


def _gives(place: tuple[str, int, str], status: int) -> Callable[[], bool]:
    """Whether a GET of this host, port and path is answered with that status."""
    return lambda: http_status(*place) == status


def http_status(host: str, port: int, path: str, seconds: float = 2.0) -> int:
    """Status of a GET without proxies and redirects; 0 if there is no answer."""
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()
