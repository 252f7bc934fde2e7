"""The schema's history runs up and down, and ends where `jobs/tables` stands."""

from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Connection, inspect, select, text

from jobs.db import Base, Sessions
from jobs.models import promotion
from jobs.queue import lifecycle
from jobs.settings import Settings
from jobs.tables import Job, ModelEvaluation, ModelVersion, Promotion
from tests import builders
from tests.databases import alembic_config
from tests.faults.sabotage import Sabotage
from tests.faults.work import batch, champion, training, wrong
from tests.processes import stack

OWNED_BY_NOBODY = {"processes", "released_blobs", "released_runs", "request_counts"}


def test_models_and_migrations_agree(sessions: Sessions) -> None:
    with sessions.kw["bind"].connect() as connection:
        command.check(alembic_config(connection))


def test_downgrading_leaves_nothing_and_upgrading_restores_all(sessions: Sessions) -> None:
    with sessions.kw["bind"].connect() as connection:
        before = _objects(connection)
        command.downgrade(alembic_config(connection), "base")
        assert _objects(connection) == {"alembic_version"}
        command.upgrade(alembic_config(connection), "head")
        assert _objects(connection) == before


MODELS_OF_0005 = """
WITH old (number, tenant, version, champion, promoted, metrics) AS (VALUES
    (1, 'a', 1, false, 10, '{"f1": 0.9, "test_digest": "one", "held_out": 93}'::jsonb),
    (2, 'a', 2, false, NULL, '{"f1": 0.7, "test_digest": "one", "held_out": 93}'),
    (3, 'a', 3, true, 30, '{"f1": 0.95}'),
    (4, 'b', 1, true, 20, '{"f1": 0.9, "test_digest": "two", "held_out": 12}')
), job AS (
    INSERT INTO jobs (id, tenant_id, kind, lane, state, params, metadata)
        SELECT ('00000000-0000-0000-0000-00000000000' || number)::uuid, tenant, 'train', 'train', 'queued', '{}', '{}'
        FROM old RETURNING id
)
INSERT INTO model_versions (id, tenant_id, version, champion, job_id, weights_sha256, classes, params, metrics, gate,
        environment, promoted_at)
    SELECT job.id, tenant, version, champion, job.id, 'w', '[]', '{}', metrics, '{"promoted": true}', '{}',
        to_timestamp(promoted)
    FROM old JOIN job ON right(job.id::text, 1) = number::text
"""


def test_the_champions_so_far_are_the_beginning_of_the_history(sessions: Sessions) -> None:
    with sessions.kw["bind"].connect() as connection:
        command.downgrade(alembic_config(connection), "0005")
        connection.execute(text(MODELS_OF_0005))
        connection.commit()
        command.upgrade(alembic_config(connection), "head")
    with sessions() as session:
        rows = session.scalars(select(Promotion).order_by(Promotion.tenant_id, Promotion.id)).all()
        assert [(row.tenant_id, row.version, row.replaced, row.how) for row in rows] == [
            ("a", 1, None, "gate"), ("a", 3, 1, "gate"), ("b", 1, None, "gate"),
        ]  # fmt: skip
        assert [row.back_id for row in rows] == [None, rows[0].id, None]
        assert (rows[1].at.timestamp(), rows[1].verdict) == (30, {"promoted": True})
        sets = session.execute(
            select(ModelVersion.tenant_id, ModelVersion.version, ModelEvaluation.test_digest, ModelEvaluation.scans)
            .join(ModelEvaluation, ModelEvaluation.model_id == ModelVersion.id)
            .order_by(ModelVersion.tenant_id, ModelVersion.version)
        ).all()
        assert [tuple(row) for row in sets] == [("a", 1, "one", 93), ("a", 2, "one", 93), ("b", 1, "two", 12)]
        assert promotion.rollback(session, "a").version == 1


@pytest.mark.slow
def test_a_training_and_a_batch_of_the_release_before_are_migrated_and_finished(
    settings: Settings, sessions: Sessions, tmp_path: Path
) -> None:
    """Its training had lost its worker in the middle, and of its batch one chunk was done."""
    plan = Sabotage(tmp_path)
    plan.training(seconds=0.1)
    plan.network()
    with stack(settings, sessions) as processes:
        champion(processes)
        running, batch_id = training(processes, epochs=2), batch(processes, ["normal", "tumor"] * 4, chunk=4)
        with sessions.begin() as session:
            for job_id in (running, batch_id):
                builders.claim(session, builders.units_of(session, session.get_one(Job, job_id))[0], lease=0.5)
            done = builders.claim(session, builders.units_of(session, session.get_one(Job, batch_id))[1])
            lifecycle.succeed(session, done, outcomes=builders.outcomes_of(session, done))
        with sessions.kw["bind"].connect() as connection:
            command.downgrade(alembic_config(connection), "0006")
            command.upgrade(alembic_config(connection), "head")
        for name in ("dispatcher", "train", "predict"):
            processes.start(name, environ=plan.environ())
        for job_id in (running, batch_id):
            job = processes.wait_for(job_id)
            assert (job.state, job.pipeline, job.task) == ("succeeded", "image", "default"), processes.logs()
        assert wrong(processes) == []


def test_every_row_that_belongs_to_somebody_names_its_tenant() -> None:
    without = {name for name, table in Base.metadata.tables.items() if "tenant_id" not in table.c}
    assert without == OWNED_BY_NOBODY


def test_every_constraint_is_named_by_the_convention(sessions: Sessions) -> None:
    with sessions.kw["bind"].connect() as connection:
        inspector = inspect(connection)
        for table in Base.metadata.tables:
            assert inspector.get_pk_constraint(table)["name"] == f"pk_{table}"
            for key in inspector.get_foreign_keys(table):
                assert str(key["name"]).startswith(f"fk_{table}_")
            for check in inspector.get_check_constraints(table):
                assert str(check["name"]).startswith(f"ck_{table}_")


def _objects(connection: Connection) -> set[str]:
    """Tables, sequences of ours and functions of the public schema."""
    tables = set(inspect(connection).get_table_names()) | set(inspect(connection).get_sequence_names())
    functions = connection.execute(text("SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"))
    found = tables | {row.proname for row in functions}
    connection.commit()  # a migration that builds an index CONCURRENTLY needs a connection without a transaction
    return found
