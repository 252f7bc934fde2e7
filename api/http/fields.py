"""Strict fields: the string "2" is no number, and 1 is no boolean. Lengths are checked before what they are of."""

import datetime as dt
import io
import math
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import IO, Any
from urllib.parse import urlsplit

import marshmallow as ma
from flask_smorest.fields import Upload
from marshmallow import fields, validate
from werkzeug.datastructures import FileStorage

from api.http.body.json_text import LongString
from api.http.body.transfer_encoding import DamagedText, decode_base64

VERSION = re.compile(r"^(champion|[1-9][0-9]{0,8})$")
"""A model version in a request. Use `fullmatch`: `match` would allow a line break at the end."""
STEP_LENGTH = 100
"""Most characters of a step of a JSON pointer: a client's key may be longer."""


def one_of(of: type[StrEnum]) -> validate.OneOf:
    """Validate that a value is one of an enumeration."""
    return validate.OneOf([str(word) for word in of])


class Boolean(fields.Boolean):
    """A JSON boolean."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Float(fields.Float):
    """A finite JSON number."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> float:
        if isinstance(value, (str, bool)):
            raise self.make_error("invalid", input=value)
        return float(super()._deserialize(value, attr, data, **kwargs))


class Time(fields.AwareDateTime):
    """A time in RFC 3339; without a time zone it is UTC."""

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
    """A file in base64; data URLs, the URL-safe alphabet and line breaks are accepted, padding may be left out."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        try:
            if isinstance(value, LongString):
                return _decoded(value.pieces(), value.open_file())
            return _decoded([super()._deserialize(value, attr, data, **kwargs)], io.BytesIO())
        except DamagedText as error:
            raise ma.ValidationError(str(error)) from None


def _decoded(pieces: Iterable[str], file: IO[bytes]) -> FileStorage:
    for block in decode_base64(pieces):
        file.write(block)
    file.seek(0)
    return FileStorage(file)


class ImageOrScanId(Base64):
    """An image in base64, or the id of a stored scan: a UUID would be base64 of 27 bytes, fewer than any image has."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        scan_id = parse_uuid(value) if isinstance(value, str) else None
        return scan_id or super()._deserialize(value, attr, data, **kwargs)


class File(Upload):
    """A file of a multipart body."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> FileStorage:
        if not isinstance(value, FileStorage):
            raise ma.ValidationError('Send it as a file, with a file name: `filename="…"` in its Content-Disposition.')
        return value


class List(fields.List):
    """A list whose length is checked before its elements."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> list[Any]:
        for check in self.validators:
            if isinstance(check, validate.Length) and isinstance(value, list):
                check(value)
        return super()._deserialize(value, attr, data, **kwargs)


class Answer(ma.Schema):
    """An object in an answer that always has all its fields: required ones in OpenAPI, for generated clients."""

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        """Mark every field."""
        field_obj.required = True


class Part(fields.Nested):
    """An object in the answer that is read from the whole row, not from one attribute of it."""

    def __init__(self, schema: type[ma.Schema], read: Callable[[Any], Any], **kwargs: Any) -> None:
        super().__init__(schema, **kwargs)
        self._read = read

    def get_value(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply `read` to the row."""
        return self._read(obj)


def links_schema(name: str, always: Sequence[str], sometimes: Sequence[str] = ()) -> type[ma.Schema]:
    """The schema of an object of addresses.

    Args:
        name: of the schema in OpenAPI.
        always: what each such object links to.
        sometimes: what only some do.
    """
    declared = {link: fields.String(required=link in always) for link in (*always, *sometimes)}
    return ma.Schema.from_dict(declared, name=name)  # type: ignore[arg-type]


class ModelChoice(fields.String):
    """`champion`, or a version number as a string."""

    def __init__(self, **kwargs: Any) -> None:
        metadata = {"example": "champion", "pattern": VERSION.pattern}
        super().__init__(validate=_names_a_version, metadata=metadata, **kwargs)


def _names_a_version(value: str) -> None:
    if not VERSION.fullmatch(value):
        raise ma.ValidationError("Must be `champion` or a version's number.")


class Metadata(fields.Dict):
    """A client's labels: strings, numbers and booleans by name."""

    def __init__(self, **kwargs: Any) -> None:
        label = fields.Raw(metadata={"type": ["string", "number", "boolean"]})
        super().__init__(keys=fields.String(validate=validate.Length(1, 64)), values=label, **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> dict[str, Any]:
        if isinstance(value, Mapping) and len(value) > 50:
            raise ma.ValidationError("At most 50 labels.")
        labels: dict[str, Any] = super()._deserialize(value, attr, data, **kwargs)
        wrong = {key: [why] for key, label in labels.items() if (why := _label_error(label))}
        if wrong:
            raise ma.ValidationError(wrong)  # type: ignore[arg-type]
        return labels


def _label_error(label: Any) -> str | None:
    if not isinstance(label, str | int | float):
        return "Must be a text, a number or a boolean."
    return "Longer than 500 characters." if isinstance(label, str) and len(label) > 500 else None


class HttpUrl(fields.String):
    """A URL with http:// or https:// and a host."""

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


def find_unstorable(value: Any, pointer: str = "") -> Iterator[tuple[str, str]]:
    """JSON pointer and message for each value that Postgres cannot store: NUL, lone surrogates, infinite numbers."""
    if isinstance(value, str) and not _is_storable(value):
        yield pointer, "Holds a character that cannot be stored."
    elif isinstance(value, float) and not math.isfinite(value):
        yield pointer, "Must be a finite number."
    elif isinstance(value, Mapping | list):
        for key, child in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(key, str) and not _is_storable(key):
                yield f"{pointer}/{pointer_step(key)}", "Holds a character that cannot be stored."
            if isinstance(child, str | float | Mapping | list):
                yield from find_unstorable(child, f"{pointer}/{pointer_step(key)}")


def _is_storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def pointer_step(key: Any) -> str:
    """A key as one step of a JSON pointer (RFC 6901), cut after `STEP_LENGTH`. Characters that cannot be encoded are
    replaced."""
    return str(key)[:STEP_LENGTH].replace("~", "~0").replace("/", "~1").encode("utf-8", "replace").decode()
