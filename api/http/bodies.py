"""Requests into validated values: a parser for queries, a decorator for bodies. Unknown fields are refused."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any, NoReturn, TypeVar, cast

import flask
import flask_smorest
import marshmallow as ma
from flask import request
from marshmallow import fields
from webargs.core import is_json
from webargs.flaskparser import FlaskParser
from werkzeug.datastructures import FileStorage, MultiDict

from api.http.body_spool import JSON_BYTES, UploadRequest
from api.http.fields import find_unstorable, pointer_step
from api.http.problems import InvalidFields
from api.http.responses import CSV, JSON, NDJSON
from jobs.errors import UnsupportedMedia

View = TypeVar("View", bound=Callable[..., Any])
MULTIPART = "multipart/form-data"


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
                found[name] = value
        _refuse_unstorable(found)
        return found

    def handle_error(self, error: ma.ValidationError, req: Any, schema: Any, **kwargs: Any) -> NoReturn:
        """Respond with 422 and a JSON pointer for each error."""
        raise InvalidFields(list(pointers(error.messages)))


class Blueprint(flask_smorest.Blueprint):
    """A blueprint whose arguments go through `Parser`."""

    ARGUMENTS_PARSER = Parser()


def accepts_body(
    json: type[ma.Schema] | None = None,
    multipart: type[ma.Schema] | None = None,
    manifest: type[ma.Schema] | None = None,
) -> Callable[[View], View]:
    """Declare which bodies a view accepts. The view gets the validated values as its first argument.

    Args:
        json: schema of a JSON body.
        multipart: schema of a multipart body.
        manifest: schema whose field `manifest` is the whole body (CSV or NDJSON); the other fields come from the query.

    Raises:
        UnsupportedMedia: the body has another media type.
        InvalidFields
    """
    declared = ((MULTIPART, multipart), (JSON, json), (CSV, manifest), (NDJSON, manifest))
    kinds = {kind: schema for kind, schema in declared if schema}

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


def _document(view: Any, kinds: dict[str, type[ma.Schema]]) -> dict[str, Any]:
    content = {
        kind: {"schema": _whole_body(schema) if kind in (CSV, NDJSON) else schema} for kind, schema in kinds.items()
    }
    document: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    if CSV in kinds:
        before = getattr(view, "_apidoc", {}).get("manual_doc", {}).get("parameters", [])  # lists are not merged
        document["parameters"] = [*before, {"in": "query", "schema": kinds[CSV](exclude=["manifest"])}]
    return document


def _whole_body(schema: type[ma.Schema]) -> dict[str, Any]:
    """OpenAPI of the field `manifest` as the whole body."""
    return {"type": "string", **schema._declared_fields["manifest"].metadata}


def _body(kinds: dict[str, type[ma.Schema]]) -> Any:
    if MULTIPART in kinds and request.mimetype == MULTIPART:
        schema = kinds[MULTIPART]()
        raw = _multipart(schema)
    elif JSON in kinds and (is_json(request.mimetype) or not request.mimetype):
        schema = kinds[JSON]()
        raw = _json()
    elif request.mimetype in (CSV, NDJSON) and request.mimetype in kinds:
        schema = kinds[request.mimetype]()
        raw = {"manifest": FileStorage(cast(UploadRequest, request).spooled()), **_query(schema)}
    else:
        raise UnsupportedMedia(f"Send the body as {' or '.join(kinds)}.")
    try:
        return schema.load(raw, unknown=ma.RAISE)
    except ma.ValidationError as error:
        raise InvalidFields(list(pointers(error.messages))) from None


def _json() -> Any:
    limit = request.max_content_length
    request.max_content_length = min(JSON_BYTES, limit) if limit is not None else JSON_BYTES
    text = request.get_data(cache=False)
    try:
        value = json.loads(text, parse_constant=_refuse_constant) if text else {}
        _refuse_unstorable(value)
    except (ValueError, RecursionError):
        raise InvalidFields([("", "Not valid JSON.")]) from None
    return value


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _multipart(schema: ma.Schema) -> dict[str, Any]:
    parts: MultiDict[str, Any] = MultiDict(request.form)
    for name, file in request.files.items(multi=True):
        parts.add(name, file)
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
    if isinstance(field, fields.Dict) and texts:
        return _value_of(name, values[0])
    return _typed(field, name, values[0]) if texts else values[0]


def _value_of(name: str, text: str) -> Any:
    """The value of a part that is no text: it is written as JSON."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        _refuse_unstorable({name: value})
    except (ValueError, RecursionError):
        raise InvalidFields([(f"/{pointer_step(name)}", "Not valid JSON.")]) from None
    return value


def _refuse_unstorable(value: Any) -> None:
    if wrong := find_unstorable(value):
        raise InvalidFields(wrong[:20])
