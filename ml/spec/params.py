"""What the parameter models of all pipelines have in common.

Any pydantic model serves, as long as it reads a list where it has a tuple (JSON and YAML have no tuples: a strict model
needs a validator for that, see `ml.spec.image.ImageSize`). Three things are optional:

- A method `contradictions` for rules between fields (see `HasContradictions`).
- A method `misfits` for rules between fields and the dataset's classes (see `DependsOnClasses`).
- `json_schema_extra={"api": {…}}` of a field, for the API alone: `message` takes the place of its own words, `pattern`
  and `refused` are regular expressions that a text must match whole, and must hold nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from pydantic import BaseModel


@runtime_checkable
class HasContradictions(Protocol):
    """A parameters model with rules between fields that are each right."""

    def contradictions(self) -> Iterable[tuple[str, str]]:
        """(field, what is wrong and what to do): a sentence with a capital and a full stop."""
        ...


@runtime_checkable
class DependsOnClasses(Protocol):
    """A parameters model with fields that fit some classes only."""

    def misfits(self, classes: Sequence[str]) -> Iterable[tuple[str, str]]:
        """(field, what is wrong and what to do), as of `HasContradictions`."""
        ...


def contradictions(params: BaseModel) -> Iterable[tuple[str, str]]:
    """The broken rules between the fields of valid parameters; none where the model has no such rules."""
    return params.contradictions() if isinstance(params, HasContradictions) else ()


def misfits(params: BaseModel, classes: Sequence[str]) -> Iterable[tuple[str, str]]:
    """The fields of valid parameters that do not fit these classes; none where the model has no such rules."""
    return params.misfits(classes) if isinstance(params, DependsOnClasses) else ()
