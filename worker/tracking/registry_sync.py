"""MLflow's model registry follows RenalQ's: Postgres decides, MLflow shows.

A tenant's model there is `renalq-TENANT`. Each version whose run MLflow has becomes one of its versions, with a tag
that names ours; the alias `champion` is the champion, and `challenger` the newest version after it. A pass that dies in
between does no harm: the next one finds by the tag what was made, and rows are written only when all is done.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import func, select, union, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, defer

from jobs.db import Sessions
from jobs.models.cards import mlflow_model_name
from jobs.tables import Job, ModelVersion, Promotion, RegistryMirror
from ml.spec.pipeline import DEFAULT_TASK, IMAGE
from ml.spec.registry import spec_of
from worker.tracking.experiment import link_champion
from worker.tracking.runs import MISSING, answers

log = structlog.get_logger()

VERSION_TAG = "renalq.version"
CHAMPION, CHALLENGER = "champion", "challenger"
CHAMPION_TAG = "renalq.champion"
"""On the champion's run: a column of the runs that matter."""
LARGE_COLUMNS = ModelVersion.metrics, ModelVersion.params, ModelVersion.reference, ModelVersion.environment
"""Columns that are not needed here: MLflow has them with the run."""


@dataclass(frozen=True)
class TenantRows:
    """A tenant's versions, oldest first, and the latest change of its champion."""

    tenant_id: str
    versions: Sequence[ModelVersion]
    promotion_id: int
    names: Mapping[uuid.UUID, str]
    """Of the jobs that have one."""

    def aliases(self) -> Iterator[tuple[str, ModelVersion | None]]:
        """The aliases of each pipeline and task with their versions; those of the default ones are the plain words."""
        groups: dict[str, list[ModelVersion]] = {}
        for version in self.versions:
            groups.setdefault(_suffix(version), []).append(version)
        for suffix, versions in groups.items():
            champion = next((version for version in versions if version.champion), None)
            is_newer = champion is not None and versions[-1].version > champion.version
            yield CHAMPION + suffix, champion
            yield CHALLENGER + suffix, versions[-1] if is_newer else None


def _suffix(version: ModelVersion) -> str:
    """What the aliases of its pipeline and task end with."""
    group = version.pipeline, version.task
    return "" if group == (IMAGE, DEFAULT_TASK) else f"-{'-'.join(group)}"


def is_behind(session: Session) -> bool:
    """Whether a version or a change of the champion is missing in MLflow's registry, and its run is there."""
    return session.scalar(_tenants_behind().limit(1)) is not None


def sync_registry(client: Any, sessions: Sessions) -> None:
    """Bring MLflow's registry up to date.

    Tenants locked by another process are skipped. What MLflow refuses for one tenant or version, or cannot do, stays
    behind, and all others are synchronized.

    Raises:
        Exception: of MLflow's client, if it is away: nothing else would succeed either.
    """
    with sessions.begin() as session:
        tenants = session.scalars(_tenants_behind()).all()
    for tenant_id in tenants:
        with _tenant_lock(sessions, tenant_id) as locked:
            if locked:
                with _unless_away(client, tenant=tenant_id):
                    _sync_tenant(client, sessions, tenant_id)


@contextmanager
def _unless_away(client: Any, **what: Any) -> Iterator[None]:
    """Log an error of MLflow and continue, unless it is away."""
    from mlflow import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.get_http_status_code() >= 500 and not answers(client):
            raise
        log.warning("mlflow_registry_refused", **what, error=error.error_code)


def _tenants_behind() -> Any:
    """The tenants whose registry is behind. A champion whose run MLflow does not have yet waits for it."""
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
def _tenant_lock(sessions: Sessions, tenant_id: str) -> Iterator[bool]:
    """An advisory lock, so that no version is created twice. No transaction is open during calls to MLflow."""
    key = func.hashtext(f"mlflow_registry:{tenant_id}")
    with sessions.kw["bind"].connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not connection.scalar(select(func.pg_try_advisory_lock(key))):
            yield False
            return
        try:
            yield True
        finally:
            connection.execute(select(func.pg_advisory_unlock(key)))


def _sync_tenant(client: Any, sessions: Sessions, tenant_id: str) -> None:
    with sessions.begin() as session:
        rows = _read(session, tenant_id)
    name = mlflow_model_name(tenant_id)
    aliases = _aliases(client, name)
    numbers = _numbers(client, name, rows)
    for alias, version in rows.aliases():
        now, wanted = aliases.get(alias), numbers.get(version.id) if version else None
        _set_alias(client, name, alias, now, wanted)
        if alias.startswith(CHAMPION) and now != wanted:
            before = next((each for each in rows.versions if numbers.get(each.id, "") == now), None)
            _mark_champion(client, alias.replace(CHAMPION, tenant_id), before, version if wanted else None)
    _write(sessions, rows, numbers)
    log.info("mlflow_registry_synced", tenant=tenant_id, versions=len(numbers))


