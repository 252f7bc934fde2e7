"""The bytes of a body: as many as were announced, decoded from gzip or deflate, and never more than the limit.

Both streams read a block at a time, so that a small body that decodes to gigabytes is cut off at the limit while it is
decoded (RFC 9110, 8.4: content codings; RFC 1950 to 1952: zlib, deflate, gzip).
"""

import io
import zlib
from collections.abc import Generator, Iterator, Mapping
from typing import IO, Any

from werkzeug.exceptions import RequestEntityTooLarge

from jobs.errors import MalformedBody, TooLarge, TooSlow, UnsupportedCoding

ACCEPTED = "gzip, deflate"
"""Value of `Accept-Encoding` where another coding is refused."""
BLOCK = 64 * 1024
"""Bytes read or decoded at a time."""
GZIP_MAGIC = b"\x1f\x8b"
_CODINGS: Mapping[str, str] = {"": "", "identity": "", "gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}


def body_stream(stream: IO[bytes], length: int | None, coding: str | None, limit: int | None) -> IO[bytes]:
    """The content of a body.

    Args:
        stream: the server's, which ends with the body.
        length: `Content-Length` (bytes); None if the body came in chunks.
        coding: `Content-Encoding`.
        limit: most bytes, both as received and decoded; None: any number.

    Raises:
        RequestEntityTooLarge: `length` is above the limit. Reading raises it too, TooLarge and MalformedBody.
        UnsupportedCoding
    """
    name = _CODINGS.get((coding or "").strip().lower())
    if name is None:
        raise UnsupportedCoding(accepted=ACCEPTED)
    if length is not None and limit is not None and length > limit:
        raise RequestEntityTooLarge
    received: Any = Received(stream, length, limit)
    return Decoded(received, name, limit) if name else received  # type: ignore[return-value]


class Received(io.RawIOBase):
    """A body as it comes from the network. One that is cut off, or too slow, is an error, not a shorter body."""

    def __init__(self, stream: IO[bytes], length: int | None, limit: int | None) -> None:
        self._stream, self._length, self._limit = stream, length, limit
        self._received = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = len(buffer) if self._length is None else min(len(buffer), self._length - self._received)
        data = self._read(wanted) if wanted else b""
        self._received += len(data)
        if self._limit is not None and self._received > self._limit:
            raise RequestEntityTooLarge
        buffer[: len(data)] = data
        return len(data)

    def _read(self, wanted: int) -> bytes:
        try:
            data = self._stream.read(wanted)
        except TimeoutError:
            raise TooSlow from None
        except Exception:  # each server has its own for a broken connection or chunk
            raise self._cut_off() from None
        if not data and self._length is not None:
            raise self._cut_off()
        return data

    def _cut_off(self) -> MalformedBody:
        if self._length is None:
            return MalformedBody("The body was cut off on its way, or it does not consist of chunks. Send it again.")
        came = f"{self._received} of {self._length} bytes came"
        return MalformedBody(f"The body was cut off on its way: {came}. Send it again.")


class Decoded(io.RawIOBase):
    """A body without its content coding."""

    def __init__(self, received: io.RawIOBase, coding: str, limit: int | None) -> None:
        self._blocks = _limited(_decoded(io.BufferedReader(received, BLOCK), coding), coding, limit)
        self._block = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._block:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._block = block
        data, self._block = self._block[: len(buffer)], self._block[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _limited(blocks: Iterator[bytes], coding: str, limit: int | None) -> Iterator[bytes]:
    decoded = 0
    for block in blocks:
        decoded += len(block)
        if limit is not None and decoded > limit:
            raise TooLarge(f"Decoded from {coding}, the body has more than {limit} bytes. Send less at once.")
        yield block


def _decoded(stream: IO[bytes], coding: str) -> Iterator[bytes]:
    """Decoded blocks. gzip may have several members (RFC 1952, 2.2), with zeros after the last."""
    block = stream.read(BLOCK)
    while block:
        unused = yield from _member(stream, coding, block)
        block = _after_end(stream, coding, unused)


def _member(stream: IO[bytes], coding: str, block: bytes) -> Generator[bytes, None, bytes]:
    """Decoded blocks until the end of the coding. Returns what was read beyond it."""
    decoder = _decoder(coding, block)
    while True:
        data = _decode(decoder, coding, block)
        yield data
        if decoder.eof:
            return decoder.unused_data  # type: ignore[no-any-return]
        if not block and not data:
            raise MalformedBody(f"The body's {coding} is cut off. Send all of it.")
        block = decoder.unconsumed_tail or stream.read(BLOCK)


def _decode(decoder: Any, coding: str, block: bytes) -> bytes:
    try:
        return decoder.decompress(block, BLOCK)  # type: ignore[no-any-return]
    except zlib.error:
        raise MalformedBody(f"The body's {coding} is damaged. Send it again.") from None


def _decoder(coding: str, head: bytes) -> Any:
    if coding == "deflate":
        # RFC 9110 means zlib, but some clients leave out its header, whose two bytes are a multiple of 31 (RFC 1950).
        has_header = head[0] & 15 == zlib.DEFLATED and int.from_bytes(head[:2], "big") % 31 == 0
        return zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
    if not head.startswith(GZIP_MAGIC):
        raise MalformedBody("The body is not gzip, as `Content-Encoding` says. Compress it, or leave that header out.")
    return zlib.decompressobj(16 + zlib.MAX_WBITS)


def _after_end(stream: IO[bytes], coding: str, rest: bytes) -> bytes:
    """The beginning of the next member; empty at the end of the body."""
    rest = rest.lstrip(b"\0")
    while len(rest) < len(GZIP_MAGIC) and (block := stream.read(BLOCK)):
        rest = (rest + block).lstrip(b"\0")
    if rest and not (coding == "gzip" and rest.startswith(GZIP_MAGIC)):
        raise MalformedBody(f"Bytes follow the end of the body's {coding}. Send it alone.")
    return rest
