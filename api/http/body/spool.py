"""All files of a request in one temporary file: memory stays flat, and one descriptor is open.

werkzeug would keep up to 500 kB of every part in memory: 5 GB for ten thousand scans.
"""

import errno
import io
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from flask import Request, current_app
from werkzeug.formparser import FormDataParser
from werkzeug.utils import cached_property

from api.http.body.content_coding import body_stream
from api.http.body.large_bodies import LargeBodies
from api.http.body.multipart import MultipartParser
from jobs.errors import MalformedBody

MAX_PARTS = 20_000
"""Parts of one multipart body: ten thousand scans with a custom id each."""
JSON_BYTES = 1024 * 1024
"""Largest JSON body (bytes)."""
SCAN_JSON_BYTES = 32 * 1024 * 1024
"""Largest JSON body where scans come in base64 (bytes). Larger scans must come as multipart."""
SMALL_BYTES = 64 * 1024
"""Bodies up to this size stay in memory."""
SPOOL_FOLDER = "incoming"
TURNS = LargeBodies()
FRAMINGS = {"chunked", "identity"}
"""Transfer codings that the server has read already."""


class Section(io.RawIOBase):
    """One part: a range of the request's spool, written once from its start, then read."""

    def __init__(self, descriptor: int, start: int) -> None:
        self._descriptor = descriptor
        self._start = start
        self._size = 0
        self._position = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @property
    def size(self) -> int:
        """Number of bytes written."""
        return self._size

    def write(self, data: Any) -> int:
        written = os.pwrite(self._descriptor, data, self._start + self._position)
        self._position += written
        self._size = max(self._size, self._position)
        return written

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        data = os.pread(self._descriptor, max(wanted, 0), self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise OSError(errno.EINVAL, "negative seek position")  # as files do; zipfile relies on it
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position


class Spool:
    """A request's temporary file. It has no name, so it is freed with its last descriptor, even if the process dies."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed with the request)
        self._sections: list[Section] = []

    def section(self) -> Section:
        """A section for the next part. Parts do not interleave: the previous one has been written completely."""
        start = self._sections[-1]._start + self._sections[-1].size if self._sections else 0
        self._sections.append(Section(self._file.fileno(), start))
        return self._sections[-1]

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()


class UploadRequest(Request):
    """A request whose body is decoded, and whose files go into one spool."""

    max_form_parts = MAX_PARTS
    form_data_parser_class = MultipartParser
    _spool: Spool | None = None
    tenant_id = ""
    """Of the request's key: turns are counted by tenant."""
    _turn: str | None = None

    @cached_property
    def stream(self) -> IO[bytes]:
        """The body without its content coding, never more than `max_content_length`.

        Raises:
            UnsupportedCoding, MalformedBody, RequestEntityTooLarge. Reading raises the latter two, and TooLarge.
        """
        if set(self.headers.get("Transfer-Encoding", "chunked").lower().replace(" ", "").split(",")) - FRAMINGS:
            raise MalformedBody("Of Transfer-Encoding only `chunked` is read. Name other codings in Content-Encoding.")
        length = self.content_length if self.environ.get("CONTENT_LENGTH") else None
        if length is None and not self.environ.get("wsgi.input_terminated"):
            length = 0  # nobody can tell where it ends
        return body_stream(self.input_stream, length, self.content_encoding, self.max_content_length)

    def _get_file_stream(
        self,
        total_content_length: int | None,
        content_type: str | None,
        filename: str | None = None,
        content_length: int | None = None,
    ) -> IO[bytes]:
        if self._spool is None:
            self._spool = Spool(current_app.config["SPOOL_FOLDER"])
        return self._spool.section()  # type: ignore[return-value]

    def discard(self, limit: int) -> None:
        """Read on to the body's end, but no more than `limit` bytes: a client that is still sending reads no answer."""
        with suppress(Exception):  # each server has its own for a broken connection
            while limit > 0 and (block := self.input_stream.read(SMALL_BYTES)):
                limit -= len(block)

    def new_file(self) -> IO[bytes]:
        """A file that is freed with the request."""
        return self._get_file_stream(None, None)

    def spooled(self) -> IO[bytes]:
        """The whole body as one file; in memory up to `SMALL_BYTES`."""
        begin = io.BytesIO()
        while begin.tell() <= SMALL_BYTES and (block := self.stream.read(SMALL_BYTES)):
            begin.write(block)
        if begin.tell() <= SMALL_BYTES:
            begin.seek(0)
            return begin
        section = self.new_file()
        section.write(begin.getbuffer())
        shutil.copyfileobj(self.stream, section)
        section.seek(0)
        return section

    def make_form_data_parser(self) -> FormDataParser:
        """One that waits for a turn once the form is a large one."""
        parser = super().make_form_data_parser()
        parser.on_large = self.take_turn  # type: ignore[attr-defined]
        return parser

    def take_turn(self) -> None:
        """Wait until few other requests hold the objects of a large body; the turn ends with the request at the latest.

        Raises:
            ServerBusy
        """
        if self._turn is None:
            TURNS.enter(self.tenant_id)
            self._turn = self.tenant_id

    def end_turn(self) -> None:
        """Let the next large body in, before a request waits for something else."""
        if self._turn is not None:
            TURNS.leave(self._turn)
            self._turn = None

    def close(self) -> None:
        super().close()
        if self._spool is not None:
            self._spool.close()
        self.end_turn()
