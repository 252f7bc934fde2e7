"""JSON of clients in bounded memory and time: counted before objects are made of it, and long strings stay on disk.

`json.loads` alone makes 5.8 GB of 31 MiB of brackets, and no kept library counts values or leaves a long string where
it is (ijson and simdjson return strings whole; msgspec, orjson and pydantic-core bound the depth alone).
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from jobs.errors import Invalid, MalformedBody, TooLarge

MAX_VALUES = 25_000
"""Most values in one text: ten thousand scans with a custom id each, and some more."""
MAX_DEPTH = 32
"""Most lists and objects inside each other."""
TEXT_BYTES = 2 * 1024 * 1024
"""Most bytes of a text beside its long strings: a hundred strings that are nearly long fit in."""
LONG_STRING = 16 * 1024
"""Bytes of a string that stays on disk where scans are taken: it is a scan in base64."""
BLOCK = 64 * 1024
PARTIAL_ESCAPE = 5
r"""Most bytes of an escape that a block cuts off: `\u123`."""
QUOTE = ord('"')
LONG = "NaN"
"""Stands for a long string while the rest is parsed. A client cannot write it: JSON has no such word."""
# Atomic groups, not `++` and `*+`: before Python 3.11.5 these keep what a failed turn of a group has read.
_INSIDE = rb'(?>(?:(?>[^"\\\x00-\x1f]+)|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*)'
_STRING_CONTENT = re.compile(_INSIDE)
_WHOLE_STRINGS = re.compile(rb'(?>(?:(?>[^"]+)|"' + _INSIDE + rb'")*)')
_TOKENS = re.compile(rb'"(?>(?:(?>[^"\\]+)|\\.)*)"?|[\[\]{},]', re.DOTALL)

OpenFile = Callable[[], IO[bytes]]


@dataclass(frozen=True)
class LongString:
    """A string that was left in the body's file, from the offset `start` to `end`. No field takes it but `Base64`.

    `open_file` gives a new file of the same request.
    """

    file: IO[bytes]
    start: int
    end: int
    open_file: OpenFile

    def pieces(self) -> Iterator[str]:
        """Its characters. What is not ASCII is replaced."""
        position = self.start
        while position < self.end:
            self.file.seek(position)
            block = self.file.read(min(BLOCK, self.end - position))
            complete = _STRING_CONTENT.match(block).end()  # type: ignore[union-attr]
            yield json.loads(f'"{block[:complete].decode("ascii", "replace")}"')
            position += complete


def parse(text: bytes) -> Any:
    """The value of a text in JSON, in any UTF.

    Raises:
        MalformedBody: it is not JSON. The message does not quote it.
        TooLarge, Invalid: it has more than `MAX_VALUES` values, or more than `MAX_DEPTH` inside each other.
    """
    encoding = json.detect_encoding(text)
    if not encoding.startswith("utf-8"):  # in which a byte of another character may look like a quote
        with _saying_what_is_no_text():
            text = text.decode(encoding).encode()
    return _parsed(text, [])


def parse_file(file: IO[bytes], open_file: OpenFile) -> Any:
    """The value of a file in JSON, in any UTF, with a `LongString` for each string of `LONG_STRING` bytes.

    Raises:
        MalformedBody, Invalid
        TooLarge: what `parse` raises; or it has more than `TEXT_BYTES` beside its long strings.
    """
    encoding = json.detect_encoding(_read(file, 0, 4))
    if not encoding.startswith("utf-8"):
        file = _recoded(file, encoding, open_file())
    text, found = _without_long_strings(file, open_file)
    return _parsed(bytes(text), found)


def is_costly(text: bytes) -> bool:
    """Whether there may be more than a thousand values in it."""
    return text.count(b",") + text.count(b"[") + text.count(b"{") > 1000


def _recoded(file: IO[bytes], encoding: str, target: IO[bytes]) -> IO[bytes]:
    file.seek(0)
    decoder = codecs.getincrementaldecoder(encoding)()
    with _saying_what_is_no_text():
        for block in iter(lambda: file.read(BLOCK), b""):
            target.write(decoder.decode(block).encode())
        target.write(decoder.decode(b"", final=True).encode())
    return target


@contextmanager
def _saying_what_is_no_text() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise MalformedBody(f"The body is not JSON: it is not {error.encoding.upper()} to its end.") from None


def _without_long_strings(file: IO[bytes], open_file: OpenFile) -> tuple[bytearray, list[LongString]]:
    text, found, position = bytearray(), list[LongString](), 0
    while block := _read(file, position, LONG_STRING):
        complete = _WHOLE_STRINGS.match(block).end()  # type: ignore[union-attr]
        if complete == 0 and len(block) == LONG_STRING and (end := _end_of_string(file, position + 1)):
            found.append(LongString(file, position + 1, end, open_file))
            text += LONG.encode()
            position = end + 1
        elif complete == 0:  # a string without an end, or with what no string holds: `json` will say where
            return text + block, found
        else:
            text += block[:complete]
            position += complete
        if len(text) > TEXT_BYTES:
            raise TooLarge(f"Beside its long strings the JSON has more than {TEXT_BYTES} bytes. Send less at once.")
    return text, found


def _end_of_string(file: IO[bytes], position: int) -> int | None:
    """The offset of the quote that ends the string. None without one, or with an escape or a character that no string
    holds."""
    while True:
        block = _read(file, position, BLOCK)
        end = _STRING_CONTENT.match(block).end()  # type: ignore[union-attr]
        if end < len(block) and block[end] == QUOTE:
            return position + end
        if len(block) < BLOCK or len(block) - end > PARTIAL_ESCAPE:
            return None
        position += end


def _read(file: IO[bytes], position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _parsed(text: bytes, found: list[LongString]) -> Any:
    _refuse_excess(text)
    left = iter(found)

    def constant(word: str) -> LongString:
        return (next(left, None) if word == LONG else None) or _refuse_constant(word)

    try:
        return json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as error:  # its own text may quote the body
        where = f"line {error.lineno}" + ("" if found else f", column {error.colno}")
        raise MalformedBody(f"The body is not JSON: see {where}.") from None
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()  # which its first bytes tell
        raise MalformedBody(f"The body is not JSON: its byte {error.start + 1} is not {encoding}.") from None
    except ValueError:  # Python's limit (sys.set_int_max_str_digits)
        raise MalformedBody("The body is not JSON: it has a number of more than 4300 digits.") from None


def _refuse_constant(word: str) -> NoReturn:
    raise MalformedBody(f"The body is not JSON: it has no {word}.")


def _refuse_excess(text: bytes) -> None:
    """Count values and depth, until there are too many, or the text is no JSON: `json` will say where."""
    depth = values = strings = 0
    for token in _TOKENS.finditer(text):
        mark = text[token.start()]
        if mark == QUOTE:
            strings += 1
        elif mark in b"]}":
            depth -= 1
        else:
            values += 1
            depth += mark in b"[{"
        if depth > MAX_DEPTH:
            raise Invalid(f"Nested too deeply: more than {MAX_DEPTH} lists and objects inside each other.", "")
        if values > MAX_VALUES:
            raise TooLarge(f"The JSON has more than {MAX_VALUES} values. Send less at once.")
        if depth < 0 or strings > 2 * values + 2:
            return
