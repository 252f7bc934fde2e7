"""multipart/form-data (RFC 7578) into texts and files. A body that cannot be parsed is refused with its cause.

werkzeug finds the parts, with any of the three line ends, around them preamble and epilogue, which are passed over.
"""

from collections.abc import Callable, Iterator
from typing import IO, Any

from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import FormDataParser
from werkzeug.sansio.multipart import Data, Event, Field, File, MultipartDecoder, NeedData, State

from api.http.body.content_coding import BLOCK
from api.http.body.part import Part
from jobs.errors import MalformedBody, TooLarge

MULTIPART = "multipart/form-data"
TEXT_BYTES = 10 * 1024 * 1024
"""Most bytes of all texts of a body together: ten thousand custom ids fit in. They are held in memory."""
LONGEST_BOUNDARY = 70
"""Characters (RFC 2046, section 5.1.1)."""
MANY_PARTS, MANY_BYTES = 500, 1024 * 1024
"""Parts and bytes of texts from which on a body is a large one, that waits for its turn."""
BY_HAND = "Let your HTTP library write `Content-Type` and body together."
NOT_CLOSED = "the closing boundary is missing, or the body was cut off"
NO_DISPOSITION = 'has no Content-Disposition. Write `Content-Disposition: form-data; name="…"`.'


class MultipartParser(FormDataParser):
    """What a request parses its form with. `on_large` is called once a body is a large one, perhaps several times."""

    on_large: Callable[[], None] = staticmethod(lambda: None)

    def parse(
        self, stream: IO[bytes], mimetype: str, content_length: int | None, options: dict[str, str] | None = None
    ) -> tuple[IO[bytes], Any, Any]:
        """The stream, the texts and the files.

        Raises:
            MalformedBody, TooLarge
        """
        found = list(self._values(stream, options or {})) if mimetype == MULTIPART else []
        texts = [(name, value) for name, value in found if isinstance(value, str)]
        files = [(name, value) for name, value in found if isinstance(value, FileStorage)]
        return stream, self.cls(texts), self.cls(files)

    def _values(self, stream: IO[bytes], options: dict[str, str]) -> Iterator[tuple[str, str | FileStorage]]:
        reader = _Reader(stream, _boundary(options), self.max_form_memory_size, self.max_form_parts)
        text_limit, text_bytes = self.max_form_memory_size or TEXT_BYTES, 0
        for event in reader.events():
            if isinstance(event, Field | File):
                if reader.number >= MANY_PARTS or text_bytes > MANY_BYTES:
                    self.on_large()
                part = Part(reader.number, event.headers, self.stream_factory, text_limit)
            elif isinstance(event, Data):
                part.write(event.data, last=not event.more_data)
                text_bytes += 0 if event.more_data else part.text_bytes
                if text_bytes > TEXT_BYTES:
                    raise TooLarge(f"The texts of the body have more than {TEXT_BYTES} bytes. Send fewer at once.")
                if not event.more_data:
                    yield part.name, part.value()


def _boundary(options: dict[str, str]) -> bytes:
    boundary = options.get("boundary", "").rstrip()  # RFC 2046 lets none end with a space
    if not boundary:
        raise MalformedBody(f"Content-Type names no boundary between the parts. {BY_HAND}")
    return boundary.encode()


class _Reader:
    """Reads a body block by block, and says why it cannot be parsed."""

    def __init__(self, stream: IO[bytes], boundary: bytes, buffer_size: int | None, max_parts: int | None) -> None:
        self._stream = stream
        self._decoder = MultipartDecoder(boundary, buffer_size)
        self._max_parts = max_parts
        self.number = 0
        """Of the part that was begun last, from 1."""

    def events(self) -> Iterator[Event]:
        """werkzeug's events.

        Raises:
            MalformedBody, TooLarge
        """
        for block in iter(self._block, b""):
            if self._decoder.state is not State.EPILOGUE:
                yield from self._events_of(block)
        if self._decoder.state is not State.EPILOGUE:
            raise self._unparsed()

    def _block(self) -> bytes:
        """The next bytes. They do not end between the two dashes that close the body: werkzeug 3.1 takes the line break
        before that boundary for content then."""
        block = self._stream.read(BLOCK)
        for _ in range(LONGEST_BOUNDARY):
            if not block.endswith(b"-"):
                break
            block += (more := self._stream.read(1))
            if not more:
                break
        return block

    def _events_of(self, block: bytes) -> Iterator[Event]:
        try:
            self._decoder.receive_data(block)
        except RequestEntityTooLarge:  # the buffer is full: it holds no boundary, or headers without end
            raise self._unparsed() from None
        while not isinstance(event := self._next(), NeedData):
            if isinstance(event, Field | File):
                self.number += 1
                if self._max_parts is not None and self.number > self._max_parts:
                    raise TooLarge(f"The body has more than {self._max_parts} parts. Send fewer, or a zip of them.")
            yield event

    def _next(self) -> Event:
        try:
            return self._decoder.next_event()
        except UnicodeDecodeError:
            raise self._unparsed("has headers that are not in UTF-8, perhaps in Latin-1. Send UTF-8.") from None
        except ValueError:
            raise self._unparsed(NO_DISPOSITION) from None

    def _unparsed(self, bad_headers: str = f"has no end: {NOT_CLOSED}.") -> MalformedBody:
        """Why the decoder cannot go on."""
        if self._decoder.state is State.PREAMBLE:
            return MalformedBody(self._without_boundary())
        if self._decoder.state is not State.PART:
            return MalformedBody(f"Part {self.number} of the body has no end: {NOT_CLOSED}.")
        if self._decoder.buffer.startswith((b"\r", b"\n")):  # a blank line before any header
            bad_headers = NO_DISPOSITION
        return MalformedBody(f"Part {self.number + 1} of the body {bad_headers}")

    def _without_boundary(self) -> str:
        if not self._decoder.buffer:
            return "The body is empty: not even a closing boundary is there."
        return f"The boundary that Content-Type names is nowhere in the body. {BY_HAND}"
