"""Model versions: what trainings made, and which one is champion."""

from typing import Any

from api.auth import needs
from api.bodies import Blueprint
from api.schemas import ModelSchema, ModelsPage
from api.services import tenant, transaction
from api.waiting import one_page
from jobs import registry
from jobs.errors import ModelNotFound, NoChampion
from jobs.keys import Scope
from jobs.tables import ModelVersion

blueprint = Blueprint("models", __name__, url_prefix="/models", description="What trainings made.")


@blueprint.route("")
@needs(Scope.JOBS_READ)
@blueprint.response(200, ModelsPage)
@blueprint.doc(operationId="listModels")
def list_models() -> dict[str, Any]:
    """List model versions, newest first."""
    with transaction() as session:
        return one_page(registry.listed(session, tenant()))


@blueprint.route("/champion")
@needs(Scope.JOBS_READ)
@blueprint.response(200, ModelSchema)
@blueprint.doc(operationId="getChampion")
def get_champion() -> ModelVersion:
    """Show the version that predicts unless another is named."""
    try:
        with transaction() as session:
            return registry.resolve(session, tenant(), registry.CHAMPION)
    except NoChampion as error:
        raise ModelNotFound(str(error)) from None


@blueprint.route("/<int(max=2147483647):version>")
@needs(Scope.JOBS_READ)
@blueprint.response(200, ModelSchema)
@blueprint.doc(operationId="getModel")
def get_model(version: int) -> ModelVersion:
    """Show a model version."""
    with transaction() as session:
        return registry.resolve(session, tenant(), str(version))
