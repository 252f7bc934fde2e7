"""How explanations are asked for; where a result's are, and what is to be known of them."""

from collections.abc import Sequence
from typing import Any

import marshmallow as ma
from marshmallow import fields
from sqlalchemy.orm import Session

from jobs.queue import explanations
from jobs.queue.explanations import ALL_CLASSES, ExplanationFiles
from jobs.results import queries
from jobs.results.queries import JobView
from jobs.states import ResultState
from jobs.tables import Json, ScanResult

BLANK_NOTE = (
    "Nothing in the scan speaks for this class: the heatmap is 0 everywhere, and the overlay shows the scan alone."
)
MISSING_NOTE = (
    "It could not be explained: the scan was no longer there, or the worker failed at it. Submit it again to have it."
)
CANCELLED_NOTE = "It was not explained: the job was cancelled before. Submit it again to have it."


class Explain(fields.Field[Any]):
    """True or false, in JSON or in words; or `all`. No fields.Boolean: what a form says for those must be JSON."""

    def __init__(self, **kwargs: Any) -> None:
        told = "Also make a Grad-CAM overlay and a heatmap of each result: for the class that was found, or for `all`."
        kinds = {"type": ["string", "boolean"], "enum": [ALL_CLASSES, True, False]}
        super().__init__(metadata={**kinds, "description": told}, **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        try:
            return ALL_CLASSES if value == ALL_CLASSES else fields.Boolean().deserialize(value)
        except ma.ValidationError:
            raise ma.ValidationError(f"Must be true, false or `{ALL_CLASSES}`.") from None


class PicturesSchema(ma.Schema):
    """Of one class. Both have the scan's own size."""

    overlay = fields.String(metadata={"description": "The grey scan with the heat in colour."})
    heatmap = fields.String(metadata={"description": "8-bit grey: 0 to 255 stand for 0 to 1."})
    note = fields.String()


class ExplainedSchema(ma.Schema):
    """What a result has where explanations were asked for."""

    explanation = fields.String(metadata={"description": "Where its Grad-CAM overlay is, once it is made."})
    heatmap = fields.String(metadata={"description": "Where the heatmap is: 8-bit grey, 0 to 255 stand for 0 to 1."})
    explanation_note = fields.String(metadata={"description": "What is to be known of it, or why there is none."})
    explanations = fields.Dict(
        keys=fields.String(),
        values=fields.Nested(PicturesSchema),
        metadata={"description": "With `explain: all`, those of each class."},
    )


def explanation_fields(session: Session, view: JobView, rows: Sequence[ScanResult]) -> dict[int, Json]:
    """The fields of ExplainedSchema that each of these results has, by its ordinal."""
    asked = view.job.params.get("explain")
    if not asked:
        return {}
    words = explanations.class_slugs(queries.classes(session, view)) if asked == ALL_CLASSES else {}
    here = explanations.find_files(session, view.job.id, [row.ordinal for row in rows], words)
    return {row.ordinal: _of_result(view, row, here.get(row.ordinal, {}), list(words)) for row in rows}


def _of_result(
    view: JobView, row: ScanResult, here: dict[str | None, ExplanationFiles], classes: Sequence[str]
) -> Json:
    if None not in here:
        return {"explanation_note": _why_not(view)} if view.terminal and row.state == ResultState.SUCCEEDED else {}
    found = _links(view, here[None])
    told = {"explanation": found["overlay"], "heatmap": found.get("heatmap"), "explanation_note": found.get("note")}
    if classes:
        own = {label: here[None if label == row.label else label] for label in classes}
        told["explanations"] = {label: _links(view, pictures) for label, pictures in own.items()}
    return {name: value for name, value in told.items() if value is not None}


def _why_not(view: JobView) -> str:
    return CANCELLED_NOTE if view.job.cancel_requested_at is not None else MISSING_NOTE


def _links(view: JobView, pictures: ExplanationFiles) -> Json:
    links = {"overlay": pictures.overlay, "heatmap": pictures.heatmap}
    told = {part: f"/jobs/{view.job.id}/artifacts/{name}" for part, name in links.items() if name is not None}
    return told | ({"note": BLANK_NOTE} if pictures.is_blank else {})
