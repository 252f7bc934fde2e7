"""Results as NDJSON and CSV: all of them, as they come, to the job's end; cut where they are not whole."""

import csv
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from flask import Flask
from flask.testing import FlaskClient

from api.http.change_listener import ChangeListener
from cli.stack.server_plan import free_port
from jobs.db import Sessions
from jobs.queue import leases, lifecycle
from jobs.retention.results import expire
from jobs.settings import Settings
from jobs.states import JobKind, JobState
from jobs.tables import ModelVersion
from tests import builders
from tests.api.test_errors import assert_problem
from tests.processes import ROOT, Stack, eventually

NDJSON, CSV = "application/x-ndjson", "text/csv"


@dataclass
class Batch:
    """Nine scans in three chunks that are being worked on."""

    sessions: Sessions
    path: str
    held: list[leases.Claim]

    def end(self, *chunks: int) -> None:
        """End these chunks well, each but for its first scan."""
        for chunk in chunks:
            with self.sessions.begin() as session:
                outcomes = builders.outcomes_of(session, self.held[chunk], failed=1)
                lifecycle.succeed(session, self.held[chunk], outcomes=outcomes)


@pytest.fixture
def batch(sessions: Sessions, champion: ModelVersion) -> Batch:
    """A batch that runs."""
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=9, chunk=3, model_id=champion.id, model_version=1)
        held = [builders.claim(session, unit) for unit in builders.units_of(session, job)]
    return Batch(sessions, f"/jobs/{job.id}/results", held)


@pytest.fixture
def listener(app: Flask) -> ChangeListener:
    """The bell of the application."""
    return app.extensions["renalq"].listener


@contextmanager
def later(*steps: Callable[[], object]) -> Iterator[None]:
    """Do these in a thread, a little later and a little apart."""

    def run() -> None:
        for step in steps:
            time.sleep(0.3)
            step()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def stream(client: FlaskClient, path: str, kind: str = NDJSON) -> Iterator[str]:
    answer = client.get(path, headers={"Accept": kind}, buffered=False)
    assert answer.mimetype == kind, answer.get_json()
    for piece in answer.response:
        yield from (piece.decode() if isinstance(piece, bytes) else piece).splitlines(keepends=True)
    answer.close()


def ordinals(lines: Iterator[str]) -> list[int]:
    return [json.loads(line)["ordinal"] for line in lines if line.strip()]


def test_a_stream_follows_the_job_to_its_end_in_the_order_of_its_scans(
    client: FlaskClient, batch: Batch, listener: ChangeListener
) -> None:
    batch.end(1)  # not yet to be seen: the first chunk's results come before
    seen, half = [], threading.Event()
    with later(lambda: batch.end(0), lambda: half.wait(20) and batch.end(2)):
        for line in stream(client, batch.path):
            seen.append(json.loads(line)["ordinal"])
            if seen[-1] == 5:
                half.set()
    assert seen == list(range(9))
    assert listener.waiting == 0


def test_a_table_follows_the_job_too(client: FlaskClient, batch: Batch) -> None:
    batch.end(0)
    with later(lambda: batch.end(1, 2)):
        rows = list(csv.DictReader(io.StringIO("".join(stream(client, batch.path, CSV)))))
    assert [int(row["ordinal"]) for row in rows] == list(range(9))
    assert [row["error_code"] for row in rows] == ["BROKEN", "", ""] * 3


def test_of_a_filtered_stream_only_what_is_asked_for_comes(client: FlaskClient, batch: Batch) -> None:
    with later(lambda: batch.end(0, 2, 1)):
        assert ordinals(stream(client, f"{batch.path}?state=failed")) == [0, 3, 6]


def test_what_waits_is_told_as_it_stands(client: FlaskClient, batch: Batch) -> None:
    batch.end(0)
    assert ordinals(stream(client, f"{batch.path}?state=pending")) == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("page", [2, 500])
