"""What the parameter models of all pipelines have in common.

Any pydantic model serves, as long as it reads a list where it has a tuple (JSON and YAML have no tuples: a strict model
needs a validator for that, see `ml.spec.image.ImageSize`). Two things are optional:

- A method `contradictions` for rules between fields (see `HasContradictions`).
- `json_schema_extra={"api": {…}}` of a field, for the API alone: `message` takes the place of its own words, `pattern`
  and `refused` are regular expressions that a text must match whole, and must hold nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from pydantic import BaseModel


@runtime_checkable
class HasContradictions(Protocol):
    """A parameters model with rules between fields that are each right."""

    def contradictions(self) -> Iterable[tuple[str, str]]:
        """(field, what is wrong and what to do): a sentence with a capital and a full stop."""
        ...


def contradictions(params: BaseModel) -> Iterable[tuple[str, str]]:
    """The broken rules between the fields of valid parameters; none where the model has no such rules."""
    return params.contradictions() if isinstance(params, HasContradictions) else ()
