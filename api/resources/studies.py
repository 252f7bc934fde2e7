"""Studies: what all predictions have said of one."""

from typing import Any

from api.http.auth import needs
from api.http.bodies import Blueprint
from api.http.context import services, tenant, transaction
from api.http.paging import PageQuery
from api.resources.jobs.studies import StudiesPage
from jobs.keys import Scope
from jobs.paging import Page
from jobs.results import studies
from jobs.results.study_answers import StudyAnswer

blueprint = Blueprint("studies", __name__, url_prefix="/studies", description="Answers for whole studies.")


@blueprint.route("/<string:uid>")
@needs(Scope.JOBS_READ)
@blueprint.arguments(PageQuery, location="query")
@blueprint.response(200, StudiesPage)
@blueprint.doc(operationId="getStudy")
def get_study(query: dict[str, Any], uid: str) -> Page[StudyAnswer]:
    """List what ended predictions say of the study with this StudyInstanceUID, newest first."""
    with transaction() as session:
        return studies.of_uid(session, tenant(), uid, services().settings, **query)
