"""Downloads from a real server on this machine."""

from __future__ import annotations

import http.server
import threading

import pytest

from ml.runtime.download import fetch, google_drive_id
from ml.runtime.errors import DownloadFailed

CONTENT = bytes(range(256)) * 20_000


class Source(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/sizeless":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/torn" else CONTENT)

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Source) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_file_is_downloaded_with_progress(server, tmp_path):
    heard: list[float] = []
    fetch(f"{server}/data.zip", tmp_path / "sub" / "data.zip", on_progress=heard.append)
    assert (tmp_path / "sub" / "data.zip").read_bytes() == CONTENT
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


@pytest.mark.parametrize("path", ["missing", "torn"])
def test_what_the_server_does_not_hand_out_whole_leaves_nothing(server, tmp_path, path):
    with pytest.raises(DownloadFailed, match=r"^source_url: "):
        fetch(f"{server}/{path}", tmp_path / "data.zip")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["data.zip", "sizeless"])
def test_a_file_beyond_the_limit_is_refused(server, tmp_path, path):
    with pytest.raises(DownloadFailed, match="larger"):
        fetch(f"{server}/{path}", tmp_path / "data.zip", max_bytes=2**20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "data.zip", "http://127.0.0.1:9/x", "http://"])
def test_other_sources_are_refused(tmp_path, url):
    with pytest.raises(DownloadFailed):
        fetch(url, tmp_path / "data.zip")


@pytest.mark.parametrize(
    ("url", "found"),
    [
        (
            "https://drive.google.com/file/d/1AbCdEfGhIjKlMnOpQrStUvWxYz012345/view?usp=sharing",
            "1AbCdEfGhIjKlMnOpQrStUvWxYz012345",
        ),
        ("https://drive.google.com/uc?id=1AbCdEfGhIjKl&export=download", "1AbCdEfGhIjKl"),
        ("https://drive.google.com/open?id=1AbCdEfGhIjKl", "1AbCdEfGhIjKl"),
        ("https://example.org/file/d/1AbCdEfGhIjKl/view", None),
        ("https://drive.google.com/drive/my-drive", None),
    ],
)
def test_google_drive_links_are_understood(url, found):
    assert google_drive_id(url) == found
