"""One request to a webhook's receiver: to a checked address, with a deadline, without following redirects.

A host name is resolved once, and the connection goes to the address that was checked: DNS rebinding has no effect. No
error message contains the URL, or anything of the response but its status; and there is one message for all reasons why
there was no response: others would tell which names and ports an internal network has.
"""

import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Thread, Timer
from urllib.parse import SplitResult, urlsplit

import structlog

from jobs.addresses import DEFAULT_PORTS, is_allowed, is_public, malformed_url_error
from jobs.settings import Settings

MIN_WAIT = 0.001
NO_ANSWER = (
    "The receiver did not answer within {seconds:g} s (RENALQ_WEBHOOK_SECONDS), or refused the connection. One that is "
    "not public must be in RENALQ_WEBHOOK_HOSTS."
)

log = structlog.get_logger()


class DeliveryFailed(Exception):
    """There was no response. The message is for people."""


def post(url: str, body: bytes, headers: Mapping[str, str], settings: Settings) -> int:
    """Send the body and return the status of the response. The rest of the response is not read.

    Raises:
        DeliveryFailed: the address is not allowed, or there was no response in time.
    """
    if why := malformed_url_error(url):
        raise DeliveryFailed(why)
    deadline, parts = time.monotonic() + settings.webhook_seconds, urlsplit(url)
    try:
        with _connect(url, parts, deadline, settings) as sock, _shutdown_at(deadline, sock):
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            status = _exchange(parts, sock, body, headers)
            if time.monotonic() < deadline:  # otherwise the connection was shut down, and the response is incomplete
                return status
            raise TimeoutError
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a host name that cannot be encoded
        log.warning("webhook_unanswered", error=type(error).__name__)
        raise DeliveryFailed(NO_ANSWER.format(seconds=settings.webhook_seconds)) from None


def _exchange(parts: SplitResult, sock: socket.socket, body: bytes, headers: Mapping[str, str]) -> int:
    name, port = parts.hostname or "", _port(parts)  # without a port it would be parsed from the name, as in [::1]
    secure = parts.scheme == "https"
    connection = HTTPSConnection(name, port, context=_tls()) if secure else HTTPConnection(name, port)
    with closing(connection):
        connection.sock = sock
        connection.request("POST", (parts.path or "/") + (parts.query and f"?{parts.query}"), body, headers)
        return connection.getresponse().status


def _connect(url: str, parts: SplitResult, deadline: float, settings: Settings) -> socket.socket:
    """A socket to the first address of the host that accepts a connection; with TLS for https."""
    name, port = parts.hostname or "", _port(parts)
    addresses = _addresses(name, port, deadline)
    if not is_allowed(url, settings.receiver_hosts):
        addresses = [address for address in addresses if is_public(address)]
    if not addresses:
        raise ConnectionRefusedError
    sock = _connect_first(addresses, port, deadline)
    if parts.scheme == "http":
        return sock
    return _tls().wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)


def _port(parts: SplitResult) -> int:
    return parts.port or DEFAULT_PORTS[parts.scheme]


def _addresses(name: str, port: int, deadline: float) -> list[str]:
    """Resolve the name in a thread, which is abandoned at the deadline: a look-up cannot be cancelled, and a silent
    name server delays it for long.

    Raises:
        TimeoutError, OSError, ValueError
    """
    found: Future[list[str]] = Future()
    Thread(target=_resolve, args=[found, name, port], daemon=True).start()
    return found.result(max(deadline - time.monotonic(), MIN_WAIT))


def _resolve(found: Future[list[str]], name: str, port: int) -> None:
    try:
        found.set_result([str(entry[4][0]) for entry in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)])
    except Exception as error:
        found.set_exception(error)


def _connect_first(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """Try one after the other, each for its share of the remaining time."""
    for number, address in enumerate(addresses):
        left = max((deadline - time.monotonic()) / (len(addresses) - number), MIN_WAIT)
        try:
            return socket.create_connection((address, port), timeout=left)
        except OSError:
            if number == len(addresses) - 1:
                raise
    raise AssertionError


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


@contextmanager
def _shutdown_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """Shut the socket down at the deadline: its own timeout restarts with every byte that arrives."""
    sock.settimeout(max(deadline - time.monotonic(), MIN_WAIT))
    alarm = Timer(deadline - time.monotonic(), _shut_down, [sock])
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _shut_down(sock: socket.socket) -> None:
    with suppress(OSError):  # it was closed meanwhile
        # Not the method of SSLSocket: it would detach the TLS object while another thread reads from it.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
