"""Drift of a version's predictions from its test scans, as JSON or as a chart."""

from typing import Any

import marshmallow as ma
from flask import Response
from marshmallow import fields, validate

from api.http.auth import needs
from api.http.bodies import Blueprint
from api.http.context import services, transaction
from api.http.responses import BINARY, PNG, negotiate
from api.resources.models.routes import find_version
from api.views import drift_chart
from jobs.keys import Scope
from jobs.models import drift
from jobs.models.drift import Day, DriftReport

blueprint = Blueprint(
    "drift", __name__, url_prefix="/models", description="Drift of predictions against the test scans."
)


class DriftQuery(ma.Schema):
    """Number of days up to today."""

    days = fields.Integer(load_default=30, validate=validate.Range(1, 365))


class JudgedSchema(ma.Schema):
    """Predictions with feedback, without rejected scans. A share without scans is null."""

    known = fields.Integer()
    right = fields.Integer()
    accuracy = fields.Float(allow_none=True)
    sensitivity = fields.Float(allow_none=True)
    specificity = fields.Float(allow_none=True)


def _figures(name: str, description: str) -> fields.Function:
    """A field with one attribute of each figure of a day."""

    def read(day: Day) -> dict[str, float]:
        return {figure: round(getattr(found, name), 4) for figure, found in day.figures.items()}

    numbers = {"type": "object", "additionalProperties": {"type": "number"}}
    return fields.Function(read, metadata={**numbers, "description": description})


class DaySchema(ma.Schema):
    """One day (UTC) with predictions or feedback. Results copied from earlier ones count in feedback only."""

    day = fields.Date()
    scans = fields.Integer()
    classes = fields.Dict(keys=fields.String(), values=fields.Integer())
    dispositions = fields.Dict(keys=fields.String(), values=fields.Integer())
    rejected_share = fields.Float(allow_none=True)
    since = fields.Date(
        allow_none=True,
        metadata={
            "description": "First day of the scans that the verdict is based on: if a day has few, earlier days are "
            "added. Null: too few studies, or no reference."
        },
    )
    studies = fields.Float(
        allow_none=True,
        metadata={
            "description": "Number of studies that the verdict counts, or that there are so far: scans of one study "
            "have one vote together. Null: no reference."
        },
    )
    psi = _figures("psi", "Population stability index of each figure against the test scans.")
    limits = _figures("limit", "Index above which each figure has drifted: the bound, and what chance may add.")
    drifted = fields.List(fields.String(), metadata={"description": "Figures above their limits."})
    truths = fields.Nested(JudgedSchema)


class DriftSchema(ma.Schema):
    """Drift of a version; days oldest first."""

    version = fields.String(attribute="model.version")
    reference_scans = fields.Integer(
        allow_none=True,
        metadata={"description": "Number of test scans; null: the version has no reference to compare with."},
    )
    reference_studies = fields.Float(
        allow_none=True, metadata={"description": "As how many independent studies these test scans count."}
    )
    bound = fields.Float()
    drifted = fields.Boolean(metadata={"description": "Whether a figure of the latest day has drifted."})
    latest = fields.Date(
        attribute="latest.day",
        dump_default=None,
        allow_none=True,
        metadata={"description": "The latest day with predictions."},
    )
    truths = fields.Nested(JudgedSchema, metadata={"description": "Over all these days."})
    days = fields.List(fields.Nested(DaySchema))


@blueprint.route("/<version:version>/drift")
@needs(Scope.JOBS_READ)
@blueprint.arguments(DriftQuery, location="query")
@blueprint.response(200, DriftSchema)
@blueprint.alt_response(200, schema=BINARY, content_type=PNG, success=True)
@blueprint.doc(operationId="getDrift")
def get_drift(query: dict[str, Any], version: str) -> DriftReport | Response:
    """Compare a version's predictions with its test scans, day by day; as image/png, a chart of it."""
    with transaction() as session:
        policy = drift.DriftPolicy.of(services().settings)
        found = drift.drift(session, find_version(session, version), policy, query["days"])
    if negotiate(PNG) != PNG:
        return found
    return Response(drift_chart.draw_drift(found, query["days"]), mimetype=PNG)
