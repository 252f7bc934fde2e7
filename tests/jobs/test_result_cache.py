"""The result cache, and explanations, which are queued behind all predictions."""

import re
import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.errors import LeaseLost
from jobs.queue import explanations, lifecycle
from jobs.queue.explanations import (
    BLANK_NOTE,
    HEATMAP,
    OVERLAY,
    ExplanationFiles,
    NamedBlob,
    artifact_name,
    class_slugs,
)
from jobs.queue.leases import Claim
from jobs.queue.outcomes import ScanOutcome
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.results import cache
from jobs.results.cache import CachedResult, cached_results
from jobs.states import JobKind, JobState, Lane
from jobs.storage.blobs import Blob
from jobs.tables import Artifact, Job, ScanResult, Unit, new_id
from tests import builders
from tests.builders import TENANT, outcomes_of, units_of
from tests.jobs.checker import faults

MODEL = new_id()


@pytest.fixture
def session(sessions: Sessions) -> Iterator[Session]:
    """A session with one transaction for the whole test."""
    with sessions.begin() as opened:
        yield opened
        assert faults(opened) == []


def batch(session: Session, scans: int = 3, chunk: int = 10, **new: object) -> Job:
    """A batch on the model."""
    return builders.make_job(session, JobKind.PREDICT_BATCH, scans=scans, chunk=chunk, model_id=MODEL, **new)


def first(session: Session, job: Job) -> Claim:
    """The job's first queued unit, claimed."""
    waits = [unit for unit in units_of(session, job) if unit.finished_at is None]
    return builders.claim(session, waits[0])


def scan_ids(session: Session, job: Job) -> list:
    """The job's scans in order."""
    of_job = select(ScanResult.scan_id).where(ScanResult.job_id == job.id).order_by(ScanResult.ordinal)
    return list(session.scalars(of_job))


def made(ordinal: int, word: str | None = None, blank: bool = False) -> list[NamedBlob]:
    """Files of an explanation."""
    parts = (OVERLAY, HEATMAP, BLANK_NOTE) if blank else (OVERLAY, HEATMAP)
    return [(artifact_name(ordinal, part, word), Blob("a" * 64, 10)) for part in parts]


def test_cached_result_is_per_model_and_engine(session: Session) -> None:
    job = batch(session)
    ids = scan_ids(session, job)
    assert cached_results(session, MODEL, "torch-fp32", ids) == {}
    held = first(session, job)
    lifecycle.succeed(session, held, outcomes=outcomes_of(session, held, failed=1))
    found = CachedResult("Tumor", 0.9, {"Normal": 0.1, "Tumor": 0.9}, 0.4, identity={})
    computed = {(scan, None): found for scan in ids[1:]}
    assert cached_results(session, MODEL, "torch-fp32", ids) == computed, "a failure is no answer"
    assert cached_results(session, MODEL, "openvino-bf16", ids) == {}
    assert cached_results(session, new_id(), "torch-fp32", ids) == {}


def test_cached_results_are_not_sources_of_the_cache(session: Session) -> None:
    """However often a scan is sent, the index has it once per model and engine."""
    job = batch(session, scans=1)
    held = first(session, job)
    lifecycle.succeed(session, held, outcomes=outcomes_of(session, held))
    (scan,) = scan_ids(session, job)
    again = submit(session, NewJob(TENANT, JobKind.PREDICT, Lane.URGENT, model_id=MODEL), [NewResult(scan)])
    held = first(session, again)
    known = cached_results(session, MODEL, "torch-fp32", [scan])[scan, None]
    copied = ScanOutcome(0, known.label, known.confidence, known.probabilities, "torch-fp32", cached=True)
    lifecycle.succeed(session, held, outcomes=[copied])
    rows = session.execute(select(ScanResult.cached).where(ScanResult.scan_id == scan).order_by(ScanResult.job_id))
    assert sorted(rows.scalars()) == [False, True]


def test_cached_results_are_found_by_the_index(session: Session) -> None:
    query = cache._select_results(MODEL, "torch-fp32", [uuid.uuid4()])
    literal = query.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True})
    session.execute(text("SET LOCAL enable_seqscan = off"))
    assert "ix_scan_results_scan_id_cached" in "\n".join(session.scalars(text(f"EXPLAIN {literal}")))


def test_equal_scans_of_a_batch_are_in_one_unit(session: Session) -> None:
    ids = [builders.make_scan(session).id for _ in range(4)]
    order = [0, 1, 0, 2, 3, 0, 3]
    new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH, model_id=MODEL)
    job = submit(session, new, [NewResult(ids[number]) for number in order], chunk=2)
    rows = session.execute(
        select(Unit.ordinal, ScanResult.ordinal)
        .join(Unit, Unit.id == ScanResult.unit_id)
        .where(ScanResult.job_id == job.id)
        .order_by(ScanResult.ordinal)
    )
    assert [unit for unit, _ in rows] == [0, 0, 0, 1, 1, 0, 1]
    assert [unit.scans for unit in units_of(session, job)] == [4, 3]


