"""Scans by their address, from a real server that behaves well and badly."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.settings import Settings
from worker.handlers.remote_fetch import FetchFailed, fetch

SCAN = bytes(range(256)) * 1000
PATIENT = "erika-mustermann"
DRIPPED = 50


class Server(ThreadingHTTPServer):
    """Counts its connections."""

    daemon_threads = True
    connections = 0

    def process_request(self, *arguments: object) -> None:
        self.connections += 1
        super().process_request(*arguments)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    """What it answers is in the address."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        kind, _, rest = self.path.strip("/").partition("/")
        getattr(self, f"do_{kind}")(rest)

    def do_scan(self, rest: str) -> None:
        self.answer(200, SCAN)

    def do_status(self, rest: str) -> None:
        self.answer(int(rest.partition("/")[0]), b"no")

    def do_to(self, rest: str) -> None:
        self.answer(302, b"", Location=rest)

    def do_chunked(self, rest: str) -> None:
        self.begin(200, **{"Transfer-Encoding": "chunked"})
        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(SCAN), SCAN))

    def do_endless(self, rest: str) -> None:
        self.begin(200, **{"Transfer-Encoding": "chunked"})
        while True:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(SCAN), SCAN))

    def do_cut(self, rest: str) -> None:
        self.begin(200, **{"Content-Length": str(len(SCAN))})
        self.wfile.write(SCAN[:100])
        self.close_connection = True

    def do_dripping(self, rest: str) -> None:
        self.begin(200, **{"Content-Length": str(len(SCAN))})
        for _ in range(DRIPPED):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def do_silent(self, rest: str) -> None:
        time.sleep(2)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.begin(status, **headers, **{"Content-Length": str(len(body))})
        self.wfile.write(body)

    def begin(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are the point
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def at(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def allowing(at: str) -> Settings:
    return Settings(fetch_hosts=at.removeprefix("http://"), fetch_seconds=0.5, max_scan_bytes=len(SCAN))


def refused(url: str, folder: Path, settings: Settings) -> FetchFailed:
    """The fetch fails, says nothing of the address, and leaves nothing."""
    with pytest.raises(FetchFailed) as caught:
        fetch(url, folder, settings)
    assert PATIENT not in str(caught.value)
    assert caught.value.detail == str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert list(folder.iterdir()) == []
    return caught.value


@pytest.mark.parametrize("kind", ["scan", "chunked"])
def test_fetch_saves_the_content_in_the_folder(kind: str, at: str, tmp_path: Path, allowing: Settings) -> None:
    first, second = (fetch(f"{at}/{kind}/{PATIENT}.dcm", tmp_path, allowing) for _ in range(2))
    assert first.read_bytes() == second.read_bytes() == SCAN
    assert {first.parent, second.parent} == {tmp_path}
    assert first != second


def test_one_connection_serves_many_scans(server: Server, at: str, tmp_path: Path, allowing: Settings) -> None:
    for _ in range(5):
        fetch(f"{at}/scan/1", tmp_path, allowing)
    assert server.connections == 1


def test_a_host_that_is_not_allowed_is_never_asked(server: Server, at: str, tmp_path: Path) -> None:
    for url in (f"{at}/scan/{PATIENT}", f"http://me@127.0.0.1/{PATIENT}", f"file:///{PATIENT}", ""):
        error = refused(url, tmp_path, Settings(fetch_hosts="scans.example"))
        assert (error.code, error.retryable) == ("FETCH_REFUSED", False)
    assert server.connections == 0


def test_redirects_are_followed_among_allowed_hosts(at: str, tmp_path: Path, allowing: Settings) -> None:
    assert fetch(f"{at}/to/{at}/to//scan/1", tmp_path, allowing).read_bytes() == SCAN


def test_a_redirect_to_another_host_is_refused(at: str, tmp_path: Path, allowing: Settings) -> None:
    for target in (f"http://localhost/{PATIENT}", f"file:///{PATIENT}", f"//169.254.169.254/{PATIENT}"):
        assert refused(f"{at}/to/{target}", tmp_path, allowing).code == "FETCH_REFUSED"


def test_redirects_end(at: str, tmp_path: Path, allowing: Settings) -> None:
    error = refused(at + f"/to/{at}" * 7 + "/scan/1", tmp_path, allowing)
    assert (error.code, error.retryable) == ("FETCH_FAILED", False)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, "FETCH_FAILED"),
        (401, "FETCH_FAILED"),
        (304, "FETCH_FAILED"),
        (203, "FETCH_FAILED"),
        (429, "FETCH_UNREACHABLE"),
        (500, "FETCH_UNREACHABLE"),
        (503, "FETCH_UNREACHABLE"),
    ],
)
def test_temporary_errors_are_retryable(status: int, code: str, at: str, tmp_path: Path, allowing: Settings) -> None:
    error = refused(f"{at}/status/{status}/{PATIENT}", tmp_path, allowing)
    assert (error.code, error.retryable) == (code, code == "FETCH_UNREACHABLE")
    assert str(status) in error.detail


@pytest.mark.parametrize("kind", ["scan", "endless"])
def test_a_scan_that_is_too_large_is_not_kept(kind: str, at: str, tmp_path: Path, allowing: Settings) -> None:
    allowing.max_scan_bytes = len(SCAN) - 1
    error = refused(f"{at}/{kind}/{PATIENT}", tmp_path, allowing)
    assert (error.code, error.retryable) == ("FETCH_REFUSED", False)
    assert "RENALQ_MAX_SCAN_BYTES" in error.detail


@pytest.mark.parametrize("kind", ["cut", "dripping", "silent"])
def test_a_slow_or_broken_response_fails(kind: str, at: str, tmp_path: Path, allowing: Settings) -> None:
    began = time.monotonic()
    error = refused(f"{at}/{kind}/{PATIENT}", tmp_path, allowing)
    assert (error.code, error.retryable) == ("FETCH_UNREACHABLE", True)
    assert time.monotonic() - began < 1.5


def test_a_missing_server_is_unreachable(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        host = f"127.0.0.1:{server.server_port}"
    error = refused(f"http://{host}/{PATIENT}", tmp_path, Settings(fetch_hosts=host))
    assert (error.code, error.retryable) == ("FETCH_UNREACHABLE", True)


def test_no_log_contains_a_url(at: str, tmp_path: Path, allowing: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        fetch(f"{at}/scan/{PATIENT}", tmp_path, allowing)
    assert PATIENT not in caplog.text
