"""Fields that take no guesses: the text "2" is no number, and 1 is no boolean."""

import base64
import binascii
import datetime as dt
import math
import re
import uuid
from collections.abc import Mapping
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import marshmallow as ma
from flask_smorest.fields import Upload
from marshmallow import fields, validate
from werkzeug.datastructures import FileStorage

VERSION = re.compile(r"^(champion|[1-9][0-9]{0,8})$")
"""What names a model version. Ask `fullmatch`: to `match`, a line break at the end is no difference."""


def words(of: type[StrEnum]) -> validate.OneOf:
    """One of an enumeration's words."""
    return validate.OneOf([str(word) for word in of])


class Boolean(fields.Boolean):
    """True or false of JSON."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class WordOrBoolean(fields.Field[Any]):
    """One word, true or false."""

    def __init__(self, word: str, **kwargs: Any) -> None:
        self.word = word
        kwargs["metadata"] = {"enum": [word, True, False], **kwargs.get("metadata", {})}
        super().__init__(**kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if value == self.word or isinstance(value, bool):
            return value
        raise ma.ValidationError(f"Must be `{self.word}`, true or false.")


class Integer(fields.Integer):
    """A whole number of JSON."""

    def __init__(self, low: int, high: int, **kwargs: Any) -> None:
        super().__init__(strict=True, validate=validate.Range(low, high), **kwargs)


class Float(fields.Float):
    """A finite number of JSON."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> float:
        if isinstance(value, (str, bool)):
            raise self.make_error("invalid", input=value)
        return float(super()._deserialize(value, attr, data, **kwargs))


class Time(fields.AwareDateTime):
    """A time in RFC 3339, UTC; read without a zone it is taken as UTC."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(format="iso", default_timezone=dt.UTC, **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> dt.datetime:
        try:
            # Postgres refuses offsets of 16 hours and more, Python does not.
            return super()._deserialize(value, attr, data, **kwargs).astimezone(dt.UTC)
        except OverflowError:
            raise self.make_error("invalid", input=value, obj_type="datetime") from None

    def _serialize(self, value: dt.datetime | None, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else value.astimezone(dt.UTC).isoformat().replace("+00:00", "Z")


class Base64(fields.String):
    """Bytes in base64; a data URL and line breaks are taken too."""

    default_error_messages = {"base64": "Not valid base64."}  # noqa: RUF012  (marshmallow's way)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        text: str = super()._deserialize(value, attr, data, **kwargs)
        if text.startswith("data:"):
            text = text.partition(",")[2]
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise self.make_error("base64") from None


class ImageOrScanId(Base64):
    """An image in base64, or the id of a stored scan: no UUID with its dashes is valid base64."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        scan_id = parse_uuid(value) if isinstance(value, str) else None
        return scan_id or super()._deserialize(value, attr, data, **kwargs)


class File(Upload):
    """A file of a multipart body."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> FileStorage:
        if not isinstance(value, FileStorage):
            raise ma.ValidationError("Send it as a file, with a file name.")
        return value


class ModelChoice(fields.String):
    """`champion`, or a version's number as text."""

    def __init__(self, **kwargs: Any) -> None:
        metadata = {"example": "champion", "pattern": VERSION.pattern}
        super().__init__(validate=_names_a_version, metadata=metadata, **kwargs)


def _names_a_version(value: str) -> None:
    if not VERSION.fullmatch(value):
        raise ma.ValidationError("Must be `champion` or a version's number.")


class Metadata(fields.Dict):
    """A client's own labels: names to text, numbers and booleans."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keys=fields.String(validate=validate.Length(1, 64)), **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> dict[str, Any]:
        labels: dict[str, Any] = super()._deserialize(value, attr, data, **kwargs)
        if len(labels) > 50:
            raise ma.ValidationError("At most 50 labels.")
        wrong = {key: [why] for key, label in labels.items() if (why := _complaint(label))}
        if wrong:
            raise ma.ValidationError(wrong)  # type: ignore[arg-type]
        return labels


def _complaint(label: Any) -> str | None:
    if not isinstance(label, str | int | float):
        return "Must be a text, a number or a boolean."
    return "Longer than 500 characters." if isinstance(label, str) and len(label) > 500 else None


class HttpUrl(fields.String):
    """An address that begins with http:// or https:// and names a host."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(validate=[validate.Length(max=2000), _is_http], **kwargs)


def _is_http(value: str) -> None:
    try:
        parts = urlsplit(value)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        good = False
    if not good:
        raise ma.ValidationError("Must be an http:// or https:// address.")


def exactly_one(data: dict[str, Any], *names: str) -> None:
    """Raise ValidationError unless exactly one of the fields is given."""
    given = [name for name in names if name in data]
    if len(given) != 1:
        raise ma.ValidationError(f"Give exactly one of {', '.join(names)}.", given[-1] if given else names[0])


def parse_uuid(text: str) -> uuid.UUID | None:
    """A UUID in its canonical form, or None."""
    try:
        found = uuid.UUID(text)
    except ValueError:
        return None
    return found if str(found) == text.lower() else None


def unstorable(value: Any, pointer: str = "") -> list[tuple[str, str]]:
    """Pointers to what Postgres cannot keep: NUL, lone surrogates, infinite numbers. At most a few are named."""
    if isinstance(value, str):
        return [(pointer, "Holds a character that cannot be stored.")] if not _is_storable(value) else []
    if isinstance(value, float):
        return [] if math.isfinite(value) else [(pointer, "Must be a finite number.")]
    children: Any = ()
    if isinstance(value, Mapping):
        children = [*((key, key) for key in value if not _is_storable(str(key))), *value.items()]
    elif isinstance(value, list):
        children = enumerate(value)
    return [wrong for key, child in children for wrong in unstorable(child, f"{pointer}/{escaped(key)}")]


def _is_storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def escaped(key: Any) -> str:
    """One step of a JSON pointer (RFC 6901). What cannot be encoded is replaced."""
    return str(key).replace("~", "~0").replace("/", "~1").encode("utf-8", "replace").decode()
