"""A marshmallow schema made from a pydantic model: a pipeline's parameters as `ml.spec` declares them."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import marshmallow as ma
from marshmallow import fields, validate
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from api.http.fields import Boolean, Float, List
from ml.spec.describe import range_of
from ml.spec.params import contradictions

Json = dict[str, Any]
Check = Callable[[Any], None]


def schema_of(model: type[BaseModel], renamed: Mapping[str, str] = MappingProxyType({})) -> type[ma.Schema]:
    """The schema `{model}Schema`: a field for each of the model's, with its range, default and description.

    Loading checks each value alone, then the model as a whole and its `contradictions`; what was left out stays out.
    Integers, numbers, booleans, texts, words (Literal), booleans or words, lists, tuples of one kind, and all of them
    or null have a field. The model checks a union with a `message` of its own, by itself too.

    Args:
        renamed: earlier names of fields; the answer to one of them gives the present name.

    Raises:
        TypeError: the model has a field of another kind.
    """
    found = model.model_json_schema()
    required = found.get("required", ())
    declared = {name: _field(name, one, name in required) for name, one in found.get("properties", {}).items()}
    for name, field in declared.items():
        if isinstance(field, Union):
            field.validators.append(partial(_check_alone, model, name))
    schema = _ModelSchema.from_dict(declared, name=f"{model.__name__}Schema")
    schema._model, schema._renamed = model, renamed  # type: ignore[attr-defined]
    return schema


class _ModelSchema(ma.Schema):
    _model: ClassVar[type[BaseModel]]
    _renamed: ClassVar[Mapping[str, str]]

    def handle_error(self, error: ma.ValidationError, data: Any, **kwargs: Any) -> None:
        """Lead from a parameter's earlier name to the present one."""
        for old, new in self._renamed.items():
            if old in error.messages_dict:
                error.messages_dict[old] = [f"It is called {new} now."]

    @ma.validates_schema
    def _check_together(self, data: Json, **kwargs: Any) -> None:
        found: dict[str, list[str]] = {}
        for name, message in _complaints(self._model, data):
            found.setdefault(name, []).append(message)
        if found:
            raise ma.ValidationError(found)  # type: ignore[arg-type]


def _complaints(model: type[BaseModel], data: Json) -> Iterator[tuple[str, str]]:
    """What the model itself says of values that are each right: its own validators, and its contradictions."""
    try:
        params = model.model_validate(data)
    except ValidationError as error:
        yield from _refusals(model, error)
    else:
        yield from contradictions(params)


def _check_alone(model: type[BaseModel], name: str, value: Any) -> None:
    try:
        model.model_validate({name: value})
    except ValidationError as error:
        if message := dict(_refusals(model, error)).get(name):
            raise ma.ValidationError(message) from None


def _refusals(model: type[BaseModel], error: ValidationError) -> Iterator[tuple[str, str]]:
    """Names and what is wrong with them. Of a union each kind has an error of its own, and one message stands for all
    of them."""
    found = error.errors(include_url=False, include_input=False)
    yield from dict.fromkeys((str(next(iter(each["loc"]), "_schema")), _words_of(model, each)) for each in found)


def _words_of(model: type[BaseModel], error: ErrorDetails) -> str:
    schema = model.model_json_schema().get("properties", {}).get(next(iter(error["loc"]), ""), {})
    return str(schema.get("api", {}).get("message", f"{error['msg']}."))


def _field(name: str, schema: Json, required: bool) -> fields.Field[Any]:
    """The field of a property of the model's JSON schema."""
    alternatives = schema.get("anyOf", [schema])
    kinds = [kind for kind in alternatives if kind.get("type") != "null"]
    try:
        field = _field_of(kinds, schema.get("api", {}))
    except (LookupError, ValueError):
        raise TypeError(f"{name}: there is no field for {kinds}.") from None
    field.metadata = {**_present(schema, "default", "description"), **field.metadata}
    field.required, field.allow_none = required, len(kinds) < len(alternatives)
    return field


