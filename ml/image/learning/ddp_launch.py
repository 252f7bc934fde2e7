"""Processes of one machine that train together: how they find each other, and how none outlives the rest.

The process that asks for a team leads it: it tells the epochs and writes the files. The others are its children,
`python -m ml.image.learning.ddp_worker`; each reads its job from a file, and runs the same training in step. A member
whose leader is gone sees its stdin end and leaves; the leader ends the members whenever it leaves the team; and
where one dies, the connections to it break, so that the others' next exchange fails at once. A process that stands
still without dying is given up after `EXCHANGE_TIMEOUT`.
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

EXCHANGE_TIMEOUT = timedelta(
    minutes=30
)  # of an exchange; a member may wait this long for another one's share of the features
START_SECONDS = 180.0  # in which a member must have loaded its job
BLAME_SECONDS = 5.0  # in which a member whose connection broke is found to have died


class WorkerLost(PipelineError):
    """A process of the training ended before its time. Whatever ended it may be over, so trying again can help."""

    retryable = True


class Job(Protocol):
    """What a member does. It travels by pickle, so its class must be one that can be imported."""

    def load(self) -> Callable[[ProcessGroup], None]:
        """Read all that it needs from disk; what it answers runs when the whole team is there."""
        ...


@dataclass(frozen=True)
class RankConfig:
    """A member's place: how it finds the others, and what it has to do."""

    rank: int
    size: int
    folder: Path
    job: Job

    @property
    def ready(self) -> Path:
        """A file that says that the job is loaded."""
        return self.folder / f"ready-{self.rank}"

    @property
    def failure(self) -> Path:
        """A file that says what ended this member."""
        return self.folder / f"failure-{self.rank}"


@contextmanager
def launch_workers(size: int, job: Job, folder: Path | None = None) -> Iterator[ProcessGroup]:
    """Lead a team of `size` processes, of which the others do `job`. With size 1 there is nobody else.

    `folder`: of which files for the members may be written below. BadParams names `devices` where the machine has too
    few; a member's own PipelineError, or MemberLost, where one of them fails.
    """
    if size == 1:
        yield SINGLE_PROCESS
        return
    require_devices(size)
    with tempfile.TemporaryDirectory(prefix="renalq-team-", dir=folder) as place, _sharing_cores(size):
        members, group = (
            _Members([RankConfig(rank, size, Path(place), job) for rank in range(1, size)]),
            ProcessGroup(0, size),
        )
        try:
            members.start()
            with connected(group, Path(place)), members.watched():
                yield group
        except PipelineError:
            raise
        except Exception as error:
            raise members.blamed_for(error) from error
        finally:
            members.end()
            group.size = 1


def require_devices(size: int) -> None:
    """BadParams unless this machine has as many GPUs or, without any, as many cores."""
    gpus, cores = torch.cuda.device_count(), max(2, os.cpu_count() or 1)
    if gpus and gpus < size:
        raise BadParams(f"devices: this machine has {gpus} GPUs; choose at most {gpus}.")
    if not gpus and cores < size:
        raise BadParams(f"devices: this machine has no GPU, and cores for {cores} processes; choose at most {cores}.")


@contextmanager
def connected(group: ProcessGroup, folder: Path) -> Iterator[None]:
    """Be connected to the other members, through a file in `folder` that tells where they listen."""
    with_gpus = group.device().type == "cuda"
    if with_gpus:
        torch.cuda.set_device(group.device())
    with _on_this_machine_only():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if with_gpus else "gloo",
            init_method=f"file://{folder / 'meeting'}",
            rank=group.rank,
            world_size=group.size,
            timeout=EXCHANGE_TIMEOUT,
        )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _on_this_machine_only() -> Iterator[None]:
    # Else gloo listens where the machine's own name leads, which in a container may be nowhere.
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


class _Members:
    """The other processes, as their leader holds them."""

    def __init__(self, seats: list[RankConfig]) -> None:
        self._seats = seats
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start them all, and wait until each has its job."""
        size = len(self._seats) + 1
        paths, threads = os.pathsep.join(path for path in sys.path if path), str(torch.get_num_threads())
        own = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads}
        for seat in self._seats:
            paper = seat.folder / f"seat-{seat.rank}"
            paper.write_bytes(pickle.dumps(seat))
            command = [sys.executable, "-m", "ml.image.learning.ddp_worker", str(paper)]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=own))
        deadline = time.monotonic() + START_SECONDS
        while not all(seat.ready.exists() for seat in self._seats):
            if self._dead() or time.monotonic() > deadline:
                raise self.blamed_for(TimeoutError(f"{size - 1} processes were not ready in {START_SECONDS:.0f} s"))
            time.sleep(0.02)

    def blamed_for(self, error: Exception) -> Exception:
        """What a dead member says it died of; without one, `error` itself is the leader's own."""
        deadline = time.monotonic() + BLAME_SECONDS
        while not self._dead() and time.monotonic() < deadline and _is_of_connections(error):
            time.sleep(0.02)
        dead = self._dead()
        if not dead:
            return error
        time.sleep(0.2)  # those that only lost their connection to the first one may be dead by now too
        return min((_failure(seat, process) for seat, process in self._dead()), key=_generality)

    def _dead(self) -> list[tuple[RankConfig, subprocess.Popen[bytes]]]:
        pairs = zip(self._seats, self._processes, strict=False)
        return [(seat, process) for seat, process in pairs if process.poll() is not None]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """NCCL does not notice that another process died, and would wait for it on the GPU: then it is told."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.5):
                if self._dead():
                    with suppress(Exception):
                        dist.distributed_c10d._abort_process_group()
                    return

        watching = threading.Thread(target=watch, name="team", daemon=True)
        if torch.cuda.is_available():
            watching.start()
        try:
            yield
        finally:
            over.set()

    def end(self) -> None:
        """No member is left after this."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _is_of_connections(error: Exception) -> bool:
    return isinstance(error, RuntimeError)  # dist.DistError and DDP's are RuntimeErrors


def _failure(seat: RankConfig, process: subprocess.Popen[bytes]) -> PipelineError:
    """What ended a member: told by itself, else by its exit code."""
    try:
        told = json.loads(seat.failure.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        code = process.returncode
        end = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        return WorkerLost(f"Process {seat.rank + 1} of the {seat.size} that train together {end}; start the job again.")
    failure = PipelineError(told["detail"])
    failure.code, failure.retryable = told["code"], told["retryable"]
    return failure


def _generality(failure: PipelineError) -> int:
    """A member that was killed, or failed for a reason with a name, says more than one that lost its connection."""
    return 2 if failure.code == PipelineError.code and not isinstance(failure, WorkerLost) else 1


# --- a member's own side ---------------------------------------------------------------------------------------------


def run_worker(seat: RankConfig) -> None:
    """Do a member's job to its end; what fails is left for the leader to read."""
    try:
        work = seat.job.load()
        seat.ready.touch()
        group = ProcessGroup(seat.rank, seat.size)
        with connected(group, seat.folder):
            work(group)
    except BaseException as error:
        failure = as_pipeline_error(error)
        told = {"code": failure.code, "detail": str(failure), "retryable": failure.retryable}
        with suppress(OSError):  # the leader is gone, and its folder too
            seat.failure.write_text(json.dumps(told), encoding="utf-8")
        raise
