"""Scans by their address, from a real server that behaves well and badly."""

import socket
import threading
import time
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from urllib3.util import connection

from jobs.settings import Settings
from worker.handlers.remote_fetch import NO_ANSWER, FetchFailed, fetch, fetch_dataset

SCAN = bytes(range(256)) * 1000
PATIENT = "erika-mustermann"
DRIPPED = 50


class Server(ThreadingHTTPServer):
    """Counts its connections, and keeps the headers of requests."""

    daemon_threads = True
    connections = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.headers: list[Message] = []

    def process_request(self, *arguments: object) -> None:
        self.connections += 1
        super().process_request(*arguments)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    """What it answers is in the address."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if isinstance(self.server, Server):
            self.server.headers.append(self.headers)
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


# --- no way around the guard ---


def test_a_name_is_looked_up_once_and_leads_to_no_address_of_the_cloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, reached = [], []

    def looked_up(name: str, port: int, **_: Any) -> list[Any]:
        asked.append(name)
        found = "169.254.169.254" if len(asked) == 1 else "10.0.0.5"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, port))]

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    monkeypatch.setattr(connection, "create_connection", lambda address, *_, **__: reached.append(address))
    error = refused(f"http://scans.example/{PATIENT}", tmp_path, Settings(fetch_hosts="scans.example"))
    assert (error.code, asked, reached) == ("FETCH_UNREACHABLE", ["scans.example"], [])


def test_a_name_leads_to_its_address(at: str, tmp_path: Path, allowing: Settings) -> None:
    allowing.fetch_hosts = allowing.fetch_hosts.replace("127.0.0.1", "localhost")
    assert fetch(f"{at.replace('127.0.0.1', 'localhost')}/scan/1", tmp_path, allowing).read_bytes() == SCAN


def test_neither_proxies_nor_passwords_of_the_environment_are_used(
    server: Server, at: str, tmp_path: Path, allowing: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("default login worker password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch(f"{at}/scan/1", tmp_path, allowing).read_bytes() == SCAN
    assert [headers.get("Authorization") for headers in server.headers] == [None]


def test_no_error_tells_a_port_scanner_what_is_there(tmp_path: Path) -> None:
    """A closed port, an open one that does not speak HTTP, one that speaks it without TLS, a name that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as open_port, ThreadingHTTPServer(("127.0.0.1", 0), Handler) as plain:
        threading.Thread(target=lambda: open_port.accept()[0].sendall(b"-ERR unknown command\r\n"), daemon=True).start()
        threading.Thread(target=plain.serve_forever, args=(0.01,), daemon=True).start()
        with socket.create_server(("127.0.0.1", 0)) as gone:
            closed = gone.getsockname()[1]
        addresses = [
            f"http://127.0.0.1:{closed}", f"http://127.0.0.1:{open_port.getsockname()[1]}",
            f"https://127.0.0.1:{plain.server_port}", "http://no-such-host.invalid:80",
        ]  # fmt: skip
        hosts = ",".join(address.partition("//")[2] for address in addresses)
        settings = Settings(fetch_hosts=hosts, fetch_seconds=2)
        told = {str(refused(f"{address}/{PATIENT}", tmp_path, settings)) for address in addresses}
        plain.shutdown()
    assert told == {NO_ANSWER}


# --- datasets ---


def test_a_dataset_is_fetched_as_far_as_the_guard_lets_it(at: str, tmp_path: Path, allowing: Settings) -> None:
    told: list[tuple[int, int]] = []
    found = fetch_dataset(f"{at}/scan/1", tmp_path, allowing, lambda *progress: told.append(progress))
    assert found.read_bytes() == SCAN
    assert told[-1] == (len(SCAN), len(SCAN))
    allowing.max_archive_bytes = len(SCAN) - 1
    with pytest.raises(FetchFailed, match="RENALQ_MAX_ARCHIVE_BYTES"):
        fetch_dataset(f"{at}/endless/1", tmp_path, allowing, lambda *_: None)


def test_a_share_link_of_google_drive_needs_the_hosts_that_it_leads_to(tmp_path: Path) -> None:
    link = "https://drive.google.com/file/d/1A2b3C4d5E6f7G8h9I/view?usp=sharing"
    with pytest.raises(FetchFailed, match="RENALQ_FETCH_HOSTS"):
        fetch_dataset(link, tmp_path, Settings(fetch_hosts="drive.google.com"), lambda *_: None)