# --- rows ---


def _read(session: Session, tenant_id: str) -> TenantRows:
    latest = select(func.max(Promotion.id)).where(Promotion.tenant_id == tenant_id)
    mine = select(ModelVersion).where(ModelVersion.tenant_id == tenant_id).order_by(ModelVersion.version)
    mine = mine.options(*(defer(large, raiseload=True) for large in LARGE_COLUMNS))
    # The promotion is read first: one that comes in between is then found by the next pass.
    promotion_id = session.scalar(latest) or 0
    versions = session.scalars(mine).all()
    named = select(Job.id, Job.name).where(Job.id.in_([version.job_id for version in versions]), Job.name.is_not(None))
    names = {job_id: str(name) for job_id, name in session.execute(named)}
    return TenantRows(tenant_id, versions, promotion_id, names)


def _write(sessions: Sessions, rows: TenantRows, numbers: dict[uuid.UUID, str]) -> None:
    """Write only what is new, each version in its own transaction: a promotion locks two versions, and would deadlock
    with a transaction that holds several."""
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
    """The aliases of the registered model, which is created if it does not exist."""
    from mlflow import MlflowException

    try:
        return {alias: str(number) for alias, number in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
    client.create_registered_model(name, description="Follows RenalQ, which decides. Change it there.")
    return {}


def _numbers(client: Any, name: str, rows: TenantRows) -> dict[uuid.UUID, str]:
    """MLflow's number of each version whose run it has; missing ones are created. One that fails is left out."""
    found = client.search_model_versions(f"name='{name}'")
    known = {each.tags.get(VERSION_TAG): str(each.version) for each in found}
    numbers: dict[uuid.UUID, str] = {}
    for each in (version for version in rows.versions if version.mlflow_run_id):
        with _unless_away(client, tenant=each.tenant_id, version=each.version):
            numbers[each.id] = known.get(str(each.version)) or _create(client, name, each, rows.names)
    return numbers


def _create(client: Any, name: str, version: ModelVersion, names: Mapping[uuid.UUID, str]) -> str:
    run_id, source = _source(client, version)
    if run_id is not None:
        client.update_run(run_id, name=f"{names.get(version.job_id, version.pipeline)} v{version.version}")
    tags = {
        VERSION_TAG: str(version.version),
        "renalq.job_id": str(version.job_id),
        "renalq.pipeline": version.pipeline,
        "renalq.task": version.task,
        "renalq.weights_sha256": version.weights_sha256,
        "renalq.dataset_digest": version.dataset_digest or "unknown",
        "renalq.gate": "promoted" if version.gate.get("promoted") else "not promoted",
    }
    reasons = "\n".join(version.gate.get("reasons", ()))
    made = client.create_model_version(name, source, run_id, tags=tags, description=reasons, await_creation_for=0)
    return str(made.version)


def _source(client: Any, version: ModelVersion) -> tuple[str | None, str]:
    """The run, unless it was deleted, and the URI of its weights; RenalQ's URI if MLflow does not have them."""
    from mlflow import MlflowException

    ours = f"renalq://models/{version.version}/weights"
    try:
        run = client.get_run(version.mlflow_run_id)
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
        return None, ours
    weights = spec_of(version.pipeline).model_file
    logged = any(file.path == weights for file in client.list_artifacts(version.mlflow_run_id))
    return version.mlflow_run_id, f"{run.info.artifact_uri}/{weights}" if logged else ours


def _mark_champion(client: Any, group: str, before: ModelVersion | None, champion: ModelVersion | None) -> None:
    """Tag the champion's run, no more that of the one before, and link it on the experiment's page."""
    for version, tag in ((before, ""), (champion, CHAMPION)):
        if version is not None:
            with _unless_away(client, tenant=version.tenant_id, version=version.version):
                client.set_tag(version.mlflow_run_id, CHAMPION_TAG, tag)
    link_champion(client, group, (champion.version, str(champion.mlflow_run_id)) if champion else None)


def _set_alias(client: Any, name: str, alias: str, now: str | None, wanted: str | None) -> None:
    if wanted is None and now is not None:
        client.delete_registered_model_alias(name, alias)
    elif wanted is not None and now != wanted:
        client.set_registered_model_alias(name, alias, wanted)
