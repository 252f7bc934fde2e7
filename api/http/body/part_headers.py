"""Headers of a part of multipart, as clients write them: parameters, file names, charsets.

werkzeug's `parse_options_header` takes the backslashes out of `C:\\scans\\1.png`, ends `scan one.png` at its space, and
does not read encoded words.
"""

import re
from collections.abc import Mapping
from email.errors import HeaderParseError
from email.header import decode_header
from email.utils import decode_params, unquote

CHARSETS = frozenset((
    "ascii", "us-ascii", "utf-8", "utf8", "iso-8859-1", "latin1", "iso-8859-2", "iso-8859-15", "windows-1250",
    "windows-1251", "windows-1252", "koi8-r", "gbk", "gb2312", "gb18030", "big5", "shift_jis", "euc-jp", "iso-2022-jp",
    "euc-kr",
))  # fmt: skip
"""Charsets that are read. Some others of Python's are slow or no charsets."""
_PARAMETER = re.compile(r';\s*([^\s=;"]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;]*)')
_WORD = r"=\?[^?\s]+\?[bq]\?[^?]*\?="
_ENCODED_WORDS = re.compile(rf"{_WORD}(?:\s+{_WORD})*", re.IGNORECASE)
_WINDOWS_PATH = re.compile(r"[a-z]:[\\/]|\\\\", re.IGNORECASE)
_HTML_ESCAPES = {"%22": '"', "%0D": "\r", "%0A": "\n"}
"""What browsers write in place of these (HTML, 4.10.21.8: multipart form data)."""


class UnknownCharset(ValueError):
    """A text is in a charset that is not read, or not in the charset that it names."""


def parameters(header: str) -> Mapping[str, str]:
    """The parameters of a header such as `form-data; name="file"`, by name in lower case.

    `name*` (RFC 5987) comes before `name`; `name*0`, `name*1` (RFC 2231) are put together. In values without `*` the
    escapes of browsers and encoded words (RFC 2047) are read; an ill-formed word stays as it is.

    Raises:
        UnknownCharset
        ValueError: a parameter cannot be read.
    """
    found = [(match[1].lower(), _closed(match[2].strip())) for match in _PARAMETER.finditer(header)]
    try:
        joined = decode_params([("", ""), *found])[1:]
    except TypeError:  # how it refuses `name*` beside `name*0`
        raise ValueError("a parameter is both whole and in pieces") from None
    return {name: _text(value) for name, value in joined}


def last_of_windows_path(name: str) -> str:
    """A file name of which an absolute Windows path keeps its last part; other names keep their folders."""
    return re.split(r"[\\/]", name)[-1] if _WINDOWS_PATH.match(name) else name


def decoded(data: bytes, charset: str) -> str:
    """Bytes as text.

    Raises:
        UnknownCharset
    """
    if charset.lower() not in CHARSETS:
        raise UnknownCharset
    try:
        return data.decode("utf-8-sig" if charset.lower() in ("utf-8", "utf8") else charset)
    except UnicodeDecodeError:
        raise UnknownCharset from None


def _closed(value: str) -> str:
    if value.startswith('"') and (len(value) == 1 or not value.endswith('"')):
        raise ValueError("a quote is not closed")
    return value


def _text(value: str | tuple[str | None, str | None, str]) -> str:
    if not isinstance(value, str):
        charset, _, text = value  # its bytes, each as one character
        return decoded(unquote(text).encode("latin-1"), charset or "utf-8")
    plain = unquote(value)
    for escape, character in _HTML_ESCAPES.items():
        plain = plain.replace(escape, character)
    return _ENCODED_WORDS.sub(_words, plain)


def _words(run: re.Match[str]) -> str:
    """Encoded words with only spaces between them, which do not count. A character may be divided over two words."""
    try:
        return "".join(decoded(word, charset or "") for word, charset in decode_header(run[0]))
    except HeaderParseError:
        return run[0]
