"""A Postgres or a Redis of the test's own, which may be killed, paused, emptied, and started again on the same port."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from cli.stack import launch
from cli.stack.embedded import wait_until_ready
from cli.stack.postgres import postgres_environ, prepare_postgres
from cli.stack.redis_server import prepare_redis
from cli.stack.server_plan import ServerPlan


class Server:
    """A server that is mistreated."""

    def __init__(self, plan: ServerPlan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        self._log = folder / "logs" / f"{plan.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = plan.url

    def start(self) -> None:
        """Start it on the port and the data that it had, and wait until it answers."""
        if self._process is None:
            self._process = launch.start(self._plan.command, self._log, postgres_environ())
            wait_until_ready(self._plan, self._process, self._log)

    def kill(self) -> None:
        """kill -9, with all its processes."""
        self._end(signal.SIGKILL)

    def quit(self) -> None:
        """SIGQUIT: what Postgres calls an immediate shutdown; it recovers from its log at the next start."""
        self._end(signal.SIGQUIT)

    def pause(self) -> None:
        """SIGSTOP: connections stand, nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """Killed and started again."""
        self.kill()
        self.start()

    def wipe(self) -> None:
        """Lose all data of a killed Redis."""
        assert self._process is None, "kill it first"
        for path in (self._folder / "redis").iterdir():
            if path.name != "redis.conf":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """End it for good."""
        if self._process is not None:
            self.resume()
            launch.stop(self._process, self._plan.stop_signal, grace_seconds=10)
            self._process = None

    def _tree(self) -> list[psutil.Process]:
        assert self._process is not None
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        tree = self._tree()
        for process in tree if number == signal.SIGKILL else tree[:1]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(tree, timeout=10)
        self._process.wait(10)
        self._process = None


@contextmanager
def own_redis(folder: Path) -> Iterator[Server]:
    """A Redis for the length of the block."""
    with _running(Server(prepare_redis(folder), folder)) as server:
        yield server


@contextmanager
def own_postgres(folder: Path) -> Iterator[Server]:
    """A Postgres for the length of the block. It waits for the disk: without, a crash loses what was committed."""
    with _running(Server(prepare_postgres(folder, fsync=True), folder)) as server:
        yield server


@contextmanager
def _running(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.close()
