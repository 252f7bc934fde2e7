"""Requests into validated values: a parser for queries, a decorator for bodies. Unknown fields are refused."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, wraps
from io import SEEK_END
from typing import IO, Any, NoReturn, TypeVar, cast

import flask
import flask_smorest
import marshmallow as ma
from flask import request
from marshmallow import fields, validate
from webargs.core import is_json
from webargs.flaskparser import FlaskParser
from werkzeug.datastructures import FileStorage, MultiDict
from werkzeug.exceptions import RequestEntityTooLarge

from api.http.body import json_text
from api.http.body.content_coding import ACCEPTED
from api.http.body.large_bodies import ServerBusy
from api.http.body.multipart import MULTIPART
from api.http.body.spool import JSON_BYTES, SCAN_JSON_BYTES, SMALL_BYTES, UploadRequest
from api.http.context import tenant
from api.http.fields import Base64, File, find_unstorable, pointer_step
from api.http.problems import MEDIA_TYPE, InvalidFields, ProblemSchema
from api.http.responses import CSV, JSON, NDJSON
from jobs.errors import Invalid, MalformedBody, TooLarge, UnsupportedMedia

View = TypeVar("View", bound=Callable[..., Any])
RELATED = ("multipart/related", "multipart/mixed")
UNSUPPORTED_MEDIA = {
    "415": {
        "description": "Another media type than these, or another `Content-Encoding` than gzip or deflate.",
        "headers": {
            "Accept-Encoding": {
                "description": f"`{ACCEPTED}`, if it was the `Content-Encoding`.",
                "schema": {"type": "string"},
            }
        },
        "content": {MEDIA_TYPE: {"schema": ProblemSchema}},
    }
}
"""What OpenAPI says of every operation that takes a body."""


class OneOf:
    """A body whose `kind` says which of some schemas the rest of it has."""

    def __init__(self, schemas: Mapping[str, type[ma.Schema]]) -> None:
        self.schemas = {kind: _with_kind(kind, schema) for kind, schema in schemas.items()}

    def of(self, kind: Any) -> ma.Schema:
        """The schema of a body of this kind.

        Raises:
            InvalidFields
        """
        if isinstance(kind, str) and kind in self.schemas:
            return self.schemas[kind]()
        raise InvalidFields([("/kind", f"Must be one of: {', '.join(self.schemas)}.")])

    def document(self) -> dict[str, Any]:
        """OpenAPI's discriminated union."""
        mapping = {kind: f"#/components/schemas/{schema.__name__}" for kind, schema in self.schemas.items()}
        return {"oneOf": [*self.schemas.values()], "discriminator": {"propertyName": "kind", "mapping": mapping}}


def _with_kind(kind: str, schema: type[ma.Schema]) -> type[ma.Schema]:
    field = fields.String(required=True, validate=validate.OneOf([kind]))
    return schema.from_dict({"kind": field}, name=f"{schema.__name__}WithKind")


Declared = type[ma.Schema] | OneOf


class Parser(FlaskParser):
    """webargs with problem details as errors; unknown parameters are refused."""

    DEFAULT_UNKNOWN_BY_LOCATION = {"query": ma.RAISE, "path": ma.RAISE}  # noqa: RUF012  (webargs' way)

    def load_querystring(self, req: flask.Request, schema: ma.Schema) -> Any:
        """The query as a dictionary: `metadata[study]=7` becomes `{"metadata": {"study": "7"}}`."""
        found: dict[str, Any] = {}
        for name, value in req.args.items():
            outer, bracket, inner = name.partition("[")
            if bracket and inner.endswith("]") and isinstance(schema.fields.get(outer), fields.Dict):
                found.setdefault(outer, {})[inner[:-1]] = value
            else:
                is_list = isinstance(schema.fields.get(name), fields.List)
                found[name] = req.args.getlist(name) if is_list else value
        _refuse_unstorable(found)
        return found

    def handle_error(self, error: ma.ValidationError, req: Any, schema: Any, **kwargs: Any) -> NoReturn:
        """Respond with 422 and a JSON pointer for each error."""
        raise InvalidFields(pointers(error.messages))