def test_a_stream_goes_on_after_what_the_client_has(
    client: FlaskClient, batch: Batch, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr("api.resources.jobs.results.ROWS", page)
    batch.end(0, 1)
    with later(lambda: batch.end(2)):
        assert ordinals(stream(client, f"{batch.path}?after=4")) == [5, 6, 7, 8]
    table = "".join(stream(client, f"{batch.path}?after=6", CSV))
    assert [row["ordinal"] for row in csv.DictReader(io.StringIO(table))] == ["7", "8"]
    assert ordinals(stream(client, f"{batch.path}?after=8")) == []
    assert_problem(client.get(f"{batch.path}?after=-2", headers={"Accept": NDJSON}), 422)


def test_a_stream_that_was_cut_is_whole_with_its_continuation(
    client: FlaskClient, batch: Batch, listener: ChangeListener
) -> None:
    batch.end(0)
    seen: list[int] = []
    with later(listener.close), pytest.raises(ConnectionResetError):
        seen.extend(json.loads(line)["ordinal"] for line in stream(client, batch.path))
    assert seen == [0, 1, 2]
    listener.closed = False  # the next process
    with later(lambda: batch.end(1, 2)):
        seen += ordinals(stream(client, f"{batch.path}?after={seen[-1]}"))
    assert seen == list(range(9))


def test_a_stream_is_cut_where_results_are_deleted_under_it(
    client: FlaskClient, batch: Batch, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.resources.jobs.results.ROWS", 2)
    batch.end(0, 1, 2)
    lines = stream(client, batch.path)
    assert ordinals(iter([next(lines), next(lines)])) == [0, 1]
    with sessions.begin() as session:
        expire(session, 1e-9, rows=1)
    with pytest.raises(ConnectionResetError):
        list(lines)


@pytest.mark.parametrize(("kind", "sign"), [(NDJSON, "\n"), (CSV, "\r\n")])
def test_a_quiet_stream_sends_empty_lines(
    client: FlaskClient, batch: Batch, monkeypatch: pytest.MonkeyPatch, kind: str, sign: str
) -> None:
    monkeypatch.setattr("api.http.responses.KEEP_ALIVE_SECONDS", 0.1)
    with later(lambda: batch.end(0, 1, 2)):
        pieces = list(stream(client, batch.path, kind))
    assert 1 <= pieces.count(sign) <= 5
    assert len([piece for piece in pieces if piece.strip()]) == 9 + (kind == CSV)
    assert len(list(csv.DictReader(io.StringIO("".join(pieces))))) == 9 or kind == NDJSON


def test_with_no_slot_left_a_job_that_runs_cannot_be_followed(
    client: FlaskClient, batch: Batch, listener: ChangeListener
) -> None:
    listener._slots = 0
    answer = client.get(batch.path, headers={"Accept": NDJSON})
    assert_problem(answer, 503, "TOO_MANY_WATCHERS")
    assert client.get(batch.path).status_code == 200
    batch.end(0, 1, 2)
    assert len(ordinals(stream(client, batch.path))) == 9  # nobody waits for a job that has ended


def test_who_goes_away_leaves_its_slot(client: FlaskClient, batch: Batch, listener: ChangeListener) -> None:
    batch.end(0)
    answer = client.get(batch.path, headers={"Accept": NDJSON}, buffered=False)
    next(iter(answer.response))
    assert listener.waiting == 1
    answer.close()
    assert listener.waiting == 0
    assert client.head(batch.path, headers={"Accept": NDJSON}).status_code == 200
    assert listener.waiting == 0


def test_a_job_that_was_cancelled_ends_its_stream(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, JobState.QUEUED, scans=2)
    with later(lambda: client.post(f"/jobs/{job.id}/cancel")):
        rows = [json.loads(line) for line in stream(client, f"/jobs/{job.id}/results")]
    assert [row["state"] for row in rows] == ["cancelled", "cancelled"]


@pytest.mark.slow
def test_a_server_that_goes_down_cuts_its_streams_before_their_end(
    settings: Settings, sessions: Sessions, client: FlaskClient, batch: Batch
) -> None:
    batch.end(0)
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "-c", "api/gunicorn_conf.py", "--bind", f"127.0.0.1:{port}"]
    environ = Stack(settings, sessions).environ()
    log = settings.home / "api.log"
    with log.open("wb") as output:
        server = subprocess.Popen([*command, "api:create_app()"], cwd=ROOT, env=environ, stdout=output, stderr=output)
    try:
        answer = eventually(lambda: _followed(port, client, batch.path), 30, log.read_text)
        assert [json.loads(answer.readline())["ordinal"] for _ in range(3)] == [0, 1, 2]
        os.kill(server.pid, signal.SIGTERM)
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
        assert server.wait(20) == 0
        assert "Traceback" not in log.read_text()
    finally:
        server.kill()


def _followed(port: int, client: FlaskClient, path: str) -> http.client.HTTPResponse | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Authorization": client.environ_base["HTTP_AUTHORIZATION"], "Accept": NDJSON}
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse()
    except ConnectionRefusedError:
        return None
