"""What another user of the same machine gets out of a running stack: nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
import requests
from psycopg2 import errors
from sqlalchemy.engine import URL, make_url

from tests.whole_stack import RunningStack

pytestmark = pytest.mark.slow

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def as_nobody(look: Callable[[], list[str]], folder: Path) -> list[str]:
    """What a function returns in a process of nobody's, which stands in a folder however closed those above it are."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os.write(writing, json.dumps(look()).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        seen = stream.read()
    os.waitpid(pid, 0)
    return list(json.loads(seen))


def _environ(stack: RunningStack, name: str) -> dict[str, str]:
    return psutil.Process(stack.state()["pids"][name]).environ()


def _secrets(stack: RunningStack) -> set[str]:
    """Keys and passwords in its files and in the environments of its processes."""
    files = ("admin.key", "postgres.password", "redis.password")
    found = {(stack.home / name).read_text().strip() for name in files}
    found |= {(stack.home / name).read_text().split()[-1] for name in ("flower.txt", "mlflow.txt")}
    for name, variable in (("api", "RENALQ_DATABASE_URL"), ("mlflow", "MLFLOW_BACKEND_STORE_URI")):
        found.add(str(make_url(_environ(stack, name)[variable]).password))
    return found


@as_root
def test_another_user_reads_no_file_of_home(whole_stack: RunningStack) -> None:
    files = [str(path.relative_to(whole_stack.home)) for path in whole_stack.home.rglob("*")]
    assert len(files) > 100

    def look() -> list[str]:
        return [path for path in [".", *files] if _reads(path) or _writes(path)]

    assert as_nobody(look, whole_stack.home) == []


def _reads(path: str) -> bool:
    try:
        os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()  # noqa: PTH112, PTH123, PTH208
    except OSError:
        return False
    return True


def _writes(folder: str) -> bool:
    return os.access(folder, os.W_OK)


def test_every_file_of_home_is_for_its_owner_alone(whole_stack: RunningStack) -> None:
    """Also where HOME itself would be opened."""
    open_to_others = [path for path in whole_stack.home.rglob("*") if path.lstat().st_mode & 0o077]
    assert [path for path in open_to_others if not path.is_symlink()] == []


@as_root
def test_arguments_and_environments_in_proc_tell_another_user_no_secret(whole_stack: RunningStack) -> None:
    pids, secrets = whole_stack.everyone(), _secrets(whole_stack)

    def look() -> list[str]:
        seen = [_text(f"/proc/{pid}/{name}") for pid in pids for name in ("cmdline", "environ")]
        assert sum(map(bool, seen)) >= len(pids), "arguments are for everybody"
        return [secret for secret in secrets if any(secret in text for text in seen)]

    assert len(secrets) == 7
    assert as_nobody(look, Path("/")) == []


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


# --- Postgres ---


@pytest.fixture
def application(whole_stack: RunningStack) -> URL:
    """The URL that API and workers have."""
    return make_url(_environ(whole_stack, "api")["RENALQ_DATABASE_URL"])


def _connect(url: URL, database: str | None = None) -> Any:
    login = {"host": url.host, "port": url.port, "user": url.username, "password": url.password}
    return closing(psycopg2.connect(**login, dbname=database or url.database, connect_timeout=5))


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT pg_read_file('/etc/hostname')", "SELECT pg_ls_dir('/')", "COPY (SELECT 1) TO PROGRAM 'true'",
        "COPY jobs FROM '/etc/passwd'", "SELECT lo_import('/etc/passwd')", "SELECT rolpassword FROM pg_authid",
        "CREATE TABLE new ()", "CREATE TEMPORARY TABLE new ()", "CREATE SCHEMA new", "ALTER TABLE jobs ADD new int",
        "DROP TABLE jobs", "TRUNCATE jobs", "ALTER TABLE job_events DISABLE TRIGGER ALL", "CREATE ROLE new",
        "SET ROLE renalq_owner", "ALTER ROLE renalq_app SUPERUSER",
    ],
)  # fmt: skip
def test_the_application_changes_rows_and_nothing_else(application: URL, statement: str) -> None:
    with _connect(application) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM jobs")
        with pytest.raises(errors.InsufficientPrivilege):
            cursor.execute(statement)


@pytest.mark.parametrize("database", ["renalq_mlflow", "postgres", "template1"])
def test_the_application_connects_to_no_other_database(application: URL, database: str) -> None:
    with (
        pytest.raises(psycopg2.OperationalError, match="permission denied for database"),
        _connect(application, database),
    ):
        pass