class Blueprint(flask_smorest.Blueprint):
    """A blueprint whose arguments go through `Parser`."""

    ARGUMENTS_PARSER = Parser()


def accepts_body(
    json: Declared | None = None,
    multipart: Declared | None = None,
    manifest: type[ma.Schema] | None = None,
) -> Callable[[View], View]:
    """Declare which bodies a view accepts. The view gets the validated values as its first argument.

    Args:
        json: schema of a JSON body.
        multipart: schema of a multipart body.
        manifest: schema whose field `manifest` is the whole body (CSV or NDJSON); the other fields come from the query.

    Raises:
        UnsupportedMedia: the body has another media type.
        MalformedBody: its syntax is wrong.
        InvalidFields
    """
    declared = ((MULTIPART, multipart), (JSON, json), (CSV, manifest), (NDJSON, manifest))
    kinds: dict[str, Declared] = {kind: schema for kind, schema in declared if schema}

    def decorate(view: View) -> View:
        @wraps(view)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return view(_body(kinds), *args, **kwargs)

        documented = flask_smorest.Blueprint.doc(**_document(view, kinds))(wrapper)
        return documented  # type: ignore[no-any-return]

    return decorate


def pointers(messages: Any, pointer: str = "") -> Iterator[tuple[str, str]]:
    """marshmallow's tree of messages as pairs of JSON pointer and message."""
    if isinstance(messages, Mapping):
        for key, below in messages.items():
            # "_schema" stands for the whole object, "key" and "value" for the two halves of a dictionary's entry.
            inside = "" if key in ("_schema", "key", "value") else f"/{pointer_step(key)}"
            yield from pointers(below, pointer + inside)
    elif isinstance(messages, list | tuple):
        for message in messages:
            yield from pointers(message, pointer)
    else:
        yield pointer, str(messages)


def _document(view: Any, kinds: dict[str, Declared]) -> dict[str, Any]:
    content = {kind: {"schema": _schema_document(kind, schema)} for kind, schema in kinds.items()}
    document: dict[str, Any] = {
        "requestBody": {"required": True, "content": content},
        "responses": UNSUPPORTED_MEDIA,
    }
    if CSV in kinds:
        before = getattr(view, "_apidoc", {}).get("manual_doc", {}).get("parameters", [])  # lists are not merged
        manifest: Any = kinds[CSV]
        document["parameters"] = [*before, {"in": "query", "schema": manifest(exclude=["manifest"])}]
    return document


def _schema_document(kind: str, schema: Any) -> Any:
    if isinstance(schema, OneOf):
        return schema.document()
    if kind in (CSV, NDJSON):  # the field `manifest` is the whole body
        return {"type": "string", **schema._declared_fields["manifest"].metadata}
    return schema


def _body(kinds: dict[str, Declared]) -> Any:
    ours = cast(UploadRequest, request)
    ours.tenant_id = tenant()
    try:
        return _loaded(kinds)
    except (RequestEntityTooLarge, TooLarge, ServerBusy):
        ours.discard(SCAN_JSON_BYTES)
        raise


def _loaded(kinds: dict[str, Declared]) -> Any:
    if MULTIPART in kinds and request.mimetype == MULTIPART:
        parts = _parts()
        schema = _schema(kinds[MULTIPART], parts)
        raw = _multipart(schema, parts)
    elif JSON in kinds and (is_json(request.mimetype) or not request.mimetype):
        raw = _json(SCAN_JSON_BYTES if _takes_scans(kinds[JSON]) else JSON_BYTES)
        schema = _schema(kinds[JSON], raw)
    elif request.mimetype in (CSV, NDJSON) and request.mimetype in kinds:
        schema = _schema(kinds[request.mimetype], None)
        raw = {"manifest": FileStorage(_whole_body()[0]), **_query(schema)}
    else:
        raise UnsupportedMedia(_other_media(kinds))
    try:
        return schema.load(raw, unknown=ma.RAISE)
    except ma.ValidationError as error:
        raise InvalidFields(pointers(error.messages)) from None


