"""How a job looks while it is followed: lines without a terminal, a bar on one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cli.client import ApiError, Epoch, Job
from cli.commands.progress import ProgressDisplay, _Bars, _ending, _epoch_line, _Lines


def make_job(**fields: Any) -> Job:
    """A running training, with what the test cares about."""
    raw = {"id": "j1", "kind": "train", "state": "running", "terminal": False, "stage": "training"}
    return Job.of({**raw, "progress": 0.42, "eta_seconds": 31.0, "queue_position": None, "error": None, **fields})


def lines_of(*jobs: Job) -> list[str]:
    console = Console(file=io.StringIO(), width=60)
    view = _Lines(console)
    for job in jobs:
        view.show(job)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_without_a_terminal_there_is_one_line_a_stage_and_no_flood() -> None:
    steps = [make_job(progress=step / 100) for step in range(50)]
    assert len(lines_of(*steps)) == 1
    assert len(lines_of(make_job(stage="data_ingestion"), make_job(), make_job(stage="evaluation"))) == 3


def test_a_line_shows_stage_progress_and_time_left() -> None:
    assert lines_of(make_job())[0].split() == ["training", "42", "%", "about", "31", "s", "left"]


def test_a_queued_job_shows_how_many_are_ahead() -> None:
    assert "queued, 3 ahead" in lines_of(make_job(state="queued", stage=None, queue_position=3, eta_seconds=None))[0]


def test_a_job_with_a_cancel_request_shows_cancelling() -> None:
    assert "cancelling" in lines_of(make_job(cancel_requested=True))[0]


def test_on_a_terminal_there_is_a_bar() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with _Bars(console) as view:
        view.show(make_job())
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "training" in drawn
    assert "42%" in drawn
    assert "about 31 s left" in drawn


def test_an_ending_names_the_error() -> None:
    error = {"code": "BAD_DATASET", "detail": "One class only.", "retryable": False}
    assert _ending(make_job(state="failed", error=error)).endswith("train job j1   BAD_DATASET: One class only.")


def test_an_epoch_is_one_line() -> None:
    line = _epoch_line(Epoch(2, 0.19, 0.97, 0.16, 0.93, 0.01, 0.7))
    assert "\n" not in line
    assert "0.930" in line


@pytest.mark.parametrize("terminal", [False, True])
def test_upload_progress_is_shown_once_there_is_any(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=terminal)
    with ProgressDisplay(console):
        pass
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    with ProgressDisplay(console) as listener:
        listener.on_progress("hashing", 1.0)
        listener.on_progress("sending", 0.42)
    assert "sending" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "42" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_file_that_is_left_out_is_named_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressDisplay(Console(file=io.StringIO())).on_refused(
        Path("broken.png"), ApiError("422 This is not an image.", 422)
    )
    assert capsys.readouterr().err == "left out: broken.png: 422 This is not an image.\n"
