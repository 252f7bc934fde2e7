"""Explanations: the field that requests them, and the links to a result's files."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import marshmallow as ma
from marshmallow import fields
from sqlalchemy.orm import Session

from jobs.queue import explanations, kept
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
    """A boolean, in JSON or as a string, or `all`. Not a `fields.Boolean`, since those must be JSON in a form."""

    def __init__(self, **kwargs: Any) -> None:
        description = "Also make an overlay and heatmap of each result: for the predicted class, or for `all` classes."
        kinds = {"type": ["string", "boolean"], "enum": [ALL_CLASSES, True, False]}
        super().__init__(metadata={**kinds, "description": description}, **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        try:
            return ALL_CLASSES if value == ALL_CLASSES else fields.Boolean().deserialize(value)
        except ma.ValidationError:
            raise ma.ValidationError(f"Must be true, false or `{ALL_CLASSES}`.") from None


class PicturesSchema(ma.Schema):
    """Images of one class. Both have the size of the scan."""

    overlay = fields.String(metadata={"description": "The scan in grey with the heatmap in colour."})
    heatmap = fields.String(metadata={"description": "8-bit greyscale: 0 to 255 stand for 0 to 1."})
    note = fields.String()


class ExplainedSchema(ma.Schema):
    """Fields of a result whose explanation was requested."""

    explanation = fields.String(metadata={"description": "URL of its overlay, once it is made."})
    heatmap = fields.String(metadata={"description": "URL of the heatmap: 8-bit greyscale, 0 to 255 stand for 0 to 1."})
    explanation_note = fields.String(
        metadata={"description": "A remark on the explanation, or the reason why there is none."}
    )
    explanations = fields.Dict(
        keys=fields.String(),
        values=fields.Nested(PicturesSchema),
        metadata={"description": "With `explain: all`, the files of each class."},
    )


def explanation_fields(session: Session, view: JobView, rows: Sequence[ScanResult], job_url: str) -> dict[int, Json]:
    """The fields of ExplainedSchema of these results, by ordinal. The files' addresses begin with the job's.

    Raises:
        ResultsExpired
    """
    requested = view.job.params.get("explain")
    if not requested:
        return {}
    words = explanations.class_slugs(queries.classes(session, view)) if requested == ALL_CLASSES else {}
    files = explanations.find_files(session, view.job.id, [row.ordinal for row in rows], words)
    if view.terminal:
        kept.require_kept(session, view.job.id)  # some files may have been deleted since the results were read
    links = partial(_links, job_url)
    return {row.ordinal: _of_result(view, row, files.get(row.ordinal, {}), list(words), links) for row in rows}


def _of_result(
    view: JobView,
    row: ScanResult,
    files: dict[str | None, ExplanationFiles],
    classes: Sequence[str],
    links: Callable[[ExplanationFiles], Json],
) -> Json:
    if None not in files:
        return {"explanation_note": _missing_note(view)} if view.terminal and row.state == ResultState.SUCCEEDED else {}
    found = links(files[None])
    fields_ = {"explanation": found["overlay"], "heatmap": found.get("heatmap"), "explanation_note": found.get("note")}
    if classes:
        own = {label: files[None if label == row.label else label] for label in classes}
        fields_["explanations"] = {label: links(pictures) for label, pictures in own.items()}
    return {name: value for name, value in fields_.items() if value is not None}


def _missing_note(view: JobView) -> str:
    return CANCELLED_NOTE if view.job.cancel_requested_at is not None else MISSING_NOTE


def _links(job_url: str, pictures: ExplanationFiles) -> Json:
    parts = {"overlay": pictures.overlay, "heatmap": pictures.heatmap}
    urls = {part: f"{job_url}/artifacts/{name}" for part, name in parts.items() if name is not None}
    return urls | ({"note": BLANK_NOTE} if pictures.is_blank else {})
