"""One request to a webhook's receiver: to an address that was checked, for a limited time, with nothing followed.

A name is looked up once, and the connection goes to the very address that was found and checked: a name that leads
elsewhere at the next look gains nothing. No error repeats the address or anything of the answer but its status.
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

from jobs.addresses import DEFAULT_PORTS, NOT_PUBLIC, is_allowed, is_public, malformed_url_error
from jobs.settings import Settings

LEAST_WAIT = 0.001


class Undelivered(Exception):
    """Nobody has answered. The message is for people."""


def post(url: str, body: bytes, headers: Mapping[str, str], settings: Settings) -> int:
    """Send the body, and give the answer's status. What else is in the answer is not read.

    Raises:
        Undelivered: the address is refused, or there was no answer in time.
    """
    if why := malformed_url_error(url):
        raise Undelivered(why)
    deadline, parts = time.monotonic() + settings.webhook_seconds, urlsplit(url)
    try:
        with _connected(url, parts, deadline, settings) as sock, _hung_up_at(deadline, sock):
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            status = _asked(parts, sock, body, headers)
            if time.monotonic() < deadline:  # else we have hung up, and it is half an answer
                return status
            raise TimeoutError
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a name that no name service takes
        late = time.monotonic() >= deadline
        slow = f"did not answer within {settings.webhook_seconds:g} s (RENALQ_WEBHOOK_SECONDS)"
        raise Undelivered(f"The receiver {slow if late else f'cannot be reached ({type(error).__name__})'}.") from None


def _asked(parts: SplitResult, sock: socket.socket, body: bytes, headers: Mapping[str, str]) -> int:
    name, port = parts.hostname or "", _port(parts)  # without a port it would be looked for in the name: [::1] has one
    secure = parts.scheme == "https"
    connection = HTTPSConnection(name, port, context=_tls()) if secure else HTTPConnection(name, port)
    with closing(connection):
        connection.sock = sock
        connection.request("POST", (parts.path or "/") + (parts.query and f"?{parts.query}"), body, headers)
        return connection.getresponse().status


def _connected(url: str, parts: SplitResult, deadline: float, settings: Settings) -> socket.socket:
    """A socket to the first address of the host that takes a connection; with TLS where the URL says so."""
    name, port = parts.hostname or "", _port(parts)
    addresses = _addresses(name, port, deadline)
    if not is_allowed(url, settings.receiver_hosts):
        addresses = [address for address in addresses if is_public(address)]
    if not addresses:
        raise Undelivered(NOT_PUBLIC)
    sock = _first_of(addresses, port, deadline)
    if parts.scheme == "http":
        return sock
    return _tls().wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)


def _port(parts: SplitResult) -> int:
    return parts.port or DEFAULT_PORTS[parts.scheme]


def _addresses(name: str, port: int, deadline: float) -> list[str]:
    """Look the name up. In a thread, which is left to itself at the deadline: nothing else ends a look-up before a name
    service that is silent does, in its own time.

    Raises:
        TimeoutError, OSError, ValueError
    """
    found: Future[list[str]] = Future()
    Thread(target=_look_up, args=[found, name, port], daemon=True).start()
    return found.result(max(deadline - time.monotonic(), LEAST_WAIT))


def _look_up(found: Future[list[str]], name: str, port: int) -> None:
    try:
        found.set_result([str(entry[4][0]) for entry in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)])
    except Exception as error:
        found.set_exception(error)


def _first_of(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """Try one after the other, each for its share of the time that is left."""
    for number, address in enumerate(addresses):
        left = max((deadline - time.monotonic()) / (len(addresses) - number), LEAST_WAIT)
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
def _hung_up_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """Hang up when the time is over: a timeout of the socket's own begins anew with every byte that drips in."""
    sock.settimeout(max(deadline - time.monotonic(), LEAST_WAIT))
    alarm = Timer(deadline - time.monotonic(), _hang_up, [sock])
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):  # it has ended this moment
        # Not by its own method: with TLS that would take the socket apart under the feet of whoever reads from it.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