def _field_of(kinds: list[Json], api: Json) -> fields.Field[Any]:
    if {"type": "boolean"} in kinds and len(kinds) > 1:
        return WordOrBoolean([word for kind in kinds if kind["type"] != "boolean" for word in _words(kind)])
    if len(kinds) > 1 and "message" in api:
        return Union(kinds)
    (kind,) = kinds
    make = _list if kind["type"] == "array" else _scalar
    return make(kind, api)


def _present(of: Json, *keys: str) -> Json:
    return {key: of[key] for key in keys if key in of}


def _words(kind: Json) -> list[Any]:
    return list(kind["enum"]) if "enum" in kind else [kind["const"]]


# --- one value ---

SCALARS: dict[str, Callable[..., fields.Field[Any]]] = {
    "boolean": Boolean, "integer": partial(fields.Integer, strict=True), "number": Float, "string": fields.String
}  # fmt: skip


class WordOrBoolean(fields.Field[Any]):
    """One of some words, true or false."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        super().__init__(metadata={"enum": [*words, True, False]})

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if value in self.words or isinstance(value, bool):
            return value
        raise ma.ValidationError(f"Must be {', '.join(f'`{word}`' for word in self.words)}, true or false.")


class Union(fields.Raw):
    """A value of one of several kinds, which the parameters' model tells apart."""

    def __init__(self, kinds: list[Json]) -> None:
        super().__init__(metadata={"anyOf": kinds})


def _scalar(kind: Json, api: Json) -> fields.Field[Any]:
    # apispec writes the bounds of a Range as if they were allowed themselves.
    shown = _present({**kind, **api}, "exclusiveMinimum", "exclusiveMaximum", "pattern")
    return SCALARS[kind["type"]](validate=[*_checks(kind, api)], metadata=shown)


def _checks(kind: Json, api: Json) -> Iterator[Check]:
    if "enum" in kind or "const" in kind:
        yield validate.OneOf(_words(kind))
    low, high = (kind.get(name, kind.get(f"exclusive{name.capitalize()}")) for name in ("minimum", "maximum"))
    if low is not None or high is not None:
        open_low, open_high = ("exclusiveMinimum" in kind), ("exclusiveMaximum" in kind)
        yield validate.Range(low, high, min_inclusive=not open_low, max_inclusive=not open_high)
    if "minLength" in kind or "maxLength" in kind:
        yield validate.Length(kind.get("minLength"), kind.get("maxLength"))
    if "pattern" in api:
        yield partial(_check_text, api)


def _check_text(api: Json, text: str) -> None:
    if not re.fullmatch(api["pattern"], text) or ("refused" in api and re.search(api["refused"], text)):
        raise ma.ValidationError(api.get("message", f"Must match {api['pattern']}."))


# --- lists ---


def _list(kind: Json, api: Json) -> fields.Field[Any]:
    shown = _present(kind, "minItems", "maxItems")
    if "prefixItems" not in kind:
        checks: Check = validate.Length(kind.get("minItems"), kind.get("maxItems"))
        return List(_scalar(kind["items"], {}), validate=checks, metadata=shown)
    check = partial(_check_tuple, kind["prefixItems"], api.get("message", f"Must be {range_of(kind)}."))
    return List(_scalar(_hull(kind["prefixItems"]), {}), validate=check, metadata=shown)


def _hull(items: list[Json]) -> Json:
    """What any of a tuple's items may be: marshmallow's lists have one field for all."""
    (kind,) = {item["type"] for item in items}
    found: Json = {"type": kind}
    for bound, widest in (("minimum", min), ("maximum", max)):
        values: list[Any] = [item.get(bound, item.get("const")) for item in items]
        if None not in values:
            found[bound] = widest(values)
    return found


def _check_tuple(items: list[Json], message: str, values: list[Any]) -> None:
    if len(values) != len(items) or not all(map(_is_within, values, items)):
        raise ma.ValidationError(message)


def _is_within(value: Any, item: Json) -> bool:
    return bool(item.get("const", value) == value and item.get("minimum", value) <= value <= item.get("maximum", value))
