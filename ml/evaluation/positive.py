"""The positive classes of a training and of a model, and the score of a scan: the sum of their probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ml.runtime.errors import BadParams
from ml.spec import positive_class


def resolve(classes: Sequence[str], asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """The positive classes of a training (see `ml.spec.positive_class.resolve`).

    Raises:
        BadParams: names the parameter and the classes.
    """
    try:
        return positive_class.resolve(classes, asked)
    except positive_class.Unclear as error:
        raise BadParams(f"positive: {error}") from error


def of_model(metadata: Mapping[str, Any], classes: Sequence[str]) -> tuple[str, ...]:
    """The positive classes that a model file names; of an older file, by the rule that it was trained with."""
    named = metadata.get("positive")
    return by_first_rule(classes) if named is None else tuple(named)


def by_first_rule(classes: Sequence[str]) -> tuple[str, ...]:
    """The rule of model files that name none: of two classes Tumor if there is one, else the last."""
    if len(classes) != 2:
        return ()
    return (next((name for name in classes if name.lower() in ("tumor", "tumour")), classes[-1]),)


def score(probabilities: np.ndarray, classes: Sequence[str], positive: Sequence[str]) -> np.ndarray:
    """The sum of the positive classes' probabilities, float64 [N], of probabilities [N, classes]."""
    return np.asarray(probabilities, np.float64)[:, indices(classes, positive)].sum(axis=1)


def indices(classes: Sequence[str], positive: Sequence[str]) -> list[int]:
    """The places of the positive classes among the network's outputs."""
    return [list(classes).index(name) for name in positive]
