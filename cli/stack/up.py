"""`renalq up`: all of RenalQ on one machine, from this virtual environment alone.

Order of start: postgres and redis → databases → migrations → first admin key → mlflow, api, dispatcher, workers,
flower. They stop in the reverse order, so that workers hand their units back while Postgres still runs.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import psycopg2
from rich.console import Console
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from cli.stack import services
from cli.stack.home import Home, locked, write_secret
from cli.stack.launch import CannotStartError
from cli.stack.postgres import create_database, prepare_postgres
from cli.stack.redis_server import prepare_redis
from cli.stack.server_plan import LOOPBACK, START_SECONDS, ServerPlan, free_port
from cli.stack.supervisor import ServiceDiedError, StopRequestedError, Supervisor
from jobs import keys
from jobs.db import session_factory
from jobs.settings import Settings

MIGRATE_SECONDS = 60.0
READY_SECONDS = 120.0


@dataclass(frozen=True)
class Options:
    """The options of `renalq up`."""

    flower: bool = True
    mlflow: bool = True


@dataclass
class Stack:
    """One run of `renalq up`."""

    settings: Settings
    options: Options
    home: Home
    console: Console
    supervisor: Supervisor
    began: float = field(default_factory=time.monotonic)
    addresses: dict[str, str] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)

    def say(self, name: str, text: str = "") -> None:
        """One line of progress."""
        seconds = time.monotonic() - self.began
        self.console.print(f"[green]✓[/] {name:<15} {seconds:5.1f} s  {text}", highlight=False, soft_wrap=True)


def up(options: Options, console: Console) -> int:
    """Run the stack until a signal (returns 0) or the death of a service (1).

    Raises:
        CannotStartError: nothing could be started.
    """
    settings = Settings()
    home = Home(settings.home.resolve())
    home.path.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds patients' scans
    with locked(home, console) as lock:
        home.state.unlink(missing_ok=True)  # left by a stack that was killed
        _require_free(settings.host, settings.port)
        home.rotate_logs()

        def report(text: str) -> None:
            console.print(f"[yellow]![/] {text}", highlight=False, soft_wrap=True)

        try:
            with Supervisor(home.logs, services.REPOSITORY, lock, report) as supervisor:
                stack = Stack(settings, options, home, console, supervisor)
                _start(stack)
                supervisor.watch()
        except StopRequestedError as asked:
            console.print(f"Stopped ({asked}).", highlight=False)
            return 0
        except ServiceDiedError as death:
            console.print(f"[red]✗[/] {death}", highlight=False, soft_wrap=True)
            return 1
        finally:
            home.state.unlink(missing_ok=True)
    return 0


def _start(stack: Stack) -> None:
    database_url, redis_url = _start_servers(stack)
    stack.environ = {
        "RENALQ_HOME": str(stack.home.path),
        "RENALQ_HOST": stack.settings.host,
        "RENALQ_PORT": str(stack.settings.port),
        "RENALQ_DATABASE_URL": database_url,
        "RENALQ_REDIS_URL": redis_url,
        "PYTHONUNBUFFERED": "1",
    }
    _start_mlflow(stack, database_url)
    stack.supervisor.run(services.migration(stack.environ), MIGRATE_SECONDS)
    stack.say("tables", "up to date")
    _first_key(stack.home, database_url)
    _start_services(stack)
    _write_state(stack, ready=False)
    _wait_until_ready(stack)
    _write_state(stack, ready=True)
    _announce(stack)


def _start_servers(stack: Stack) -> tuple[str, str]:
    """URLs of Postgres and Redis: those given, or of servers that are started here side by side."""
    given = stack.settings.model_fields_set
    fsync = os.environ.get("RENALQ_DEV_FSYNC", "on") != "off"
    plans: dict[str, ServerPlan] = {}
    if "database_url" not in given:
        plans["postgres"] = prepare_postgres(stack.home.path, fsync)
    if "redis_url" not in given:
        plans["redis"] = prepare_redis(stack.home.path)
    for plan in plans.values():
        stack.supervisor.start(services.server(plan))
    for plan in plans.values():
        stack.supervisor.wait_for(plan.answers, f"{plan.name} to answer", START_SECONDS)
        stack.say(plan.name, _host_port(plan.url))
        stack.addresses[plan.name] = _host_port(plan.url)
    if "postgres" in plans:
        create_database(plans["postgres"].url, "renalq")
    database_url = plans["postgres"].url if "postgres" in plans else stack.settings.database_url
    return database_url, plans["redis"].url if "redis" in plans else stack.settings.redis_url


def _host_port(url: str) -> str:
    parts = make_url(url)
    return f"{parts.host}:{parts.port}"


def _start_mlflow(stack: Stack, database_url: str) -> None:
    """Started before the other services because it is the slowest. A given RENALQ_MLFLOW_URL is used instead."""
    if stack.settings.mlflow_url or not stack.options.mlflow:
        return
    folder, port = stack.home.path / "mlflow", free_port()
    folder.mkdir(exist_ok=True)
    store = services.mlflow_store(database_url)
    try:
        create_database(database_url, services.MLFLOW_DATABASE)
    except psycopg2.Error:
        store = f"sqlite:///{folder / 'mlflow.db'}"  # a given Postgres may not allow another database
    stack.supervisor.start(services.mlflow(port, store, folder / "artifacts", stack.environ))
    stack.addresses["mlflow"] = f"http://{LOOPBACK}:{port}"
    stack.environ["RENALQ_MLFLOW_URL"] = stack.environ["RENALQ_MLFLOW_PUBLIC_URL"] = stack.addresses["mlflow"]


def _first_key(home: Home, database_url: str) -> None:
    """Keep the key in the file while it is valid; otherwise create one."""
    sessions = session_factory(database_url, pool_size=1)
    try:
        with sessions.begin() as session:
            if not _is_valid(session, home.admin_key):
                secret = keys.create(session, name="admin", scopes=[keys.Scope.ADMIN]).secret
                # Written before the commit: a file whose key was never committed is replaced at the next start.
                write_secret(home.admin_key, secret + "\n")
    finally:
        sessions.kw["bind"].dispose()


def _is_valid(session: Session, file: Path) -> bool:
    if not file.exists():
        return False
    file.chmod(0o600)
    return keys.authenticate(session, file.read_text().strip()) is not None


def _start_services(stack: Stack) -> None:
    environ, start = stack.environ, stack.supervisor.start
    start(services.api(environ))
    start(services.dispatcher(environ))
    start(services.worker("predict", "urgent,batch", environ))
    start(services.worker("train", "train", environ))
    if stack.options.flower:
        _start_flower(stack)


def _start_flower(stack: Stack) -> None:
    port, password = free_port(), secrets.token_urlsafe(18)
    address = f"http://{LOOPBACK}:{port}"
    stack.supervisor.start(services.flower(port, password, stack.home.flower_history, stack.environ))
    write_secret(stack.home.flower, f"address: {address}\nuser: renalq\npassword: {password}\n")
    stack.addresses["flower"] = address


def _wait_until_ready(stack: Stack) -> None:
    host, port = _connectable(stack.settings.host), stack.settings.port
    stack.addresses["api"] = f"http://{host}:{port}"

    def answers(path: str, expected: int, at: int = port) -> bool:
        return services.http_status(host, at, path) == expected

    wait = stack.supervisor.wait_for
    wait(lambda: answers("/health/live", 200), "the API to answer", READY_SECONDS)
    stack.say("api", stack.addresses["api"])
    wait(lambda: answers("/health/ready", 200), "/health/ready", READY_SECONDS)
    stack.say("workers", "ready: " + ", ".join(name for name in stack.supervisor.pids() if "worker" in name))
    for name, path, expected in (("mlflow", "/health", 200), ("flower", "/", 401)):
        if name in stack.addresses:
            at = make_url(stack.addresses[name]).port or 0
            wait(lambda p=path, e=expected, a=at: answers(p, e, a), f"{name} to answer", READY_SECONDS)  # type: ignore[misc]
            stack.say(name, stack.addresses[name])


def _connectable(host: str) -> str:
    return LOOPBACK if host in ("0.0.0.0", "::", "") else host  # noqa: S104 (compared, not bound)


def _announce(stack: Stack) -> None:
    lines = [f"RenalQ is ready at {stack.addresses['api']}   (documentation: /docs)"]
    lines += [f"  admin key  {stack.home.admin_key}"]
    if "flower" in stack.addresses:
        lines += [f"  Flower     {stack.addresses['flower']}   (user and password: {stack.home.flower})"]
    if "mlflow" in stack.addresses:
        lines += [f"  MLflow     {stack.addresses['mlflow']}"]
    lines += [f"  logs       {stack.home.logs}", "Stop with Ctrl-C."]
    stack.console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _write_state(stack: Stack, ready: bool) -> None:
    state = {
        "ready": ready,
        "pid": os.getpid(),
        "port": stack.settings.port,
        "addresses": stack.addresses,
        "pids": stack.supervisor.pids(),
        "logs": str(stack.home.logs),
    }
    draft = stack.home.state.with_suffix(".json.new")
    draft.write_text(json.dumps(state, indent=2) + "\n")
    draft.replace(stack.home.state)


def _require_free(host: str, port: int) -> None:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CannotStartError(
                f"Cannot listen on {host}:{port} ({error.strerror}): set RENALQ_PORT to a free port."
            ) from error
