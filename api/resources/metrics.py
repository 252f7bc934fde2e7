"""`GET /metrics`: the asking tenant's figures for Prometheus, read from the rows whenever it asks.

They need a key, as everything here does: Prometheus sends one by `authorization: {credentials_file: …}`. All processes
of the API answer alike, since none of them counts anything itself.
"""

from flask import Response, request

from api.http.auth import needs
from api.http.bodies import Blueprint
from jobs.keys import Scope

TEXT, OPENMETRICS = "text/plain", "application/openmetrics-text"

blueprint = Blueprint("metrics", __name__, description="For Prometheus.")


@blueprint.route("/metrics")
@needs(Scope.JOBS_READ)
@blueprint.response(200, {"type": "string"}, content_type=TEXT)
@blueprint.alt_response(200, schema={"type": "string"}, content_type=OPENMETRICS, success=True)
@blueprint.doc(operationId="getPrometheusMetrics")
def get_metrics() -> Response:
    """Show the champion's drift, its truths, and what is in the queue, in Prometheus' format."""
    from api.resources.gauges import exposition

    content, kind = exposition(request.headers.get("Accept", ""))
    return Response(content, content_type=kind)
