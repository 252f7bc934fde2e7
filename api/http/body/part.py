"""One part of multipart: its name, and its content as a text or a file."""

from collections.abc import Callable
from typing import IO

from werkzeug.datastructures import FileStorage, Headers

from api.http.body import part_headers
from api.http.body.part_headers import UnknownCharset
from api.http.body.transfer_encoding import DECODERS, DamagedText, Decoder
from jobs.errors import MalformedBody, TooLarge

OpenFile = Callable[[int | None, str | None, str | None], IO[bytes]]
"""Gives the file that a part with a file name is written to: werkzeug's `stream_factory`."""
HEADER_BYTES = 8 * 1024
"""Most bytes of the headers of one part."""
NO_FILE_NAME = 'has no file name, so it is text, {why}. A file needs `filename="…"` in its Content-Disposition'


class Part:
    """A part while it is received.

    Args:
        number: from 1; errors name it.
        headers: of the part.
        open_file: called if the part is a file.
        text_limit: most bytes of a text.

    Raises:
        MalformedBody: all methods do.
    """

    def __init__(self, number: int, headers: Headers, open_file: OpenFile, text_limit: int) -> None:
        self._number, self._headers, self._text_limit = number, headers, text_limit
        if sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES:
            raise self._refused(f"has headers of more than {HEADER_BYTES} bytes.")
        self.name, self._file_name = self._names()
        self._decoder = self._find_decoder()
        self._text = bytearray()
        self._file = None if self._file_name is None else open_file(None, headers.get("Content-Type"), self._file_name)

    @property
    def text_bytes(self) -> int:
        """Bytes that the part holds in memory."""
        return len(self._text)

    def write(self, block: bytes, last: bool) -> None:
        """Take the next block of its content.

        Raises:
            MalformedBody, TooLarge
        """
        try:
            data = self._decoder.decode(block) + (self._decoder.end() if last else b"")
        except DamagedText as error:
            raise self._refused(f"cannot be decoded. {error}") from None
        if self._file is not None:
            self._file.write(data)
            return
        self._text += data
        if len(self._text) > self._text_limit:
            why = f"and longer than the {self._text_limit} bytes that are taken of one"
            raise TooLarge(f"Part {self._number} of the body {NO_FILE_NAME.format(why=why)}.")

    def value(self) -> str | FileStorage:
        """The complete content."""
        if self._file is None:
            return self._decoded_text()
        self._file.seek(0)
        return FileStorage(self._file, self._file_name, self.name, headers=self._headers)

    def _names(self) -> tuple[str, str | None]:
        try:
            names = part_headers.parameters(self._headers["Content-Disposition"])
        except UnknownCharset:
            raise self._refused("has a name in a charset that is not read or not what it says. Send UTF-8.") from None
        except ValueError:
            raise self._refused("has a Content-Disposition that cannot be read. Is a quote not closed?") from None
        # PHP and others name a list `files[]`.
        name = names.get("name", "").removesuffix("[]")
        if not name:
            raise self._refused('has no name. Write `Content-Disposition: form-data; name="…"`.')
        return name, part_headers.last_of_windows_path(names["filename"]) if "filename" in names else None

    def _find_decoder(self) -> Decoder:
        if self._headers.get("Content-Type", "").lower().startswith("multipart/"):
            raise self._refused("is itself multipart. Send each file as a part of its own, under the same name.")
        encoding = self._headers.get("Content-Transfer-Encoding", "").strip().lower()
        if encoding not in DECODERS:
            known = ", ".join(name for name in DECODERS if name)
            raise self._refused(f"has another Content-Transfer-Encoding than {known}. Send it without one.")
        return DECODERS[encoding]()

    def _decoded_text(self) -> str:
        try:
            charset = part_headers.parameters(self._headers.get("Content-Type", "")).get("charset", "utf-8")
            return part_headers.decoded(bytes(self._text), charset)
        except ValueError:
            why = "but not in UTF-8, nor in a charset that its Content-Type names and that is read"
            raise self._refused(f"{NO_FILE_NAME.format(why=why)}.") from None

    def _refused(self, why: str) -> MalformedBody:
        return MalformedBody(f"Part {self._number} of the body {why}")