def test_mlflow_owns_its_own_database_and_sees_no_other(whole_stack: RunningStack) -> None:
    url = make_url(_environ(whole_stack, "mlflow")["MLFLOW_BACKEND_STORE_URI"])
    with _connect(url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT datname FROM pg_database WHERE pg_get_userbyid(datdba) = current_user")
        assert cursor.fetchall() == [("renalq_mlflow",)]
        with pytest.raises(errors.InsufficientPrivilege):
            cursor.execute("SELECT pg_read_file('/etc/hostname')")
    with pytest.raises(psycopg2.OperationalError, match="permission denied for database"), _connect(url, "renalq"):
        pass


# --- MLflow ---


class MLflow:
    """Its REST interface."""

    def __init__(self, address: str, login: tuple[str, str] | None) -> None:
        self._session, self._address = requests.Session(), address
        self._session.auth = login

    def __call__(self, method: str, path: str, **more: Any) -> requests.Response:
        return self._session.request(method, self._address + path, timeout=20, **more)


def _mlflow(stack: RunningStack) -> tuple[str, tuple[str, str]]:
    told = dict(line.split(": ", 1) for line in (stack.home / "mlflow.txt").read_text().splitlines())
    return told["address"], (told["user"], told["password"])


EXPERIMENTS = "/api/2.0/mlflow/experiments"
ROUTES = [
    ("GET", "/"), ("GET", "/version"), ("GET", "/get-artifact?run_id=a&path=b"), ("POST", "/graphql"),
    ("GET", "/signup"), ("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/v1/traces"), ("GET", "/gateway/"),
    ("POST", f"{EXPERIMENTS}/search"), ("POST", "/ajax-api/2.0/mlflow/experiments/create"),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts"), ("GET", "/api/2.0/mlflow-artifacts/artifacts/a"),
    ("PUT", "/api/2.0/mlflow-artifacts/artifacts/a"), ("POST", "/api/2.0/mlflow/users/create"),
    ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid=a&path=b"), ("GET", "/ajax-api/3.0/jobs/a"),
    ("GET", "/ajax-api/3.0/mlflow/assistant/config"),
]  # fmt: skip


@pytest.mark.parametrize("password", [None, "wrong"])
def test_mlflow_answers_nobody_without_its_login(whole_stack: RunningStack, password: str | None) -> None:
    address, (user, _) = _mlflow(whole_stack)
    ask = MLflow(address, (user, password) if password else None)
    answers = {(method, path): ask(method, path, json={}).status_code for method, path in ROUTES}
    assert {route: status for route, status in answers.items() if status not in (401, 403)} == {}


@pytest.fixture
def mlflow(whole_stack: RunningStack) -> MLflow:
    """With the login: what a person who may see runs can do."""
    return MLflow(*_mlflow(whole_stack))


@pytest.fixture
def link(whole_stack: RunningStack, tmp_path: Path) -> str:
    """A link to RENALQ_HOME, as anybody may make one."""
    (tmp_path / "link").symlink_to(whole_stack.home)
    return str(tmp_path / "link")


@pytest.mark.parametrize(
    "place", ["{}", "file://{}", "s3://bucket/x", "mlflow-artifacts:/../..", "http://127.0.0.1:1/x"]
)
@pytest.mark.parametrize("wrapped", [dict, json.dumps], ids=["object", "text"])
@pytest.mark.parametrize("name", ["artifact_location", "artifactLocation"])
def test_an_experiment_with_a_folder_of_its_own_is_refused(
    mlflow: MLflow, link: str, name: str, wrapped: Any, place: str
) -> None:
    body = wrapped({"name": f"{name} {place}", name: place.format(link)})
    for prefix in ("/api", "/ajax-api"):
        refused = mlflow("POST", f"{prefix}/2.0/mlflow/experiments/create", json=body)
        assert (refused.status_code, refused.json()["message"].split(":")[-1]) == (400, " leave out artifact_location.")


@pytest.fixture
def old_run(whole_stack: RunningStack, mlflow: MLflow, link: str) -> Iterator[str]:
    """A run in an experiment that an older release took, whose folder is the link."""
    url = make_url(_environ(whole_stack, "mlflow")["MLFLOW_BACKEND_STORE_URI"])
    made = mlflow("POST", f"{EXPERIMENTS}/create", json={"name": f"old {link}"}).json()["experiment_id"]
    with _connect(url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "UPDATE experiments SET artifact_location = %s WHERE experiment_id = %s", (f"file://{link}", made)
        )
        connection.commit()
    run = mlflow("POST", "/api/2.0/mlflow/runs/create", json={"experiment_id": made}).json()["run"]["info"]
    assert run["artifact_uri"].startswith(f"file://{link}")
    with _connect(url) as connection, connection.cursor() as cursor:  # files of HOME itself
        cursor.execute("UPDATE runs SET artifact_uri = %s WHERE run_uuid = %s", (f"file://{link}", run["run_id"]))
        connection.commit()
    yield run["run_id"]
    mlflow("POST", f"{EXPERIMENTS}/delete", json={"experiment_id": made})


def test_an_older_experiment_leads_to_no_file_of_home(whole_stack: RunningStack, mlflow: MLflow, old_run: str) -> None:
    read = mlflow("GET", f"/get-artifact?run_id={old_run}&path=admin.key")
    listed = mlflow("GET", f"/api/2.0/mlflow/artifacts/list?run_id={old_run}")
    written = mlflow("POST", f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={old_run}&path=planted", data=b"x")
    assert [answer.status_code for answer in (read, listed, written)] == [400] * 3, [
        read.text,
        listed.text,
        written.text,
    ]
    assert whole_stack.key() not in read.text
    assert not (whole_stack.home / "planted").exists()


def test_the_first_page_leads_to_the_runs(mlflow: MLflow) -> None:
    page = mlflow("GET", "/")
    assert page.headers["Content-Type"].startswith("text/html")
    assert 'location.replace("#/experiments' in page.text
    assert '<div id="root"' in page.text, "MLflow's own page"
