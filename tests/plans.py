"""How many rows or pages a statement reads, by Postgres' own account."""

from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.orm import Session


def most_rows(session: Session, read: Callable[[Session], object], statement: int = 0) -> float:
    """The most rows that one step of a statement of `read`, the first one if nothing is said, reads, with those that it
    drops. The statement is run twice, in the session's transaction."""
    session.execute(text("ANALYZE"))
    sent: list[str] = []
    connection = session.connection()

    def record(_: Any, cursor: Any, *more: Any) -> None:
        sent.append(cursor.query.decode())

    event.listen(connection, "after_cursor_execute", record)
    read(session)
    event.remove(connection, "after_cursor_execute", record)
    with connection.connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {sent[statement]}")
        ((plan,),) = cursor.fetchone()
    return max(_rows(plan["Plan"]))


def pages_read(session: Session) -> int:
    """Pages that the session's connection has asked for since it was opened. Commits."""
    session.execute(text("SELECT pg_stat_force_next_flush()"))
    session.commit()
    count = "SELECT sum(hits) + sum(reads) FROM pg_stat_get_backend_io(pg_backend_pid()) WHERE object = 'relation'"
    return int(session.scalar(text(count)) or 0)


def _rows(node: dict[str, Any]) -> Iterator[float]:
    dropped = sum(number for name, number in node.items() if name.startswith("Rows Removed by"))
    yield (node["Actual Rows"] + dropped) * node["Actual Loops"]
    for child in node.get("Plans", []):
        yield from _rows(child)
