"""What MLflow's server asks at each request: whether it bears our login, and stays with the server's own artifacts.

It is MLflow's `authorization_function`, runs in its process, and imports nothing of ours. MLflow's own users are not
asked: the login of the stack is the only one, and its password changes with its file.
"""

import hmac
import os
from functools import cache
from typing import Any

from flask import Response, jsonify, request
from mlflow.exceptions import MlflowException
from mlflow.server.auth import make_basic_auth_response
from mlflow.server.constants import ARTIFACTS_DESTINATION_ENV_VAR
from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from renalq_first_page import first_page
from werkzeug.datastructures import Authorization

INDIRECT = {"mlflow-artifacts", "runs", "models"}
"""Schemes of addresses that lead to the server's own artifacts, or to another address."""
REFUSED = "This server keeps all artifacts in its own folder: leave out artifact_location."


def authenticate() -> Authorization | Response:
    """The request's login; or an answer: one that refuses it, or the first page."""
    login = request.authorization
    if login is None or not _is_ours(login):
        return make_basic_auth_response()
    _keep_to_own_artifacts()
    if request.path == "/":
        return first_page()
    if request.path.endswith("/mlflow/experiments/create") and _names_another_place():
        refusal = jsonify(error_code="INVALID_PARAMETER_VALUE", message=REFUSED)
        refusal.status_code = 400
        return refusal
    return login


def _is_ours(login: Authorization) -> bool:
    ours = os.environ["MLFLOW_AUTH_ADMIN_USERNAME"] + ":" + os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
    return hmac.compare_digest(ours.encode(), f"{login.username}:{login.password}".encode())


def _names_another_place() -> bool:
    """Whether the body has anything but a name and tags. MLflow reads it whatever its type is, and under two names."""
    body = request.get_json(force=True, silent=True)
    return not isinstance(body, dict) or any(value for name, value in body.items() if name not in ("name", "tags"))


@cache
def _keep_to_own_artifacts() -> None:
    """In this process every address that is not `INDIRECT` must be the server's own folder, wherever it comes from: an
    experiment of an older release, a tag of a trace, the source of a model."""
    repositories: dict[str, Any] = get_registered_artifact_repositories()
    for scheme in set(repositories) - INDIRECT:
        repositories[scheme] = OwnFolder


class OwnFolder(LocalArtifactRepository):
    """The folder that the server was started with.

    Raises:
        MlflowException: the address is another.
    """

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        if artifact_uri != os.environ[ARTIFACTS_DESTINATION_ENV_VAR]:
            raise MlflowException.invalid_parameter_value("This server serves no artifacts but its own.")
        super().__init__(artifact_uri, tracking_uri, registry_uri)
