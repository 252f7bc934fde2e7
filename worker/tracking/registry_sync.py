"""MLflow's registry follows ours: Postgres decides, MLflow shows.

A tenant's model there is `renalq-TENANT`. Each version whose run MLflow has becomes one of its versions, with a tag
that names ours; the alias `champion` is the champion, and `challenger` the newest version after it. A pass that dies in
between does no harm: the next one finds by the tag what was made, and rows are written only when all is done.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import func, select, union, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, defer

from jobs.db import Sessions
from jobs.models.cards import mlflow_model_name
from jobs.tables import ModelVersion, Promotion, RegistryMirror
from worker.tracking.runs import WEIGHTS

log = structlog.get_logger()

VERSION_TAG = "renalq.version"
CHAMPION, CHALLENGER = "champion", "challenger"
MISSING = "RESOURCE_DOES_NOT_EXIST"
NOT_MIRRORED = ModelVersion.metrics, ModelVersion.params, ModelVersion.reference, ModelVersion.environment
"""The large columns, which MLflow has with the run."""


@dataclass(frozen=True)
class Rows:
    """A tenant's versions, oldest first, and the latest change of its champion."""

    tenant_id: str
    versions: Sequence[ModelVersion]
    promotion_id: int

    @property
    def champion(self) -> ModelVersion | None:
        """The champion."""
        return next((version for version in self.versions if version.champion), None)

    @property
    def challenger(self) -> ModelVersion | None:
        """The newest version, where it is after the champion."""
        champion = self.champion
        return self.versions[-1] if champion and self.versions[-1].version > champion.version else None


def is_behind(session: Session) -> bool:
    """Whether a version, or a change of the champion, is not in MLflow's registry, and could be."""
    return session.scalar(_behind().limit(1)) is not None


def mirror(client: Any, sessions: Sessions) -> None:
    """Bring MLflow's registry up to date; another's turn is left to the other. What MLflow refuses of one tenant holds
    up no other. Raises what MLflow raises where it is away: there is no use in asking on."""
    from mlflow import MlflowException

    with sessions.begin() as session:
        tenants = session.scalars(_behind()).all()
    for tenant_id in tenants:
        with _alone(sessions, tenant_id) as alone:
            if alone:
                try:
                    _mirror(client, sessions, tenant_id)
                except MlflowException as error:
                    if error.get_http_status_code() >= 500:
                        raise
                    log.warning("mlflow_registry_refused", tenant=tenant_id, error=error.error_code)


def _behind() -> Any:
    """The tenants that are. A champion whose run MLflow has not got yet waits for that."""
    has_run = ModelVersion.mlflow_run_id.is_not(None)
    missing = select(ModelVersion.tenant_id).where(has_run, ModelVersion.mlflow_version.is_(None))
    ahead = (
        select(Promotion.tenant_id)
        .join(ModelVersion, ModelVersion.id == Promotion.model_id)
        .outerjoin(RegistryMirror, RegistryMirror.tenant_id == Promotion.tenant_id)
        .where(has_run, Promotion.id > func.coalesce(RegistryMirror.promotion_id, 0))
    )
    return select(union(missing, ahead).subquery().c.tenant_id)


@contextmanager
def _alone(sessions: Sessions, tenant_id: str) -> Iterator[bool]:
    """One at a time for each tenant, or a version would be made twice. No transaction is open while MLflow is asked."""
    key = func.hashtext(f"mlflow_registry:{tenant_id}")
    with sessions.kw["bind"].connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not connection.scalar(select(func.pg_try_advisory_lock(key))):
            yield False
            return
        try:
            yield True
        finally:
            connection.execute(select(func.pg_advisory_unlock(key)))


