"""A model card as Markdown (CommonMark, GitHub's tables): the template `model_card.md`. Clients' texts are escaped."""

import json
import re
from functools import cache, partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from api.views.model_card import SHARED_FIGURES
from jobs.tables import Json

FIGURE_NAMES = {
    "accuracy": "Accuracy",
    "precision": "Precision (positive predictive value)",
    "recall": "Recall (sensitivity)",
    "specificity": "Specificity",
    "f1": "F1",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC (average precision)",
}
SUBGROUP_FIGURES = {"accuracy": "Accuracy", "recall": "Sensitivity", "specificity": "Specificity"}
CLASS_FIGURES = ("precision", "recall", "f1", "roc_auc", "pr_auc")
PROMOTION_KINDS = {
    "gate": "by the gate, at its training's end",
    "request": "on request, the gate agreeing",
    "force": "by force",
    "rollback": "by a rollback",
}
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&!$])")
_LINE_STARTS = re.compile(r"^([-+=:]|\d+(?=[.)]))")
_BLANK_LINES = re.compile(r"\n{3,}")


def markdown(card: Json) -> str:
    """The card of `api.views.model_card` in Markdown."""
    text = _environment().get_template("model_card.md").render(card)
    return _BLANK_LINES.sub("\n\n", text).strip() + "\n"


def escaped(text: object) -> str:
    """Text on one line that Markdown shows as it is."""
    line = _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))
    return _LINE_STARTS.sub(lambda found: f"{found[1]}\\" if found[1].isdigit() else f"\\{found[1]}", line)


@cache
def _environment() -> Environment:
    environment = Environment(  # noqa: S701  (Markdown: the filter `md` escapes)
        loader=PackageLoader("api"), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    json_text = partial(json.dumps, indent=2, ensure_ascii=False)
    environment.filters |= {"md": escaped, "value": _value, "number": _number, "json": json_text}
    environment.globals |= {
        "figure_names": FIGURE_NAMES,
        "shared_figures": SHARED_FIGURES,
        "class_figures": CLASS_FIGURES,
        "subgroup_figures": SUBGROUP_FIGURES,
        "promotion_kinds": PROMOTION_KINDS,
        "zip": zip,
    }
    return environment


def _value(value: Any) -> str:
    """A value of any type, escaped."""
    if value is None:
        return "not known"
    return _number(value) if isinstance(value, float) else escaped(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