def _other_media(kinds: Mapping[str, Declared]) -> str:
    taken = f"Send the body as {' or '.join(kinds)}."
    if request.mimetype in RELATED and MULTIPART in kinds:  # what DICOMweb (STOW-RS) sends
        return f"{request.mimetype} is not taken. {taken} Each file is a part with a file name."
    return taken


def _schema(declared: Declared, raw: Any) -> ma.Schema:
    if not isinstance(declared, OneOf):
        return declared()
    if not isinstance(raw, Mapping):
        raise InvalidFields([("", "Must be an object.")])
    return declared.of(raw.get("kind"))


@cache
def _takes_scans(declared: Declared) -> bool:
    """Whether a field of the body takes a scan in base64."""
    schemas = declared.schemas.values() if isinstance(declared, OneOf) else [declared]
    found = [field for schema in schemas for field in schema._declared_fields.values()]
    return any(isinstance(getattr(field, "inner", field), Base64) for field in found)


def _json(limit: int) -> Any:
    request.max_content_length = min(limit, request.max_content_length or limit)
    file, size = _whole_body()
    if size > SMALL_BYTES and limit > JSON_BYTES:
        value = json_text.parse_file(file, cast(UploadRequest, request).new_file)
    else:
        value = _parsed(file.read()) if size else {}
    _refuse_unstorable(value)
    return value


def _whole_body() -> tuple[IO[bytes], int]:
    """The body as a file, and its size; it is a large body's turn."""
    ours = cast(UploadRequest, request)
    file = ours.spooled()
    size = file.seek(0, SEEK_END)
    file.seek(0)
    if size > SMALL_BYTES:
        ours.take_turn()
    return file, size


def _parsed(text: bytes) -> Any:
    if json_text.is_costly(text):
        cast(UploadRequest, request).take_turn()
    return json_text.parse(text)


def _parts() -> MultiDict[str, Any]:
    parts: MultiDict[str, Any] = MultiDict(request.form)
    for name, file in request.files.items(multi=True):
        parts.add(name, file)
    return parts


def _multipart(schema: ma.Schema, parts: MultiDict[str, Any]) -> dict[str, Any]:
    return {name: _part(schema.fields.get(name), name, values) for name, values in parts.lists()}


def _query(schema: ma.Schema) -> dict[str, Any]:
    found = Parser().load_querystring(request, schema)
    return {name: _typed(schema.fields.get(name), name, value) for name, value in found.items()}


def _typed(field: Any, name: str, value: Any) -> Any:
    return _value_of(name, value) if isinstance(field, fields.Boolean | fields.Number) else value


def _part(field: Any, name: str, values: list[Any]) -> Any:
    texts = [value for value in values if isinstance(value, str)]
    _refuse_unstorable({name: texts})
    if isinstance(field, fields.List):
        return values
    if len(values) > 1:
        raise InvalidFields([(f"/{pointer_step(name)}", "Given more than once.")])
    if field is not None and not isinstance(field, File) and not texts:
        raise InvalidFields([(f"/{pointer_step(name)}", "Sent as a file. Send it as text, without a file name.")])
    if isinstance(field, fields.Dict) and texts:
        return _value_of(name, values[0])
    return _typed(field, name, values[0]) if texts else values[0]


def _value_of(name: str, text: str) -> Any:
    """The value of a part that is no text: it is written as JSON."""
    try:
        value = _parsed(text.encode())
    except MalformedBody:
        raise InvalidFields([(f"/{pointer_step(name)}", "Not valid JSON.")]) from None
    except Invalid as error:
        raise InvalidFields([(f"/{pointer_step(name)}", str(error))]) from None
    _refuse_unstorable({name: value})
    return value


def _refuse_unstorable(value: Any) -> None:
    wrong = InvalidFields(find_unstorable(value))
    if wrong.errors:
        raise wrong
