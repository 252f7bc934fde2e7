"""What an error code means: where the `type` of problem details leads (RFC 9457)."""

from flask import Response, abort, make_response, render_template
from marshmallow import fields

from api.http.auth import public
from api.http.bodies import Blueprint
from api.http.fields import Answer
from api.http.responses import HTML, TEXT, negotiate
from jobs.error_codes import ERROR_CODES, ErrorCode

blueprint = Blueprint("problems", __name__, url_prefix="/problems", description="What the error codes mean.")


class ProblemTypeSchema(Answer):
    """An error code."""

    code = fields.String()
    title = fields.String()
    remedy = fields.String(metadata={"description": "What to do."})
    status = fields.Integer(allow_none=True, metadata={"description": "HTTP status; null: only of jobs or scans."})
    of_job = fields.Boolean(metadata={"description": "Whether it may be a job's `error`."})
    of_scan = fields.Boolean(metadata={"description": "Whether it may be a result's `error`."})
    of_warning = fields.Boolean(metadata={"description": "Whether it may be in a job's `warnings`, and no error."})


@blueprint.route("/<code>")
@public
@blueprint.response(200, ProblemTypeSchema)
@blueprint.alt_response(200, schema=TEXT, content_type=HTML, success=True)
@blueprint.doc(operationId="getProblemType", security=[])
def get_problem_type(code: str) -> ErrorCode | Response:
    """Explain an error code; as text/html, a short page."""
    found = ERROR_CODES.get(code) or abort(404)
    if negotiate(HTML) != HTML:
        return found
    return make_response(render_template("problem.html", problem=found))
