"""The Flask application: blueprints, URL converters, error handlers, services."""

import sys
import uuid
from functools import partial
from importlib.metadata import version
from urllib.parse import urlsplit

from flask import Flask, Response
from marshmallow import fields
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import BaseConverter

from api.http import auth, problems, request_log, responses, versioning
from api.http.body.spool import MAX_PARTS, SPOOL_FOLDER, UploadRequest
from api.http.change_listener import ChangeListener
from api.http.context import EXTENSION, Services
from api.http.fields import VERSION, parse_uuid
from api.http.traffic import rates, request_counts
from api.http.traffic.rates import Rates
from api.http.traffic.request_counts import RequestCounts
from api.resources import (
    datasets,
    deletions,
    docs,
    feedback,
    health,
    keys,
    legacy,
    pages,
    problem_types,
    scans,
    studies,
    uploads,
    usage,
    webhooks,
)
from api.resources.jobs import routes as jobs
from api.resources.metrics import routes as metrics
from api.resources.models import drift
from api.resources.models import routes as models
from jobs.db import session_factory
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore

BLUEPRINTS = (
    jobs, studies, feedback, datasets, scans, uploads, models, drift, deletions, keys, usage, webhooks, health, metrics,
    problem_types, legacy, pages,
)  # fmt: skip
UNKNOWN_ID = uuid.UUID(int=0)


class Renalq(Flask):
    """Flask with `UploadRequest`."""

    request_class = UploadRequest


class IdConverter(BaseConverter):
    """An id in a path. An ill-formed one becomes an id that nothing has: the same 404 as for an unknown one."""

    regex = r"(?!train\Z|predict\Z|known\Z)[^/]+"  # names of POST routes, where another method must be a 405

    def to_python(self, value: str) -> uuid.UUID:
        return parse_uuid(value) or UNKNOWN_ID


class VersionConverter(BaseConverter):
    """`champion` or a version number in a path. Anything else becomes 0, which no version has."""

    regex = r"(?!compare\Z|promotions\Z|rollback\Z)[^/]+"

    def to_python(self, value: str) -> str:
        return value if VERSION.fullmatch(value) else "0"


def build(settings: Settings) -> Flask:
    """The application with these settings."""
    # A request waits so long for the interpreter's lock, once for each other thread that computes (Python: 5 ms).
    sys.setswitchinterval(0.001)
    app = Renalq("api")
    app.config.update(
        MAX_CONTENT_LENGTH=settings.max_upload_bytes,
        MAX_FORM_PARTS=MAX_PARTS,
        SPOOL_FOLDER=settings.home / SPOOL_FOLDER,
        OPENAPI_URL_PREFIX="/",
        API_TITLE="RenalQ",
        API_VERSION=version("renalq"),
        OPENAPI_VERSION="3.1.0",
        PROPAGATE_EXCEPTIONS=False,
    )
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.converters["id"] = IdConverter
    app.url_map.converters["version"] = VersionConverter
    app.extensions[EXTENSION] = _services(settings)
    request_log.register(app)
    request_counts.register(app, lambda: app.extensions[EXTENSION].requests)
    auth.register(app)
    rates.register(app)
    problems.register(app)
    app.after_request(_drop_content_type)
    app.after_request(_without_host)
    app.after_request(responses.protect_document)
    versioning.register(app)
    _register_blueprints(app)
    if settings.proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=settings.proxies, x_proto=0, x_host=0)  # type: ignore[method-assign]
    return app


def _drop_content_type(response: Response) -> Response:
    """Without a body there is no `Content-Type`."""
    if response.status_code in (204, 304):
        response.headers.pop("Content-Type", None)
    return response


def _without_host(response: Response) -> Response:
    """A redirect to a path: werkzeug makes it of the header `Host`, in which a client may write anything."""
    if response.location:
        parts = urlsplit(response.location)
        # One slash: two would begin another host's address.
        response.location = parts._replace(scheme="", netloc="", path="/" + parts.path.lstrip("/")).geturl()
        if 300 <= response.status_code < 400:
            response.set_data(b"")  # it repeats the address
    return response


def _services(settings: Settings) -> Services:
    sessions = session_factory(settings.database_url, settings.db_pool, "renalq-api")
    listener = ChangeListener(sessions.kw["bind"], settings.wait_slots)
    blobs = BlobStore(settings.artifacts)
    return Services(settings, sessions, blobs, listener, Rates(settings), RequestCounts(sessions))


def _register_blueprints(app: Flask) -> None:
    api = problems.ProblemApi(app, spec_kwargs={"info": {"description": DESCRIPTION}, "servers": SERVERS})
    api.register_converter(IdConverter, lambda converter: {"type": "string", "format": "uuid"})
    api.register_converter(VersionConverter, lambda converter: {"type": "string", "pattern": VERSION.pattern})
    api.ma_plugin.converter.add_parameter_attribute_function(_deep_object)
    api.spec.components.security_scheme("key", {"type": "http", "scheme": "bearer", "description": KEY})
    api.spec.options["security"] = [{"key": []}]
    for module in BLUEPRINTS:
        api.register_blueprint(module.blueprint)
    app.register_blueprint(docs.blueprint)
    for endpoint in ("api-docs.openapi_json", "static"):
        app.view_functions[endpoint] = auth.public(partial(app.view_functions[endpoint]))


def _deep_object(self: object, field: fields.Field, **kwargs: object) -> dict[str, object]:
    return {"style": "deepObject", "explode": True} if isinstance(field, fields.Dict) else {}


KEY = "An API key: rq_…. HTTP Basic is accepted too, with the key as its password."
SERVERS = [
    {"url": versioning.PREFIX},
    {"url": "/", "description": "Aliases: the paths of the time before versions. Answers link to what was asked."},
]
DESCRIPTION = "Train, track and use a kidney-CT classifier. Not for diagnosis. Errors are RFC 9457 problem details."
