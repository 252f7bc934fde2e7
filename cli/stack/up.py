"""`renalq up`: all of RenalQ on one machine, from this virtual environment alone.

Order of start: postgres and redis → databases → migrations → first admin key → mlflow, api, dispatcher, workers,
flower. They stop in the reverse order, so that workers hand their units back while Postgres still runs. A process that
dies is started again, at the same address; only one that jobs need, and that does not stay alive, ends the stack.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from cli.stack import services
from cli.stack.home import Home, locked, write_login, write_secret
from cli.stack.ports import choose_ports, require_free
from cli.stack.postgres import DatabaseUrls, prepare_postgres
from cli.stack.redis_server import prepare_redis
from cli.stack.server_plan import LOOPBACK, START_SECONDS, ServerPlan
from cli.stack.supervisor import ServiceDiedError, StopRequestedError, Supervisor
from jobs import keys, stack_state
from jobs.db import session_factory
from jobs.settings import Settings
from jobs.stack_state import ServiceState, StackState

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
    ports: dict[str, int]
    ready: bool = False
    began: float = field(default_factory=time.monotonic)
    addresses: dict[str, str] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    tracking: dict[str, str] = field(default_factory=dict)
    """MLflow's login, for the processes that record there."""

    def say(self, name: str, text: str = "") -> None:
        """One line of progress."""
        seconds = time.monotonic() - self.began
        self.console.print(f"[green]✓[/] {name:<15} {seconds:5.1f} s  {text}", highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line of what goes wrong. It may be a line of a log, with brackets that are no markup of rich's."""
        with suppress(OSError, SystemExit):  # the terminal is gone: rich exits then, and the stack is to go on
            self.console.print(f"[yellow]![/] {escape(text)}", highlight=False, soft_wrap=True)

    def publish(self) -> None:
        """Write the home's stack.json."""
        state = StackState(
            ready=self.ready,
            pid=os.getpid(),
            port=self.settings.port,
            addresses=self.addresses,
            pids=self.supervisor.pids(),
            logs=str(self.home.logs),
            services=self.supervisor.statuses(),
        )
        with suppress(OSError):  # a full disk does not end the stack
            stack_state.write(self.home.path, state)


def up(options: Options, console: Console) -> int:
    """Run the stack until a signal (returns 0) or the death of a service (1).

    Raises:
        CannotStartError: nothing could be started.
    """
    settings = Settings()
    os.umask(0o077)  # for all that it and its children write: patients' scans, keys, passwords
    home = Home(settings.home.resolve())
    home.prepare()
    with locked(home, console) as lock:
        home.state.unlink(missing_ok=True)  # left by a stack that was killed
        require_free(settings.host, settings.port, "RENALQ_PORT")
        ports = choose_ports(settings, _own_parts(settings, options), home.ports)
        try:
            supervisor = Supervisor(home.logs, services.REPOSITORY, lock, settings.log_bytes)
            stack = Stack(settings, options, home, console, supervisor, ports)
            supervisor.on_event, supervisor.on_change = stack.warn, stack.publish
            with supervisor:
                _start(stack)
                supervisor.watch()
        except StopRequestedError as asked:
            console.print(f"Stopped ({asked}).", highlight=False)
            return 0
        except ServiceDiedError as death:
            console.print(f"[red]✗[/] {escape(str(death))}", highlight=False, soft_wrap=True)
            return 1
        finally:
            home.state.unlink(missing_ok=True)
    return 0


def _own_parts(settings: Settings, options: Options) -> list[str]:
    """Those parts with a port of their own that this stack starts; for the others the settings name a server."""
    wanted = {
        "postgres": "database_url" not in settings.model_fields_set,
        "redis": "redis_url" not in settings.model_fields_set,
        "mlflow": options.mlflow and not settings.mlflow_url,
        "flower": options.flower,
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def _start(stack: Stack) -> None:
    databases, redis_url = _start_servers(stack)
    stack.environ = {
        "RENALQ_HOME": str(stack.home.path),
        "RENALQ_HOST": stack.settings.host,
        "RENALQ_PORT": str(stack.settings.port),
        "RENALQ_DATABASE_URL": databases.application,
        "RENALQ_REDIS_URL": redis_url,
        "PYTHONUNBUFFERED": "1",
    }
    _start_mlflow(stack, databases.mlflow)
    stack.supervisor.run(services.migration(stack.environ, databases.owner), MIGRATE_SECONDS)
    stack.say("tables", "up to date")
    _first_key(stack.home, databases.application)
    _start_services(stack)
    _wait_until_ready(stack)
    stack.ready = True
    stack.publish()
    _announce(stack)


def _start_servers(stack: Stack) -> tuple[DatabaseUrls, str]:
    """URLs of the databases and of Redis: those given, or of servers that are started here side by side."""
    fsync, run_as = os.environ.get("RENALQ_DEV_FSYNC", "on") != "off", stack.settings.run_as
    plans: dict[str, ServerPlan] = {}
    if "postgres" in stack.ports:
        plans["postgres"] = prepare_postgres(stack.home.path, fsync, stack.ports["postgres"], run_as)
    if "redis" in stack.ports:
        plans["redis"] = prepare_redis(stack.home.path, stack.ports["redis"], run_as)
    for plan in plans.values():
        stack.supervisor.start(services.server(plan))
    for plan in plans.values():
        stack.supervisor.wait_until_running(plan.name, START_SECONDS)
        stack.say(plan.name, _host_port(plan.url))
        stack.addresses[plan.name] = _host_port(plan.url)
    databases = _databases(stack, plans.get("postgres"))
    return databases, plans["redis"].url if "redis" in plans else stack.settings.redis_url


def _databases(stack: Stack, own: ServerPlan | None) -> DatabaseUrls:
    """Each with its role, on a server of our own; a given server is used with the role that was given."""
    if own is None:
        given = stack.settings.database_url
        return DatabaseUrls(given, given, given, stack.settings.mlflow_store)
    databases = DatabaseUrls.on(own.url)
    stack.supervisor.run(services.roles(databases), MIGRATE_SECONDS)
    return replace(databases, mlflow=stack.settings.mlflow_store or databases.mlflow)


def _host_port(url: str) -> str:
    parts = make_url(url)
    return f"{parts.host}:{parts.port}"


def _start_mlflow(stack: Stack, store: str) -> None:
    """Started before the other services because it is the slowest. A given RENALQ_MLFLOW_URL is used instead."""
    if "mlflow" not in stack.ports:
        return
    home, port = stack.home, stack.ports["mlflow"]
    home.mlflow.mkdir(mode=0o700, exist_ok=True)
    address = f"http://{LOOPBACK}:{port}"
    password = write_login(home.mlflow_login, address)
    # A given Postgres may not allow another role: MLflow gets no other's.
    store = store or f"sqlite:///{home.mlflow / 'mlflow.db'}"
    stack.supervisor.start(services.mlflow(port, store, home.mlflow, password))
    stack.addresses["mlflow"] = address
    stack.environ["RENALQ_MLFLOW_URL"] = stack.environ["RENALQ_MLFLOW_PUBLIC_URL"] = address
    stack.tracking = services.tracking_login(password)


def _first_key(home: Home, database_url: str) -> None:
    """Keep the key in the file while it is valid; otherwise create one."""
    sessions = session_factory(database_url, pool_size=1)
    try:
        with sessions.begin() as session:
            if not _is_valid(session, home.admin_key):
                secret = keys.create(session, "admin", [keys.Scope.ADMIN, keys.Scope.OPERATOR]).secret
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
    start, tracking = stack.supervisor.start, {**stack.environ, **stack.tracking}
    start(services.api(stack.environ))
    start(services.dispatcher(tracking))
    start(services.worker("predict", "urgent,batch", tracking))
    start(services.worker("train", "train", tracking))
    if "flower" in stack.ports:
        _start_flower(stack)


def _start_flower(stack: Stack) -> None:
    port = stack.ports["flower"]
    address = f"http://{LOOPBACK}:{port}"
    password = write_login(stack.home.flower, address)
    stack.supervisor.start(services.flower(port, password, stack.home.flower_history, stack.environ))
    stack.addresses["flower"] = address


def _wait_until_ready(stack: Stack) -> None:
    host, port = services.connectable(stack.settings.host), stack.settings.port
    stack.addresses["api"] = f"http://{host}:{port}"
    stack.supervisor.wait_until_running("api", READY_SECONDS)
    stack.say("api", stack.addresses["api"])

    def is_ready() -> bool:
        return services.http_status(host, port, "/health/ready") == services.OK

    stack.supervisor.wait_for(is_ready, "/health/ready", READY_SECONDS)
    stack.say("workers", "ready: " + ", ".join(name for name in stack.supervisor.pids() if "worker" in name))
    for name in ("mlflow", "flower"):
        if name in stack.ports:
            _wait_for_optional(stack, name)


def _wait_for_optional(stack: Stack, name: str) -> None:
    """Until it answers, has died or takes too long: then the stack is ready without it."""
    supervisor, deadline = stack.supervisor, time.monotonic() + READY_SECONDS

    def is_known() -> bool:
        return supervisor.state(name) is not ServiceState.STARTING or time.monotonic() > deadline

    supervisor.wait_for(is_known, name, math.inf)
    if supervisor.state(name) is ServiceState.RUNNING:
        stack.say(name, stack.addresses[name])
    else:
        stack.warn(f"{name} does not answer yet; jobs go on without it")


def _announce(stack: Stack) -> None:
    lines = [f"RenalQ is ready at {stack.addresses['api']}   (documentation: /docs)"]
    lines += [f"  admin key  {stack.home.admin_key}"]
    if "flower" in stack.addresses:
        lines += [f"  Flower     {stack.addresses['flower']}   (user and password: {stack.home.flower})"]
    if "mlflow" in stack.addresses:
        lines += [f"  MLflow     {stack.addresses['mlflow']}   (user and password: {stack.home.mlflow_login})"]
    lines += [f"  logs       {stack.home.logs}", "Stop with Ctrl-C or renalq down."]
    stack.console.print("\n".join(lines), highlight=False, soft_wrap=True)
