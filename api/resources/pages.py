"""The console: a public page without data. Its script fetches everything with the reader's key."""

import re

from flask import Response, current_app, make_response, render_template, request
from marshmallow import Schema, fields

from api.http.auth import public
from api.http.bodies import Blueprint
from api.http.responses import HTML, JSON, TEXT
from api.http.versioning import address, is_versioned

blueprint = Blueprint("pages", __name__, description="The start page.")

ARGUMENT = re.compile(r"<(?:[^:<>]+:)?")
NOTICE = "Not for diagnosis."


class AboutSchema(Schema):
    """Name, version and endpoints of the API."""

    name = fields.String(required=True)
    version = fields.String(required=True)
    notice = fields.String(required=True)
    documentation = fields.String(required=True)
    openapi = fields.String(required=True)
    endpoints = fields.List(fields.String(), required=True)


@blueprint.route("/")
@public
@blueprint.response(200, AboutSchema)
@blueprint.alt_response(200, schema=TEXT, content_type=HTML, success=True)
@blueprint.alt_response(304, description="The client has this page.", success=True)
@blueprint.doc(operationId="firstPage", security=[])
def first_page() -> Response | tuple[dict[str, object], int, dict[str, str]]:
    """Show the start page; as JSON, name, version and endpoints of the API."""
    if request.accept_mimetypes.best_match([HTML, JSON]) == JSON:
        return _about(), 200, {"Vary": "Accept"}
    response = make_response(render_template("page.html", version=current_app.config["API_VERSION"]))
    response.headers["Cache-Control"] = "no-cache"
    response.vary.add("Accept")
    response.add_etag()
    response.make_conditional(request)
    return response


def _about() -> dict[str, object]:
    return {
        "name": current_app.config["API_TITLE"],
        "version": current_app.config["API_VERSION"],
        "notice": NOTICE,
        "documentation": address("/docs/"),
        "openapi": address("/openapi.json"),
        "endpoints": sorted(_endpoints()),
    }


def _endpoints() -> set[str]:
    """Method and path of each, as `GET /v1/jobs/{job_id}`."""
    return {
        f"{method} {address(ARGUMENT.sub('{', rule.rule).replace('>', '}'))}"
        for rule in current_app.url_map.iter_rules()
        if not (is_versioned() and rule.endpoint.startswith("older."))
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
