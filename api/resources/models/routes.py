"""Model versions: list, compare, promote, roll back, delete; weights and model cards."""

from typing import Any
from uuid import UUID

from flask import Response, jsonify
from sqlalchemy.orm import Session

from api.http.auth import needs
from api.http.bodies import Blueprint, accepts_body
from api.http.context import principal, services, tenant, transaction
from api.http.idempotency import attach_resource, idempotent
from api.http.paging import NumberedQuery
from api.http.responses import BINARY, BYTES, JSON, MARKDOWN, TEXT, download, negotiate
from api.resources.deletions import Accepted, DeletionSchema, accepted
from api.resources.models.schemas import (
    ChampionQuery,
    CompareQuery,
    ComparisonSchema,
    ModelSchema,
    ModelsPage,
    ModelsQuery,
    PatchRequest,
    PromoteRequest,
    PromotionsPage,
    RollbackRequest,
)
from api.views import model_card, model_card_markdown
from jobs.errors import ModelNotFound, NoChampion
from jobs.keys import Scope
from jobs.models import cards, comparison, operating_points, promotion, registry
from jobs.models.comparison import Comparison
from jobs.models.deletion import delete_version
from jobs.models.gate import GatePolicy
from jobs.paging import Page
from jobs.tables import ModelVersion, Promotion

blueprint = Blueprint(
    "models", __name__, url_prefix="/models", description="Model versions, the champion, model cards."
)


@blueprint.route("")
@needs(Scope.JOBS_READ)
@blueprint.arguments(ModelsQuery, location="query")
@blueprint.response(200, ModelsPage)
@blueprint.doc(operationId="listModels")
def list_models(query: dict[str, Any]) -> Page[ModelVersion]:
    """List model versions, newest first."""
    with transaction() as session:
        return cards.list_versions(session, tenant(), **query)


@blueprint.route("/compare")
@needs(Scope.JOBS_READ)
@blueprint.arguments(CompareQuery, location="query")
@blueprint.response(200, ComparisonSchema)
@blueprint.doc(operationId="compareModels")
def compare_models(query: dict[str, Any]) -> Comparison:
    """Compare two versions on common test scans, and by data and parameters."""
    with transaction() as session:
        return comparison.compare(session, tenant(), **query)


@blueprint.route("/promotions")
@needs(Scope.JOBS_READ)
@blueprint.arguments(NumberedQuery, location="query")
@blueprint.response(200, PromotionsPage)
@blueprint.doc(operationId="listPromotions")
def list_promotions(query: dict[str, Any]) -> Page[Promotion]:
    """List promotions of champions, newest first."""
    with transaction() as session:
        return promotion.promotions(session, tenant(), **query)


def _promoted_before(model_id: UUID) -> ModelVersion:
    """The version that an earlier try of the same request has promoted."""
    with transaction() as session:
        return registry.by_id(session, model_id)


@blueprint.route("/rollback", methods=["POST"])
@needs(Scope.MODELS_WRITE)
@accepts_body(json=RollbackRequest)
@blueprint.response(200, ModelSchema)
@blueprint.doc(operationId="rollback")
@idempotent(_promoted_before)
def rollback(body: dict[str, Any]) -> ModelVersion:
    """Restore the previous champion. New predictions use it at once."""
    with transaction() as session:
        found = promotion.rollback(session, tenant(), **body, key_id=principal().key_id)
        attach_resource(session, found.id)
        return found


@blueprint.route("/<version:version>")
@needs(Scope.JOBS_READ)
@blueprint.arguments(ChampionQuery, location="query")
@blueprint.response(200, ModelSchema)
@blueprint.doc(operationId="getModel")
def get_model(query: dict[str, Any], version: str) -> ModelVersion:
    """Show a model version; `champion` is the default of predictions."""
    with transaction() as session:
        return find_version(session, version, **query)


@blueprint.route("/<version:version>", methods=["PATCH"])
@needs(Scope.MODELS_WRITE)
@accepts_body(json=PatchRequest)
@blueprint.response(200, ModelSchema)
@blueprint.doc(operationId="patchModel")
def patch_model(body: dict[str, Any], version: str) -> ModelVersion:
    """Set a version's operating point anew, without a training. Jobs that were submitted before keep theirs."""
    with transaction() as session:
        find_version(session, version)
        return operating_points.set_point(session, tenant(), version, **body, key_id=principal().key_id)


@blueprint.route("/<version:version>", methods=["DELETE"])
@needs(Scope.MODELS_WRITE)
@blueprint.response(202, DeletionSchema)
@blueprint.doc(operationId="deleteModel")
def delete_model(version: str) -> Accepted:
    """Delete a version that is not champion and that no unfinished job uses, and the training that made it."""
    with transaction() as session:
        wanted = str(find_version(session, version).version) if version == registry.CHAMPION else version
    return accepted(delete_version, wanted)


@blueprint.route("/<version:version>/promote", methods=["POST"])
@needs(Scope.MODELS_WRITE)
@accepts_body(json=PromoteRequest)
@blueprint.response(200, ModelSchema)
@blueprint.doc(operationId="promoteModel")
@idempotent(_promoted_before)
def promote_model(body: dict[str, Any], version: str) -> ModelVersion:
    """Make a version the champion, with the gate's consent or by force. New predictions use it at once."""
    policy = GatePolicy.of(services().settings)
    with transaction() as session:
        found = promotion.promote(session, tenant(), version, policy, **body, key_id=principal().key_id)
        attach_resource(session, found.id)
        return found


@blueprint.route("/<version:version>/weights")
@needs(Scope.JOBS_READ)
@blueprint.response(200, BINARY, content_type=BYTES)
@blueprint.alt_response(304, description="The client has these bytes.", success=True)
@blueprint.doc(operationId="getWeights")
def get_weights(version: str) -> Response:
    """Download a version's network: a safetensors file with classes, transform and calibration."""
    with transaction() as session:
        found = find_version(session, version)
    return download(found.weights_sha256, f"renalq-v{found.version}.safetensors")


@blueprint.route("/<version:version>/card")
@needs(Scope.JOBS_READ)
@blueprint.response(200, TEXT, content_type=MARKDOWN)
@blueprint.alt_response(200, schema={"type": "object"}, content_type=JSON, success=True)
@blueprint.doc(operationId="getCard")
def get_card(version: str) -> Response:
    """Show a version's model card: its data, intended use, evaluation and limits."""
    with transaction() as session:
        card = model_card.build_card(cards.model_card_data(session, find_version(session, version)))
    if negotiate(JSON, default=MARKDOWN) == JSON:
        return jsonify(card)
    return Response(model_card_markdown.markdown(card), mimetype=MARKDOWN)


def find_version(session: Session, wanted: str, pipeline: str | None = None, task: str | None = None) -> ModelVersion:
    """The version, or the champion. A missing champion is 404 here, not a conflict."""
    try:
        return registry.resolve(session, tenant(), wanted, pipeline, task)
    except NoChampion as error:
        raise ModelNotFound(str(error)) from None
