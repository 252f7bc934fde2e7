"""The client against the real API: what is much goes so that nothing is sent twice, whatever breaks meanwhile."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from cli.client import ApiError, Client, ProgressListener, uploads
from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import Dataset, Job, Scan, ScanResult, Upload
from tests.api.conftest import Door, Server, png, zipped
from tests.faults.proxy import proxy

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _little_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "SINGLE_REQUEST_BYTES", 10)
    monkeypatch.setattr(uploads, "CHUNK_BYTES", 200_000)
    monkeypatch.setattr(uploads, "RETRY_SECONDS", 0.1)


class Seen(ProgressListener):
    """Notes what it sees, leaves refused files out, and does something once, when sending has come so far."""

    def __init__(self, share: float = 2.0, then: Callable[[], object] = bool) -> None:
        self.stages: list[tuple[str, float]] = []
        self.left_out: list[Path] = []
        self._share, self._then = share, then

    def on_progress(self, stage: str, share: float) -> None:
        self.stages.append((stage, share))
        if stage == "sending" and share >= self._share:
            self._share = 2.0
            self._then()

    def on_refused(self, file: Path, error: ApiError) -> None:
        self.left_out.append(file)


def client_of(door: Door, port: int) -> Client:
    secret = door.client().environ_base["HTTP_AUTHORIZATION"].removeprefix("Bearer ")
    return Client(f"http://127.0.0.1:{port}", secret)


def scans(folder: Path, number: int) -> list[Path]:
    files = [folder / f"{n:03}.png" for n in range(number)]
    for n, file in enumerate(files):
        file.write_bytes(png(shade=n % 256, height=8 + n // 256))
    return files


def test_a_batch_outlives_the_server_and_sends_only_the_rest(
    server: Server, door: Door, sessions: Sessions, champion: object, tmp_path: Path
) -> None:
    files = scans(tmp_path, 60)
    (broken := tmp_path / "broken.png").write_bytes(b"no image")
    (twin := tmp_path / ("x" * 220 + ".png")).write_bytes(files[3].read_bytes())
    files = [*files, broken, twin]

    def restart() -> None:
        server.kill()
        threading.Timer(0.5, server.start).start()

    client, seen = client_of(door, server.port), Seen(0.4, restart)
    job = client.predict_batch(files, "champion", seen)
    assert seen.left_out == [broken]
    assert job.raw["counts"]["total"] == 61
    with sessions() as session:
        rows = session.scalars(select(ScanResult).order_by(ScanResult.ordinal)).all()
        of = dict(session.execute(select(Scan.id, Scan.sha256)).all())
    sent = [file for file in files if file != broken]
    assert [row.custom_id for row in rows] == [file.name[-200:] for file in sent]
    assert [of[row.scan_id] for row in rows] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in sent]
    assert {one.name for one in client.results(job.id)} == set()  # nothing has ended yet

    again = Seen()
    client.predict_batch(files, listener=again)
    assert [share for stage, share in again.stages if stage == "sending"] == [1.0], "the broken one, which has no id"
    assert len(of) == 60


def test_a_large_zip_goes_on_where_its_connection_broke(
    server: Server,
    door: Door,
    sessions: Sessions,
    champion: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = zipped({f"{word}/{n}.png": png() + os.urandom(100_000) for word in ("A", "B") for n in range(10)})
    (archive := tmp_path / "kidneys.zip").write_bytes(content)
    cuts: list[int] = []

    class Cut(uploads.FileChunk):
        """A chunk whose first tries break in the middle."""

        def __iter__(self) -> Iterator[bytes]:
            for number, chunk in enumerate(super().__iter__()):
                if number == 2 and len(cuts) < 3:
                    cuts.append(number)
                    line.cut()
                yield chunk

    monkeypatch.setattr(uploads, "FileChunk", Cut)
    with proxy("127.0.0.1", server.port) as line:
        client, seen = client_of(door, line.port), Seen()
        dataset = client.add_dataset(archive, listener=seen)
        job = client.predict_batch([archive])
    shares = [share for _, share in seen.stages]
    assert (shares[0], shares[-1], len(cuts)) == (0.0, 1.0, 3)
    assert shares == sorted(shares), "it never went back"
    with sessions() as session:
        row = session.get_one(Dataset, dataset["id"])
        assert (row.name, row.archive_sha256) == ("kidneys", hashlib.sha256(content).hexdigest())
        assert session.scalars(select(Upload)).all() == []
    assert job.raw["counts"]["total"] == 20


def test_a_server_that_stays_away_is_given_up(
    server: Server, door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "RECONNECT_SECONDS", 0.3)
    client = client_of(door, server.port)
    began = time.monotonic()
    with pytest.raises(ApiError, match="Nobody answers"):
        client.predict_batch(scans(tmp_path, 20), listener=Seen(0.1, server.kill))
    assert time.monotonic() - began < 10
    with pytest.raises(ApiError, match="Nobody answers"):
        uploads.retry_while_unreachable(lambda: client.call("GET", "/jobs"))


def test_what_is_refused_is_said_at_once(
    server: Server, door: Door, sessions: Sessions, settings: Settings, tmp_path: Path
) -> None:
    client = client_of(door, server.port)
    files = scans(tmp_path, 3)
    with pytest.raises(ApiError, match="No model is champion"):
        client.predict_batch(files)
    for file in files:
        file.write_bytes(b"no image " + file.name.encode())
    with pytest.raises(ApiError, match=r"00.\.png: 422"):
        client.predict_batch(files)
    with pytest.raises(ApiError, match="None of the files is a scan"):
        client.predict_batch(files, listener=Seen())
    with pytest.raises(ApiError, match="too many for one batch"):
        client.predict_batch([files[0]] * 10_001)
    (archive := tmp_path / "no.zip").write_bytes(bytes(400_000))
    with pytest.raises(ApiError, match="422"):
        client.add_dataset(archive)
    with sessions() as session:
        assert session.scalars(select(Job)).all() == []