def test_explanations_are_queued_behind_all_predictions(session: Session) -> None:
    job = batch(session, scans=4, chunk=2)
    held = first(session, job)
    lifecycle.succeed(session, held, outcomes=outcomes_of(session, held, failed=1), enqueue_explanations=True)
    kinds = [(unit.ordinal, unit.explains, unit.scans) for unit in units_of(session, job)]
    assert kinds == [(0, None, 2), (1, None, 2), (2, held.unit_id, 1)]
    held = first(session, job)
    assert not held.explains
    lifecycle.succeed(session, held, outcomes=outcomes_of(session, held), enqueue_explanations=True)

    explaining = first(session, job)
    assert explaining.explains
    (left,) = explanations.unexplained(session, explaining)
    assert (left.ordinal, left.label) == (1, "Tumor")
    explanations.save(session, explaining, made(1))
    assert explanations.unexplained(session, explaining) == [], "stored explanations are not computed again"
    own = ExplanationFiles("explanations/000001.png", "explanations/000001.heatmap.png", is_blank=False)
    assert explanations.find_files(session, job.id, range(4)) == {1: {None: own}}
    lifecycle.succeed(session, explaining)
    session.refresh(job)
    assert job.state == JobState.RUNNING, "two results still wait for theirs"

    last = first(session, job)
    lifecycle.fail(session, last, builders.BROKEN)
    session.refresh(job)
    assert (job.state, job.succeeded, job.failed) == (JobState.PARTIALLY_SUCCEEDED, 3, 1), "the results stand"
    assert (job.error, job.warnings) == (None, [builders.BROKEN]), "it says why some are not explained"


def test_unit_without_results_queues_no_explanations(session: Session) -> None:
    job = batch(session, scans=1)
    held = first(session, job)
    lifecycle.succeed(session, held, outcomes=outcomes_of(session, held, failed=1), enqueue_explanations=True)
    session.refresh(job)
    assert job.state == JobState.FAILED


def test_lost_explaining_unit_writes_nothing_and_the_next_attempt_continues(session: Session) -> None:
    job = batch(session, scans=2)
    held = first(session, job)
    lifecycle.succeed(session, held, outcomes=outcomes_of(session, held), enqueue_explanations=True)
    lost = first(session, job)
    explanations.save(session, lost, made(0))
    lifecycle.requeue(session, lost, "DRAINED")
    following = first(session, job)
    with pytest.raises(LeaseLost):
        explanations.save(session, lost, made(1))
    assert [one.ordinal for one in explanations.unexplained(session, following)] == [1]
    explanations.save(session, following, made(1))
    lifecycle.succeed(session, following)
    session.refresh(job)
    assert job.state == JobState.SUCCEEDED
    assert len(session.scalars(select(Artifact).where(Artifact.job_id == job.id)).all()) == 4


def test_cancel_during_explanations_keeps_results(session: Session) -> None:
    job = batch(session, scans=2)
    held = first(session, job)
    lifecycle.succeed(session, held, outcomes=outcomes_of(session, held), enqueue_explanations=True)
    lifecycle.cancel(session, TENANT, job.id)
    session.refresh(job)
    assert (job.state, job.succeeded, job.cancelled) == (JobState.SUCCEEDED, 2, 0)


def test_explanations_are_stored_per_class(session: Session) -> None:
    classes = ["Cyst", "Normal", "Tumor"]
    words = class_slugs(classes)
    job = batch(session, scans=2)
    held = first(session, job)
    pieces = [*made(0), *made(0, words["Cyst"], blank=True), *made(0, words["Normal"])]
    explanations.save(session, held, pieces)
    found = explanations.find_files(session, job.id, range(2), words)
    assert set(found) == {0}
    assert {label: seen.is_blank for label, seen in found[0].items()} == {None: False, "Cyst": True, "Normal": False}
    assert found[0]["Cyst"].heatmap == "explanations/000000.Cyst.heatmap.png"
    lifecycle.succeed(session, held, outcomes=outcomes_of(session, held))
    types = session.execute(select(Artifact.name, Artifact.media_type).where(Artifact.job_id == job.id)).all()
    texts = {"explanations/000000.Cyst.blank.txt"}
    assert {name for name, kind in types if kind != "image/png"} == texts


def test_class_slugs_are_unique() -> None:
    classes = ["Clear cell", "clear/cell", "Clear_cell", "heatmap", "Zyste ü", "腎", "肾", "x" * 300, "a.b"]
    words = class_slugs(classes)
    assert words["Clear cell"] == "Clear_cell"
    assert words["Zyste ü"] == "Zyste_"
    assert words["heatmap"] != "heatmap", "000000.heatmap.png is the heatmap of the class that was found"
    assert len({word.casefold() for word in words.values()}) == len(classes)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,70}", word) for word in words.values())
    assert words == class_slugs(classes)
