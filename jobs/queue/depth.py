"""What a tenant has in the queue, by state. History costs it nothing: only what has not ended is looked at."""

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs.states import TERMINAL, UNIT_TERMINAL, JobState, UnitState
from jobs.tables import Job, Unit


def jobs(session: Session, tenant_id: str) -> dict[str, int]:
    """Jobs that have not ended: each state that such a job may have."""
    return _by_state(session, Job, tenant_id, [str(state) for state in JobState if state not in TERMINAL])


def units(session: Session, tenant_id: str) -> dict[str, int]:
    """Units that have not ended: each state that such a unit may have."""
    return _by_state(session, Unit, tenant_id, [str(state) for state in UnitState if state not in UNIT_TERMINAL])


def _by_state(session: Session, table: Any, tenant_id: str, states: list[str]) -> dict[str, int]:
    mine = select(table.state, func.count()).where(table.tenant_id == tenant_id, table.finished_at.is_(None))
    counted: dict[str, int] = dict(tuple(row) for row in session.execute(mine.group_by(table.state)))
    return {state: counted.get(state, 0) for state in states}
