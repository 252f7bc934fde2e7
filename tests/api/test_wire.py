"""Bodies as they come over the network, to the server as it runs: chunks, cut-off bodies, `Expect: 100-continue`."""

import gzip
import json
import re
import socket

from tests.api.conftest import Door, Server
from tests.api.test_multipart import END, TYPE, file

BODY = file() + END
MULTIPART, CHUNKED, JSON = f"Content-Type: {TYPE}", "Transfer-Encoding: chunked", "Content-Type: application/json"
KNOWN = b'{"sha256": []}'
UTF16 = KNOWN.decode().encode("utf-16")


def length(number: int) -> str:
    return f"Content-Length: {number}"


def chunked(body: bytes, size: int = 7) -> bytes:
    """The body in chunks (RFC 9112, 7.1)."""
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


EXPECTED: dict[str, tuple[str, list[str], bytes, int, str]] = {
    # what: path, headers, what is sent, status, words of the answer
    "chunks": ("/scans", [MULTIPART, CHUNKED], chunked(BODY), 201, "sha256"),
    "JSON in chunks": ("/scans/known", [JSON, CHUNKED], chunked(KNOWN), 200, "data"),
    "gzip in chunks": (
        "/scans", [MULTIPART, CHUNKED, "Content-Encoding: gzip"], chunked(gzip.compress(BODY)), 200, "sha256"
    ),
    "an extension": ("/scans", [MULTIPART, CHUNKED], b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), 200, "sha256"),
    "trailers": ("/scans", [MULTIPART, CHUNKED], chunked(BODY)[:-2] + b"X-Sum: 1\r\n\r\n", 200, "sha256"),
    "chunks cut off": ("/scans", [MULTIPART, CHUNKED], chunked(BODY)[:-30], 400, "cut off on its way"),
    "chunks without end": ("/scans", [MULTIPART, CHUNKED], chunked(BODY)[:-5], 400, "cut off on its way"),
    "no chunks": ("/scans", [MULTIPART, CHUNKED], BODY, 400, "not consist of chunks"),
    "bad trailers": ("/scans", [MULTIPART, CHUNKED], chunked(BODY)[:-2] + b"a b\r\n\r\n", 400, "not consist of chunks"),
    "compressed chunks": (
        "/scans", [MULTIPART, "Transfer-Encoding: gzip, chunked"], chunked(gzip.compress(BODY)), 400, "Content-Encoding"
    ),
    "file cut off": ("/scans", [MULTIPART, length(len(BODY) + 9)], BODY, 400, f"{len(BODY)} of {len(BODY) + 9} bytes"),
    "JSON cut off": ("/scans/known", [JSON, length(99)], KNOWN, 400, "14 of 99 bytes"),
    "gzip cut off": (
        "/scans", [MULTIPART, length(999), "Content-Encoding: gzip"], gzip.compress(BODY)[:90], 400, "90 of 999 bytes"
    ),
    "manifest cut off": (
        "/jobs/predict/batch", ["Content-Type: text/csv", length(99)], b"scan_id\n", 400, "8 of 99 bytes"
    ),
    "length too small": ("/scans", [MULTIPART, length(len(BODY) - 9)], BODY[:-9], 400, "closing boundary"),
    "no body": ("/scans", [MULTIPART, length(0)], b"", 400, "is empty"),
    "no length": ("/scans", [MULTIPART], b"", 400, "is empty"),
    "UTF-16": ("/scans/known", [JSON, length(len(UTF16))], UTF16, 200, "data"),
    "UTF-8 with a mark": ("/scans/known", [JSON, length(17)], b"\xef\xbb\xbf" + KNOWN, 200, "data"),
    "half of UTF-16": ("/scans/known", [JSON, length(len(UTF16) - 1)], UTF16[:-1], 400, "not UTF-16"),
    "Latin-1": ("/scans/known", [JSON, length(14)], b'{"sha\xdf": []}  ', 400, "byte 6 is not UTF-8"),
}  # fmt: skip


def sent(server: Server, head: list[str], body: bytes) -> tuple[int, str]:
    """Status and body of the answer to these bytes, after which the client sends no more."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    status = re.findall(r"HTTP/1.1 (\d+)", answer)[-1]
    return int(status), answer.partition("\r\n\r\n")[2]


def test_bodies_from_the_network(server: Server, door: Door, champion: object) -> None:
    key = door.client().environ_base["HTTP_AUTHORIZATION"]
    wrong = {}
    for what, (path, headers, body, status, words) in EXPECTED.items():
        head = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", f"Authorization: {key}", *headers]
        got, answer = sent(server, head, body)
        if got != status or words not in answer:
            wrong[what] = (got, answer)
        elif status == 400:
            assert json.loads(answer)["code"] == "MALFORMED_BODY"
    assert wrong == {}


def test_a_client_that_waits_for_100_continue_is_told_to_go_on(server: Server, door: Door) -> None:
    key = door.client().environ_base["HTTP_AUTHORIZATION"]
    head = ["POST /scans HTTP/1.1", "Host: x", "Connection: close", f"Authorization: {key}", MULTIPART]
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall("\r\n".join([*head, length(len(BODY)), "Expect: 100-continue", "", ""]).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.sendall(BODY)
        assert connection.recv(1000).startswith(b"HTTP/1.1 201")
