"""A pipeline's parameters for people: the rows of `python -m ml train --help` and of the table in docs/api.md.

`python -m ml.spec.describe docs/api.md` rewrites the image pipeline's table in that file.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

HEAD = "| name | default | range | what it is |"


class Row(NamedTuple):
    """One parameter. `default` is JSON; `words` are what it accepts besides numbers, lists and free text."""

    name: str
    default: str
    words: tuple[str, ...]
    range: str
    description: str


def rows(model: type[BaseModel]) -> list[Row]:
    """The parameters of a model, in its order."""
    return [_row(name, schema) for name, schema in model.model_json_schema()["properties"].items()]


def table(model: type[BaseModel]) -> str:
    """The parameters as a table in Markdown, without a line break at the end."""
    lines = [f"| `{row.name}` | `{row.default}` | {row.range} | {row.description} |" for row in rows(model)]
    return "\n".join([HEAD, "| --- | --- | --- | --- |", *lines])


def with_table(document: str, model: type[BaseModel]) -> str:
    """The document with the model's table in place of the one that it has."""
    return re.sub(rf"^{re.escape(HEAD)}\n(\|.*\n)*", lambda _: table(model) + "\n", document, count=1, flags=re.M)


def _row(name: str, schema: dict[str, Any]) -> Row:
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    words = tuple(word for kind in kinds for word in _words(kind))
    default = json.dumps(schema["default"]) if "default" in schema else "required"
    examples = [f"`{example}`" for example in schema.get("examples", [])]
    ranges = examples or [f"`{word}`" for word in words] or [range_of(kind) for kind in kinds]
    return Row(name, default, words, ", ".join(ranges), schema.get("description", ""))


def _words(kind: dict[str, Any]) -> list[str]:
    if kind.get("type") == "boolean":
        return ["true", "false"]
    return [str(word) for word in kind.get("enum", [kind["const"]] if "const" in kind else [])]


def range_of(kind: dict[str, Any]) -> str:
    """The range of one kind of a JSON schema: numbers, or a tuple of them."""
    if "prefixItems" in kind:
        return f"[{', '.join(str(item.get('const', range_of(item))) for item in kind['prefixItems'])}]"
    low, high = kind.get("minimum"), kind.get("maximum")
    if low is not None and high is not None:
        return f"{low}–{high}"
    limits = ("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "up to"), ("exclusiveMaximum", "below")
    return ", ".join(f"{word} {kind[limit]}" for limit, word in limits if limit in kind)


if __name__ == "__main__":
    from ml.spec.image import Params

    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8"), Params), encoding="utf-8")