def _mirror(client: Any, sessions: Sessions, tenant_id: str) -> None:
    with sessions.begin() as session:
        rows = _read(session, tenant_id)
    name = mlflow_model_name(tenant_id)
    aliases = _aliases(client, name)
    numbers = _numbers(client, name, rows.versions)
    for alias, version in ((CHAMPION, rows.champion), (CHALLENGER, rows.challenger)):
        _set_alias(client, name, alias, aliases.get(alias), numbers.get(version.id) if version else None)
    _write(sessions, rows, numbers)
    log.info("mlflow_registry_mirrored", tenant=tenant_id, versions=len(numbers))


# --- rows ---


def _read(session: Session, tenant_id: str) -> Rows:
    latest = select(func.max(Promotion.id)).where(Promotion.tenant_id == tenant_id)
    mine = select(ModelVersion).where(ModelVersion.tenant_id == tenant_id).order_by(ModelVersion.version)
    mine = mine.options(*(defer(large, raiseload=True) for large in NOT_MIRRORED))
    # The promotion first: one that comes in between is then still to be followed.
    promotion_id = session.scalar(latest) or 0
    return Rows(tenant_id, session.scalars(mine).all(), promotion_id)


def _write(sessions: Sessions, rows: Rows, numbers: dict[uuid.UUID, str]) -> None:
    """What is new alone, and each version in a transaction of its own: a promotion locks the rows of two versions, and
    one that met us holding several would be a deadlock."""
    for version in rows.versions:
        number = numbers.get(version.id)
        if number is not None and number != version.mlflow_version:
            with sessions.begin() as session:
                mine = update(ModelVersion).where(ModelVersion.id == version.id)
                session.execute(mine.values(mlflow_version=number))
    here = {"promotion_id": rows.promotion_id}
    row = insert(RegistryMirror).values(tenant_id=rows.tenant_id, **here)
    with sessions.begin() as session:
        session.execute(row.on_conflict_do_update(index_elements=["tenant_id"], set_=here))


# --- MLflow ---


def _aliases(client: Any, name: str) -> dict[str, str]:
    """The registered model's aliases; it is made where it is not there."""
    from mlflow import MlflowException

    try:
        return dict(client.get_registered_model(name).aliases)
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
    client.create_registered_model(name, description="Follows RenalQ, which decides. Change it there.")
    return {}


def _numbers(client: Any, name: str, versions: Sequence[ModelVersion]) -> dict[uuid.UUID, str]:
    """MLflow's number of each version whose run it has; what is missing is made."""
    found = client.search_model_versions(f"name='{name}'")
    known = {each.tags.get(VERSION_TAG): str(each.version) for each in found}
    with_run = [version for version in versions if version.mlflow_run_id]
    return {each.id: known.get(str(each.version)) or _create(client, name, each) for each in with_run}


def _create(client: Any, name: str, version: ModelVersion) -> str:
    run_id, source = _source(client, version)
    tags = {
        VERSION_TAG: str(version.version),
        "renalq.job_id": str(version.job_id),
        "renalq.weights_sha256": version.weights_sha256,
        "renalq.dataset_digest": version.dataset_digest or "unknown",
        "renalq.gate": "promoted" if version.gate.get("promoted") else "not promoted",
    }
    reasons = "\n".join(version.gate.get("reasons", ()))
    made = client.create_model_version(name, source, run_id, tags=tags, description=reasons, await_creation_for=0)
    return str(made.version)


def _source(client: Any, version: ModelVersion) -> tuple[str | None, str]:
    """The run, where nobody has deleted it, and its weights; where MLflow was not given these, what they are called
    here."""
    from mlflow import MlflowException

    ours = f"renalq://models/{version.version}/weights"
    try:
        run = client.get_run(version.mlflow_run_id)
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
        return None, ours
    logged = any(file.path == WEIGHTS for file in client.list_artifacts(version.mlflow_run_id))
    return version.mlflow_run_id, f"{run.info.artifact_uri}/{WEIGHTS}" if logged else ours


def _set_alias(client: Any, name: str, alias: str, now: str | None, wanted: str | None) -> None:
    if wanted is None and now is not None:
        client.delete_registered_model_alias(name, alias)
    elif wanted is not None and str(now) != wanted:
        client.set_registered_model_alias(name, alias, wanted)
