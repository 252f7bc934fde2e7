"""Bytes written as text: base64 (RFC 4648, both alphabets) and quoted-printable (RFC 2045), decoded as they come."""

import binascii
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Protocol
from urllib.parse import unquote_to_bytes

STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
LINE_BREAKS = b"\r\n\t"
SPACES = "Damaged base64: it has spaces, which were `+` once. Write `+` as %2B in a URL or a form."


class DamagedText(ValueError):
    """The text was not written in its encoding, or was changed since. The message says how, for people."""


class Decoder(Protocol):
    """Decodes a text that comes in blocks. Both methods raise DamagedText."""

    def decode(self, block: bytes) -> bytes:
        """The bytes that are complete."""

    def end(self) -> bytes:
        """The last bytes."""


class Identity:
    """Bytes that are written as they are."""

    def decode(self, block: bytes) -> bytes:
        return block

    def end(self) -> bytes:
        return b""


class Base64:
    """Base64 in the standard or the URL-safe alphabet, with or without padding and line breaks."""

    def __init__(self) -> None:
        self._rest = b""

    def decode(self, block: bytes) -> bytes:
        text = self._rest + block.translate(STANDARD_ALPHABET, LINE_BREAKS)
        cut = max(len(text) // 4 - 1, 0) * 4  # the last four may have padding
        self._rest = text[cut:]
        if b"=" in text[:cut]:
            raise DamagedText("Not valid base64: it goes on after its padding.")
        return _quanta(text[:cut])

    def end(self) -> bytes:
        text = self._rest.rstrip(b"=")
        padding = -len(text) % 4
        if padding == 3:
            raise DamagedText("Not valid base64: it was cut off, since its length is a multiple of four and one more.")
        if len(self._rest) - len(text) not in (0, padding):
            raise DamagedText("Not valid base64: its padding does not suit its length.")
        return _quanta(text + b"=" * padding)


def _quanta(text: bytes) -> bytes:
    if b" " in text:
        raise DamagedText(SPACES)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        raise DamagedText("Not valid base64: it has characters that are in neither of its alphabets.") from None


class QuotedPrintable:
    """Quoted-printable: `=E4` is a byte, `=` at the end of a line joins it with the next."""

    def __init__(self) -> None:
        self._rest = b""

    def decode(self, block: bytes) -> bytes:
        text = self._rest + block
        escape = text.rfind(b"=", max(len(text) - 2, 0))  # perhaps incomplete
        cut = len(text) if escape < 0 else escape
        self._rest = text[cut:]
        return binascii.a2b_qp(text[:cut])

    def end(self) -> bytes:
        return binascii.a2b_qp(self._rest)


DECODERS: dict[str, type[Decoder]] = {
    **dict.fromkeys(("", "7bit", "8bit", "binary"), Identity),
    "base64": Base64,
    "quoted-printable": QuotedPrintable,
}
"""By `Content-Transfer-Encoding`, in lower case."""


def decode_base64(pieces: Iterable[str]) -> Iterator[bytes]:
    """The bytes of a text in base64, or of a data URL with one (RFC 2397), piece by piece.

    Raises:
        DamagedText
    """
    decoder, held, size, spaces = Base64(), "", 0, False
    for piece in _without_data_url(pieces):
        text = held + piece
        if not size:
            bare = text.lstrip()
            spaces |= " " in text.removesuffix(bare)
            text = bare
        kept = text.rstrip()
        held = text.removeprefix(kept)  # white space at the end, unless something follows
        data = kept.encode("ascii", "replace")
        size += len(data.translate(None, LINE_BREAKS))
        yield decoder.decode(data)
    # A space at an end may have been a `+` too; then what is left is no multiple of four.
    if size % 4 and (spaces or " " in held):
        raise DamagedText(SPACES)
    yield decoder.end()


def _without_data_url(pieces: Iterable[str]) -> Iterator[str]:
    left = iter(pieces)
    first = next(left, "")
    if first.lstrip()[:5].lower() != "data:":
        yield first
        yield from left
        return
    _, comma, data = first.partition(",")
    if not comma:
        raise DamagedText("Not a data URL: a comma goes before the data.")
    yield from _unescaped(chain([data], left))


def _unescaped(pieces: Iterable[str]) -> Iterator[str]:
    """Percent-decoded (RFC 3986); an escape may be divided over two pieces."""
    held = ""
    for piece in pieces:
        text = held + piece
        cut = text.rfind("%", max(len(text) - 2, 0))
        held = "" if cut < 0 else text[cut:]
        yield unquote_to_bytes(text[: len(text) - len(held)]).decode("ascii", "replace")
    yield unquote_to_bytes(held).decode("ascii", "replace")
