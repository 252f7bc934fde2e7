"""Progress of jobs and uploads: bars on a terminal, plain lines elsewhere, and one line per epoch on both."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from cli.client import ApiError, Client, Epoch, Job, ProgressListener

LINE_SECONDS = 2.0
"""Without a terminal: at most one line of progress per so many seconds, and one at every change of stage."""


def follow(client: Client, job_id: str, console: Console) -> Job:
    """Show the job's progress until it has ended, and return it."""
    view = _view(console)
    shown = 0

    def show(job: Job) -> None:
        nonlocal shown
        if job.kind == "train":
            for epoch in client.epochs(job.id)[shown:]:
                console.print(_epoch_line(epoch), highlight=False, soft_wrap=True)
                shown += 1
        view.show(job)

    with view:
        job = client.wait(job_id, show)
    console.print(_ending(job), highlight=False, soft_wrap=True)
    return job


class ProgressDisplay(ProgressListener):
    """Shows the progress of an upload once there is any; names files that are left out on stderr."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._view: _Bars | _Lines | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._view is not None:
            self._view.__exit__(kind, error, trace)

    def on_progress(self, stage: str, share: float) -> None:
        if self._view is None:
            self._view = _view(self._console).__enter__()
        self._view.move(stage, share)

    def on_refused(self, file: Path, error: ApiError) -> None:
        click.echo(f"left out: {file}: {error}", err=True)


def _view(console: Console) -> _Bars | _Lines:
    return _Bars(console) if console.is_terminal else _Lines(console)


def _epoch_line(epoch: Epoch) -> str:
    return (
        f"  epoch {epoch.epoch:>3}   loss {epoch.train_loss:.4f}   accuracy {epoch.train_accuracy:.3f}   "
        f"held-out loss {epoch.val_loss:.4f}   accuracy {epoch.val_accuracy:.3f}   {epoch.seconds:.1f} s"
    )


def _ending(job: Job) -> str:
    colour = {"succeeded": "green", "partially_succeeded": "yellow"}.get(job.state, "red")
    return f"[{colour}]{job.state}[/] {job.kind} job {job.id}" + (f"   {job.failure}" if job.failure else "")


def _stage(job: Job) -> str:
    if job.raw.get("cancel_requested") and not job.terminal:
        return "cancelling"
    position = job.raw.get("queue_position")
    waiting = f"queued, {position} ahead" if position else "queued"
    return (job.stage or job.state) if job.state != "queued" else waiting


def _eta(job: Job) -> str:
    return f"about {job.eta_seconds:.0f} s left" if job.eta_seconds and not job.terminal else ""


class _Bars:
    """One bar for the job, with its stage and the time left."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.fields[stage]:<20}"), BarColumn(40), TaskProgressColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[eta]}"), console=console)
        self._task = self._progress.add_task("job", total=1.0, stage="queued", eta="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, job: Job) -> None:
        """Move the bar to the job's progress."""
        self.move(_stage(job), 1.0 if job.state == "succeeded" else job.progress, _eta(job))

    def move(self, stage: str, share: float, eta: str = "") -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=share, stage=stage, eta=eta)


class _Lines:
    """Progress as lines, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console, self._last, self._at = console, ("", -1), 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def show(self, job: Job) -> None:
        """Print the job's progress."""
        self.move(_stage(job), job.progress, _eta(job))

    def move(self, stage: str, share: float, eta: str = "") -> None:
        """Print a line if something changed, and not too often."""
        state, now = (stage, int(100 * share)), time.monotonic()
        new_stage = state[0] != self._last[0]
        if new_stage or (state != self._last and now - self._at >= LINE_SECONDS):
            self._last, self._at = state, now
            self._console.print(Text(f"  {state[0]:<20} {state[1]:>3} %  {eta}".rstrip()), soft_wrap=True)
