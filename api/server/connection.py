"""A connection: what has come of the next request's head, and the parser that reads the rest."""

import ipaddress
import socket
import time
from contextlib import suppress
from typing import Any

from gunicorn.http.parser import RequestParser
from gunicorn.workers.gthread import TConn

from api.server.client_socket import ClientSocket, Limits

HEAD_BYTES = 16 * 1024
"""Longest head of a request: its first line and headers. gunicorn limits each of them as well."""
READ_BYTES = 64 * 1024
"""Most bytes that are read from the network at a time."""
DRAINED_BYTES = 64 * 1024
"""Most bytes of a body that nobody wants which are read for the sake of the next request."""
END = b"\r\n\r\n"


class Connection(TConn):
    """A client's connection. It belongs to the event loop, or to one thread while that answers a request."""

    def __init__(self, cfg: Any, raw: socket.socket, client: Any, server: Any, limits: Limits) -> None:
        super().__init__(cfg, ClientSocket(raw, limits), client, server)
        self.address = address_of(client)
        self.parser = RequestParser(cfg, self.sock, client)
        self.parser.unreader.mxchunk = READ_BYTES
        self.initialized = self.data_ready = True
        self.head = bytearray()
        self.kept = False
        """Whether it is kept for another request after what is being sent."""
        self.drained = False
        """Whether the client's last body was read to its end."""
        self.since = time.monotonic()
        """When it began to wait for its client."""

    def has_head(self) -> bool:
        """Whether the whole head has come."""
        return END in self.head

    def has_large_head(self) -> bool:
        """Whether the head is longer than `HEAD_BYTES`, as far as it has come."""
        end = self.head.find(END)
        return (len(self.head) if end < 0 else end) > HEAD_BYTES

    def begin_request(self) -> None:
        """Give the head, and what came behind it, to the parser."""
        self.parser.unreader.unread(bytes(self.head))
        self.head.clear()
        self.kept = self.drained = False
        self.sock.begin_request()

    def end_request(self, kept: bool) -> None:
        """What came already of the next request becomes its head."""
        self.kept = kept
        if kept:
            self.head += self.parser.unreader.take_buffered()

    def drain(self) -> bool:
        """Read the rest of a body, as far as it has come. Returns whether that was all."""
        with self.sock.without_waiting(), suppress(OSError):  # of broken chunks as well
            self.drained = self.parser.finish_body(max_bytes=DRAINED_BYTES)
        return self.drained


def address_of(client: Any) -> str:
    """Whose connection it is: an IPv4 address, or the /64 of an IPv6 one, of which a client has as many as it likes."""
    if not isinstance(client, tuple):
        return ""
    address = ipaddress.ip_address(client[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)
