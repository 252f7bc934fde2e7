"""Comparison of a training and its reproduction, stored in the transaction that ends the job."""

import uuid
from typing import Any

import pytest
from sqlalchemy import select

from jobs.db import Sessions
from jobs.errors import LeaseLost
from jobs.models import promotion, reproduction
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.models.reproduction import compare_versions, numeric_leaves
from jobs.queue import lifecycle, reaping
from jobs.queue.leases import Claim
from jobs.queue.submission import retry
from jobs.states import JobState
from jobs.tables import Job, JobEvent, ModelVersion
from tests import builders

METRICS: dict[str, Any] = {
    "f1": 0.9,
    "classes": ["Normal", "Tumor"],
    "patients_known": True,
    "per_class": {"Tumor": {"f1": 0.9}},
    "intervals": {"f1": [0.8, 0.95]},
    "confusion_matrix": [[5, 1], [0, 6]],
    "roc_auc": None,
}


def version(metrics: dict[str, Any] = METRICS, **more: Any) -> ModelVersion:
    """What a training made."""
    made = {"code_revision": "abc", "environment": {"torch": "2.13", "device": "CPU"}, "dataset_digest": "d" * 64}
    return ModelVersion(metrics=metrics, **{**made, **more})


def test_equal_metrics_match() -> None:
    assert compare_versions(version(), version()) == {
        "revision": {"original": "abc", "now": "abc", "same": True},
        "same_environment": True,
        "environment_differences": {},
        "same_dataset": True,
        "matches": True,
        "tolerance": 1e-6,
        "differences": {},
    }


def test_different_metric_is_reported_with_both_values() -> None:
    now = {**METRICS, "per_class": {"Tumor": {"f1": 0.91}}, "confusion_matrix": [[4, 2], [0, 6]]}
    found = compare_versions(version(), version(now))
    assert not found["matches"]
    assert found["differences"] == {
        "per_class.Tumor.f1": [0.9, 0.91],
        "confusion_matrix.0.0": [5, 4],
        "confusion_matrix.0.1": [1, 2],
    }


def test_differences_within_the_tolerance_match() -> None:
    assert compare_versions(version(), version({**METRICS, "f1": 0.9 + 9e-7}))["matches"]
    assert not compare_versions(version(), version({**METRICS, "f1": 0.9 + 2e-6}))["matches"]


def test_metric_of_one_version_only_is_a_difference() -> None:
    assert compare_versions(version(), version({**METRICS, "roc_auc": 0.99}))["differences"] == {
        "roc_auc": [None, 0.99]
    }
    assert compare_versions(version({**METRICS, "pr_auc": 0.5}), version())["differences"] == {"pr_auc": [0.5, None]}


def test_times_are_not_compared() -> None:
    timed = {**METRICS, "seconds": 3, "stages": [{"device_seconds": 1.5, "loss": 0.1}]}
    assert set(numeric_leaves(timed)) - set(numeric_leaves(METRICS)) == {"stages.0.loss"}


def test_environment_differences_are_reported() -> None:
    found = compare_versions(version(), version(environment={"torch": "2.14", "device": "CPU", "openvino": "1"}))
    assert not found["same_environment"]
    assert found["environment_differences"] == {"torch": ["2.13", "2.14"], "openvino": [None, "1"]}
    assert found["matches"], "the metrics are equal"


@pytest.mark.parametrize(
    ("original", "now"), [("abc", "abd"), (None, None), (None, "abc"), ("abc+changed", "abc+changed")]
)
def test_unknown_or_changed_code_is_not_the_same(original: str | None, now: str | None) -> None:
    assert not compare_versions(version(code_revision=original), version(code_revision=now))["revision"]["same"]


# --- in the transaction that ends the job ---


def training(sessions: Sessions, metrics: dict[str, Any], **new: Any) -> uuid.UUID:
    """A training that has ended as the worker ends it."""
    with sessions.begin() as session:
        job = builders.make_job(session, **new)
        held = builders.claim(session, builders.units_of(session, job)[0])
    end(sessions, held, metrics)
    return job.id


def end(sessions: Sessions, held: Claim, metrics: dict[str, Any]) -> None:
    """The one transaction of a training's end."""
    with sessions.begin() as session:
        promotion.register(session, held, NewModel("a" * 64, ["A", "B"], {}, metrics, "d" * 64, "abc"), GatePolicy())
        reproduction.save_comparison(session, held)
        lifecycle.succeed(session, held, metrics=metrics)


def test_reproduction_is_stored_on_the_job_and_as_an_event(sessions: Sessions) -> None:
    original = training(sessions, METRICS)
    again = training(sessions, {**METRICS, "f1": 0.5}, reproduction_of=original, promote="never")
    with sessions() as session:
        found = session.get_one(Job, again).reproduction
        assert found is not None
        assert (found["of"], found["matches"], found["differences"]) == (str(original), False, {"f1": [0.9, 0.5]})
        events = session.scalars(select(JobEvent).where(JobEvent.job_id == again).order_by(JobEvent.id)).all()
        assert [event.type for event in events][-2:] == ["reproduced", "succeeded"]
        assert events[-2].data == found
        assert session.get_one(Job, original).reproduction is None


def test_lost_lease_writes_no_comparison(sessions: Sessions) -> None:
    original = training(sessions, METRICS)
    with sessions.begin() as session:
        job = builders.make_job(session, reproduction_of=original)
        held = builders.claim(session, builders.units_of(session, job)[0], lease=-1)
        assert reaping.reap(session, retry=lifecycle.RetryPolicy(), stall=900) == 1
    with pytest.raises(LeaseLost):
        end(sessions, held, METRICS)
    with sessions() as session:
        assert session.get_one(Job, job.id).reproduction is None
        assert session.query(ModelVersion).count() == 1


def test_retry_of_a_reproduction_is_a_reproduction(sessions: Sessions) -> None:
    original = training(sessions, METRICS)
    with sessions.begin() as session:
        base = builders.make_model(session).id
        failed = builders.make_job(session, state=JobState.FAILED, reproduction_of=original, base_model_id=base)
        again = retry(session, builders.TENANT, failed.id)
        assert (again.reproduction_of, again.base_model_id) == (original, base)
