"""DDP workers on one machine: start them, connect them, and make sure that none outlives the others.

The process that launches workers is their leader: it reports epochs and writes files. Workers are its children
(`python -m ml.image.learning.ddp_worker`); each reads its job from a file and runs the same training in step. A worker
exits when its stdin ends, that is when the leader is gone, and the leader kills the workers whenever it leaves the
group. If a worker dies, its connections break, so the others fail at their next collective. A process that hangs is
given up after `EXCHANGE_TIMEOUT`.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from ml.runtime.errors import BadParams, PipelineError, as_pipeline_error
from ml.runtime.process_group import SINGLE_PROCESS, ProcessGroup

EXCHANGE_TIMEOUT = timedelta(minutes=30)  # of a collective; a worker may wait this long for another's features
START_SECONDS = 180.0  # in which a worker must have loaded its job
DEATH_SECONDS = 5.0  # in which the death of a worker is noticed after its connection broke


class WorkerLost(PipelineError):
    """A process of the training died. The cause may be temporary, so trying again can help."""

    retryable = True


class Job(Protocol):
    """What a worker does. It is pickled, so its class must be importable."""

    def load(self) -> Callable[[ProcessGroup], None]:
        """Read everything from disk; the returned function is called when the whole group is connected."""
        ...


@dataclass(frozen=True)
class RankConfig:
    """A worker's rank, the size of its group, their common folder, and its job."""

    rank: int
    size: int
    folder: Path
    job: Job

    @property
    def ready(self) -> Path:
        """A file that exists when the job is loaded."""
        return self.folder / f"ready-{self.rank}"

    @property
    def failure(self) -> Path:
        """A JSON file with the error that ended this worker."""
        return self.folder / f"failure-{self.rank}"


@contextmanager
def launch_workers(size: int, job: Job, folder: Path | None = None) -> Iterator[ProcessGroup]:
    """Be the leader of a group of `size` processes, of which the others run `job`.

    `folder`: where a temporary folder for the group is created.

    Raises:
        BadParams: the machine has too few devices.
        PipelineError: the error of a worker, or WorkerLost.
    """
    if size == 1:
        yield SINGLE_PROCESS
        return
    require_devices(size)
    with tempfile.TemporaryDirectory(prefix="renalq-ddp-", dir=folder) as scratch, _sharing_cores(size):
        workers = _Workers([RankConfig(rank, size, Path(scratch), job) for rank in range(1, size)])
        group = ProcessGroup(0, size)
        try:
            workers.start()
            with connected(group, Path(scratch)), workers.watched():
                yield group
        except PipelineError:
            raise
        except Exception as error:
            raise workers.cause_of(error) from error
        finally:
            workers.kill()
            group.size = 1


def require_devices(size: int) -> None:
    """BadParams unless this machine has `size` GPUs or, if it has none, as many cores."""
    gpus, cores = torch.cuda.device_count(), max(2, os.cpu_count() or 1)
    if gpus and gpus < size:
        raise BadParams(f"devices: this machine has {gpus} GPUs; choose at most {gpus}.")
    if not gpus and cores < size:
        raise BadParams(f"devices: this machine has no GPU, and cores for {cores} processes; choose at most {cores}.")


@contextmanager
def connected(group: ProcessGroup, folder: Path) -> Iterator[None]:
    """Connect to the other processes, which find each other through a file in `folder`."""
    with_gpus = group.device().type == "cuda"
    if with_gpus:
        torch.cuda.set_device(group.device())
    with _loopback_only():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if with_gpus else "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=group.rank,
            world_size=group.size,
            timeout=EXCHANGE_TIMEOUT,
        )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _loopback_only() -> Iterator[None]:
    # By default gloo listens on the address of the host name, which may not be reachable in a container.
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if sys.platform == "linux" else ()
    added = {name: "lo" for name in names if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _sharing_cores(size: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // size))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Workers:
    """The worker processes, from the leader's view."""

    def __init__(self, configs: list[RankConfig]) -> None:
        self._configs = configs
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start all workers, and wait until each has loaded its job."""
        paths, threads = os.pathsep.join(path for path in sys.path if path), str(torch.get_num_threads())
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads}
        for config in self._configs:
            file = config.folder / f"rank-{config.rank}"
            file.write_bytes(pickle.dumps(config))
            command = [sys.executable, "-m", "ml.image.learning.ddp_worker", str(file)]
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
            )
        deadline = time.monotonic() + START_SECONDS
        while not all(config.ready.exists() for config in self._configs):
            if self._dead() or time.monotonic() > deadline:
                raise self.cause_of(
                    TimeoutError(f"{len(self._configs)} processes were not ready in {START_SECONDS:.0f} s")
                )
            time.sleep(0.02)

    def cause_of(self, error: Exception) -> Exception:
        """The error of a dead worker; if none is dead, `error` is the leader's own."""
        deadline = time.monotonic() + DEATH_SECONDS
        while not self._dead() and time.monotonic() < deadline and _may_be_lost_connection(error):
            time.sleep(0.02)
        if not self._dead():
            return error
        time.sleep(0.2)  # workers that only lost their connection to the dead one may have died too by now
        return min((_failure(config, process) for config, process in self._dead()), key=_generality)

    def _dead(self) -> list[tuple[RankConfig, subprocess.Popen[bytes]]]:
        pairs = zip(self._configs, self._processes, strict=False)
        return [(config, process) for config, process in pairs if process.poll() is not None]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Abort collectives when a worker dies: NCCL does not notice it and would wait on the GPU."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.5):
                if self._dead():
                    with suppress(Exception):
                        dist.distributed_c10d._abort_process_group()
                    return

        watcher = threading.Thread(target=watch, name="ddp-watch", daemon=True)
        if torch.cuda.is_available():
            watcher.start()
        try:
            yield
        finally:
            over.set()

    def kill(self) -> None:
        """Kill all workers and wait for their end."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _may_be_lost_connection(error: Exception) -> bool:
    return isinstance(error, RuntimeError)  # dist.DistError and DDP's errors are RuntimeErrors


def _failure(config: RankConfig, process: subprocess.Popen[bytes]) -> PipelineError:
    """The error that ended a worker: the one that it wrote, else by its exit code."""
    try:
        fields = json.loads(config.failure.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        code = process.returncode
        end = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        return WorkerLost(
            f"Process {config.rank + 1} of the {config.size} that train together {end}; start the job again."
        )
    failure = PipelineError(fields["detail"])
    failure.code, failure.retryable = fields["code"], fields["retryable"]
    return failure


def _generality(failure: PipelineError) -> int:
    """Sort key: a killed worker, or one with a known error, explains more than one that lost its connection."""
    return 2 if failure.code == PipelineError.code and not isinstance(failure, WorkerLost) else 1


# --- in the worker ---------------------------------------------------------------------------------------------------


def run_worker(config: RankConfig) -> None:
    """Run a worker's job to its end; an error is written to `config.failure` for the leader, and raised."""
    try:
        work = config.job.load()
        config.ready.touch()
        group = ProcessGroup(config.rank, config.size)
        with connected(group, config.folder):
            work(group)
    except BaseException as error:
        failure = as_pipeline_error(error)
        fields = {"code": failure.code, "detail": str(failure), "retryable": failure.retryable}
        with suppress(OSError):  # the leader is gone, and its folder too
            config.failure.write_text(json.dumps(fields), encoding="utf-8")
        raise
