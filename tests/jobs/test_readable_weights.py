"""Trainings whose weights no live worker can read are refused when they are submitted."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text, update
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.errors import WeightsMissing
from jobs.queue import processes
from jobs.queue.processes import Heartbeat
from jobs.queue.submission import NewJob, submit
from jobs.states import JobKind, Lane
from jobs.tables import Job, Json, Process
from tests.builders import TENANT

VGG, FILES = ["imagenet:vgg16"], ["file:a.pth"]


def live(sessions: Sessions, name: str, weights: Json | None, lane: str = "train", age: float = 0) -> None:
    """A worker's row; `weights` None: it has not said what it can read."""
    with sessions.begin() as session:
        processes.register(session, Heartbeat(name, processes.WORKER, [lane]))
        if weights is not None:
            processes.report_weights(session, name, weights)
        seen = text("clock_timestamp() - make_interval(secs => :age)").bindparams(age=age)
        session.execute(update(Process).where(Process.name == name).values(seen_at=seen))


def train(sessions: Sessions, **params: Any) -> Job:
    with sessions.begin() as session:
        return submit(session, NewJob(TENANT, JobKind.TRAIN, Lane.TRAIN, params=params))


@pytest.mark.parametrize(
    ("workers", "params"),
    [
        ([], {}),
        ([("one/1", None)], {}),
        ([("one/1", {"image": []}), ("two/1", None)], {}),
        ([("one/1", {"image": []}), ("two/1", {})], {}),
        ([("one/1", {"image": VGG})], {}),
        ([("one/1", {"image": []}), ("two/1", {"image": VGG})], {"weights": "imagenet"}),
        ([("one/1", {"image": ["imagenet:resnet18"]})], {"network": "resnet18"}),
        ([("one/1", {"image": FILES})], {"weights": "file:a.pth"}),
        ([("one/1", {"image": []})], {"weights": "none"}),
        ([("one/1", {"image": []})], {"weights": "version:1"}),
    ],
    ids=[
        "nobody lives", "it has not said", "one has not said", "its release has no such pipeline", "it has them",
        "one has them", "of that network", "a file", "none are needed", "those of a version",
    ],
)  # fmt: skip
def test_accepted(sessions: Sessions, workers: list[tuple[str, Json | None]], params: Json) -> None:
    for name, weights in workers:
        live(sessions, name, weights)
    assert train(sessions, **params).state == "queued"


@pytest.mark.parametrize(
    ("weights", "params", "said"),
    [
        ([], {}, ["imagenet:vgg16", "can read: none", "renalq weights fetch vgg16", "weights: none"]),
        (
            ["imagenet:resnet18", *FILES], {"network": "resnet50"},
            ["imagenet:resnet50", "can read: imagenet:resnet18.", "renalq weights fetch resnet50"],
        ),
        (VGG, {"weights": "file:b.pth"}, ["file:b.pth", "can read: imagenet:vgg16", "RENALQ_WEIGHTS_DIR"]),
    ],
)  # fmt: skip
def test_refused_with_what_is_there_and_what_to_do(
    sessions: Sessions, weights: list[str], params: Json, said: list[str]
) -> None:
    live(sessions, "one/1", {"image": weights})
    with pytest.raises(WeightsMissing) as raised:
        train(sessions, **params)
    detail = str(raised.value)
    assert [part for part in said if part not in detail] == []
    assert "a.pth" not in detail, "whose file it is nobody knows"
    assert (raised.value.pointer, raised.value.status) == ("/params/weights", 422)


def test_only_live_workers_of_the_lane_count(sessions: Sessions) -> None:
    live(sessions, "old/1", {"image": VGG}, age=processes.ALIVE_SECONDS + 5)
    live(sessions, "predict/1", {"image": VGG}, lane="urgent")
    assert train(sessions).state == "queued", "nobody is there to say"
    live(sessions, "one/1", {"image": []})
    with pytest.raises(WeightsMissing):
        train(sessions)


def test_other_jobs_need_no_weights(sessions: Sessions) -> None:
    live(sessions, "one/1", {"image": []}, lane="batch")
    with sessions.begin() as session:
        assert submit(session, NewJob(TENANT, JobKind.INGEST, Lane.BATCH)).state == "queued"


# --- the report ---

WRITES = text("SELECT n_tup_upd::int, n_tup_hot_upd::int FROM pg_stat_xact_user_tables WHERE relname = 'processes'")


def test_what_has_not_changed_is_not_written_and_heartbeats_leave_it_alone(sessions: Sessions) -> None:
    beat = Heartbeat("one/1", processes.WORKER, ["train"])
    live(sessions, beat.name, {"image": VGG})
    with sessions.begin() as session:
        assert _writes(session, lambda: processes.report_weights(session, beat.name, {"image": VGG})) == (0, 0)
        assert _writes(session, lambda: processes.upsert(session, beat)) == (1, 1), "heartbeats touch no index"
        assert processes.readable_weights(session, "train", "image") == set(VGG)
        processes.report_weights(session, beat.name, {"image": FILES})
        assert processes.readable_weights(session, "train", "image") == set(FILES)


def _writes(session: Session, act: Callable[[], None]) -> tuple[int, int]:
    """How many rows were updated, and how many of them without touching an index."""
    before = session.execute(WRITES).one()
    act()
    after = session.execute(WRITES).one()
    return after[0] - before[0], after[1] - before[1]


def test_a_new_instance_has_not_said_yet(sessions: Sessions) -> None:
    live(sessions, "one/1", {"image": VGG})
    live(sessions, "one/2", None)
    with sessions.begin() as session:
        assert processes.readable_weights(session, "train", "image") is None
