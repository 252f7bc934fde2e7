"""Swagger UI at `/docs`, with the policy of the first page. Its files are those of the package flask-swagger-ui.

That package's own page has a script inline, and an address made from the header `Host`; ours has neither.
"""

from importlib.resources import files

from flask import Blueprint, Response, abort, render_template, send_from_directory

from api.http.auth import public

FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "index.css", "favicon-32x32.png")
"""What the page needs of Swagger UI."""

blueprint = Blueprint("docs", __name__, url_prefix="/docs")


@blueprint.route("/")
@public
def page() -> str:
    """Show all operations, and try them."""
    return render_template("docs.html")


@blueprint.route("/<name>")
@public
def file(name: str) -> Response:
    """A file of Swagger UI."""
    if name not in FILES:
        abort(404)
    return send_from_directory(str(files("flask_swagger_ui") / "dist"), name)
