"""Explanations by the worker: a single scan's with its prediction, a batch's behind; and none that costs a result."""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from jobs.db import Sessions
from jobs.models import promotion
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.queue import lifecycle
from jobs.queue.explanations import ExplanationFiles, class_slugs, find_files
from jobs.queue.leases import Claim
from jobs.queue.outcomes import ScanOutcome
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.states import JobKind, JobState
from jobs.storage.blobs import BlobStore
from jobs.tables import Artifact, Job, Scan, ScanResult, Unit
from ml.image.engines.backends import engine_name
from ml.image.networks import network
from ml.image.networks.network import Model
from ml.image.pixels.transforms import Transform
from ml.image.serving import predictor
from ml.image.serving.gradcam import Explainer
from ml.image.serving.predictor import Predictor, ScanInput
from ml.runtime.errors import DeviceOutOfMemory
from ml.spec import private_logs
from tests import builders
from tests.builders import TENANT
from tests.ml.builders import encode, make_pixels
from worker.execution.resources import Resources
from worker.execution.unit import CancelRequested, Draining, UnitLease, WorkFailed
from worker.handlers import explain
from worker.handlers.explain import explain_results
from worker.handlers.predict import predict_chunk

CLASSES = ["Cyst", "Normal", "Tumor"]
KINDS = (JobKind.PREDICT, JobKind.PREDICT_BATCH)
GOOD, BROKEN = encode(make_pixels(1, 40, 60, bright=True)), b"no image"


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network's file."""
    path = tmp_path_factory.mktemp("explained") / "model.safetensors"
    network.save(
        Model(network.build(3, 0, "vgg16", "gap"), tuple(CLASSES), Transform(32, 32), {}, "vgg16", "gap"), path
    )
    return path


@pytest.fixture
def model_id(resources: Resources, sessions: Sessions, weights: Path) -> uuid.UUID:
    """A version with that network."""
    blob = resources.artifacts.put_file(weights)
    with sessions.begin() as session:
        job = builders.make_job(session)
        held = builders.claim(session, builders.units_of(session, job)[0])
        return promotion.register(session, held, NewModel(blob.sha256, CLASSES, {}, {}, None, None), GatePolicy()).id


Ask = Callable[..., Job]


@pytest.fixture
def ask(resources: Resources, sessions: Sessions, model_id: uuid.UUID) -> Ask:
    """Submits a prediction of these files; equal ones are one scan."""

    def stored(session: Session, content: bytes) -> uuid.UUID:
        sha256 = resources.artifacts.put(io.BytesIO(content)).sha256
        known = session.scalar(select(Scan.id).where(Scan.sha256 == sha256))
        return known or builders.make_scan(session, sha256=sha256).id

    def asked(*files: bytes, kind: JobKind = JobKind.PREDICT, **params: Any) -> Job:
        new = NewJob(TENANT, kind, builders.LANES[kind], params=params, model_id=model_id, model_version=1)
        with sessions.begin() as session:
            return submit(session, new, [NewResult(stored(session, content)) for content in files], 10)

    return asked


def next_unit(resources: Resources, job: Job) -> UnitLease | None:
    """The job's first unit that waits, held."""
    with resources.sessions.begin() as session:
        waits = [unit for unit in builders.units_of(session, job) if unit.finished_at is None]
        return UnitLease(builders.claim(session, waits[0]), resources) if waits else None


def held(resources: Resources, job: Job) -> UnitLease:
    """The same where there must be one."""
    found = next_unit(resources, job)
    assert found is not None
    return found


def explained(resources: Resources, job: Job) -> dict[int, dict[str | None, ExplanationFiles]]:
    """What is there of the job, for each class."""
    with resources.sessions.begin() as session:
        return find_files(session, job.id, range(10), class_slugs(CLASSES))


def opened(resources: Resources, job: Job, name: str | None) -> np.ndarray:
    """An artifact that is a picture."""
    with resources.sessions.begin() as session:
        sha256 = session.scalars(select(Artifact.sha256).where(Artifact.job_id == job.id, Artifact.name == name)).one()
    with resources.artifacts.open(sha256) as file, Image.open(file) as picture:
        return np.asarray(picture)


def state_of(resources: Resources, job: Job) -> tuple[str, str | None]:
    """Of the job, and the label of its first result."""
    with resources.sessions.begin() as session:
        result = session.scalars(select(ScanResult).where(ScanResult.job_id == job.id).order_by(ScanResult.ordinal))
        return session.get_one(Job, job.id).state, next(iter(result)).label


def test_a_single_scan_is_explained_in_the_unit_that_predicts_it(ask: Ask, resources: Resources) -> None:
    job = ask(GOOD, explain=True)
    predict_chunk(held(resources, job))
    assert next_unit(resources, job) is None
    assert state_of(resources, job)[0] == JobState.SUCCEEDED
    ((of_scan,),) = [list(found.items()) for found in explained(resources, job).values()]
    assert of_scan[0] is None, "no other class was asked for"
    assert opened(resources, job, of_scan[1].overlay).shape == (40, 60, 3)
    heat = opened(resources, job, of_scan[1].heatmap)
    assert (heat.shape, heat.dtype) == ((40, 60), np.uint8)
    assert of_scan[1].is_blank == (heat.max() == 0)


def test_nothing_is_explained_without_a_request(ask: Ask, resources: Resources) -> None:
    job = ask(GOOD)
    predict_chunk(held(resources, job))
    assert explained(resources, job) == {}
    assert next_unit(resources, job) is None


@pytest.mark.parametrize("kind", KINDS)
def test_all_means_every_class_of_the_model(ask: Ask, resources: Resources, kind: JobKind) -> None:
    job = ask(GOOD, kind=kind, explain="all")
    predict_chunk(held(resources, job))
    if kind == JobKind.PREDICT_BATCH:
        explain_results(held(resources, job))
    assert state_of(resources, job)[0] == JobState.SUCCEEDED
    found = explained(resources, job)[0]
    _, label = state_of(resources, job)
    assert set(found) == {None, *CLASSES} - {label}
    for seen in found.values():
        heat = opened(resources, job, seen.heatmap)
        assert (heat.shape, seen.is_blank) == ((40, 60), heat.max() == 0)
    heats = {opened(resources, job, seen.heatmap).tobytes() for seen in found.values() if not seen.is_blank}
    assert len(heats) == sum(not seen.is_blank for seen in found.values()), "each class has its own"


def test_a_batch_is_explained_after_its_predictions(ask: Ask, resources: Resources) -> None:
    job, single = ask(GOOD, BROKEN, kind=JobKind.PREDICT_BATCH, explain=True), ask(GOOD, explain=True)
    predict_chunk(held(resources, job))
    assert explained(resources, job) == {}
    explain_results(held(resources, job))
    predict_chunk(held(resources, single))
    assert set(explained(resources, job)) == {0}
    names = [explained(resources, each)[0][None].overlay for each in (job, single)]
    ours, theirs = (opened(resources, each, name) for each, name in zip((job, single), names, strict=True))
    assert np.array_equal(ours, theirs)


def test_a_scan_that_is_known_already_is_explained_too(ask: Ask, resources: Resources, sessions: Sessions) -> None:
    predict_chunk(held(resources, ask(GOOD)))
    again = ask(GOOD, explain=True)
    predict_chunk(held(resources, again))
    with sessions.begin() as session:
        assert session.scalars(select(ScanResult.cached).where(ScanResult.job_id == again.id)).one()
    assert set(explained(resources, again)) == {0}


def test_the_predicted_label_is_explained(ask: Ask, resources: Resources, weights: Path) -> None:
    """Not what the explaining network finds by itself: where rounding decides, it may be another class."""
    by, scan = Explainer.load(weights), ScanInput("a", GOOD)
    own = next(by.explain([scan])).label
    told = next(label for label in CLASSES if label != own and not next(by.explain([scan], label)).is_blank)
    known = {"probabilities": dict.fromkeys(CLASSES, 1 / 3), "engine": Predictor.load(weights).engine.name}
    with resources.sessions.begin() as session:
        lifecycle.succeed(session, held(resources, ask(GOOD)).claim, outcomes=[ScanOutcome(0, told, 1 / 3, **known)])
    again = ask(GOOD, explain=True)
    predict_chunk(held(resources, again))
    assert state_of(resources, again)[1] == told
    heat = opened(resources, again, explained(resources, again)[0][None].heatmap)
    expected = next(by.explain([scan], told)).heatmap
    assert np.array_equal(heat, np.rint(expected * 255))
    assert not np.array_equal(heat, np.rint(next(by.explain([scan])).heatmap * 255))


def test_an_explanation_uses_the_precision_of_the_prediction(ask: Ask, resources: Resources) -> None:
    single, batch = (ask(GOOD, kind=kind, explain=True, precision="fp32") for kind in KINDS)
    predict_chunk(held(resources, single))
    predict_chunk(held(resources, batch))
    explain_results(held(resources, batch))
    ((_, precision),) = explain.explainers()
    assert precision == "fp32"
    (by,) = explain.explainers().values()
    assert by._explainer._below.name == engine_name("fp32")


@pytest.mark.parametrize("again", [False, True])
def test_a_single_scan_is_read_and_decoded_once(
    ask: Ask, resources: Resources, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Also one whose result is known: then it is only the explanation that looks at it."""
    if again:
        predict_chunk(held(resources, ask(GOOD)))
    read, decoded = predictor.read, list[int]()
    monkeypatch.setattr(predictor, "read", lambda *scan: decoded.append(1) or read(*scan))
    job = ask(GOOD, explain=True)
    predict_chunk(held(resources, job))
    assert set(explained(resources, job)) == {0}
    assert decoded == [1]


def test_a_broken_scan_has_its_error_and_no_explanation(ask: Ask, resources: Resources) -> None:
    job = ask(BROKEN, explain=True)
    predict_chunk(held(resources, job))
    assert state_of(resources, job) == (JobState.FAILED, None)
    assert explained(resources, job) == {}


# --- what must not cost the result ---


def out_of_memory(*_: object) -> None:
    raise DeviceOutOfMemory


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("of", "name", "fails"),
    [
        (Explainer, "load", out_of_memory),
        (Explainer, "explain", out_of_memory),
        (Explainer, "_features", full),
        (BlobStore, "put", full),
    ],
)
def test_a_failed_explanation_keeps_the_result(
    ask: Ask, resources: Resources, monkeypatch: pytest.MonkeyPatch, of: type, name: str, fails: Callable[..., None]
) -> None:
    job = ask(GOOD, explain=True)
    explain.explainers().clear()
    monkeypatch.setattr(of, name, fails)
    predict_chunk(held(resources, job))
    state, label = state_of(resources, job)
    assert (state, label in CLASSES) == (JobState.SUCCEEDED, True)
    assert explained(resources, job) == {}
    if fails is out_of_memory:
        assert explain.explainers() == {}, "its memory is given back"
    else:
        assert len(explain.explainers()) == 1, "it is as good as before"


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says which scan of a job nobody can explain, by its ordinal; a negative one ends that."""
    explanations_of, poisoned = Explainer._explanations, list[int]()

    def explanations(by: Explainer, scan: ScanInput, label: str | None) -> Any:
        if scan.id in map(str, poisoned):
            raise ArithmeticError("Patient Miller")
        return explanations_of(by, scan, label)

    def poison(ordinal: int) -> None:
        poisoned[:] = [ordinal]

    monkeypatch.setattr(Explainer, "_explanations", explanations)
    return poison


@pytest.mark.parametrize("every", [True, "all"])
def test_a_scan_that_is_no_longer_stored_does_not_fail_the_unit(
    ask: Ask, resources: Resources, every: bool | str
) -> None:
    others = [encode(make_pixels(seed, 30, 30)) for seed in range(2)]
    job = ask(GOOD, *others, kind=JobKind.PREDICT_BATCH, explain=every)
    predict_chunk(held(resources, job))
    gone = hashlib.sha256(others[0]).hexdigest()
    resources.artifacts.set_aside(gone)
    resources.artifacts.delete_aside(gone)
    with capture_logs() as logs:
        explain_results(held(resources, job))
    assert set(explained(resources, job)) == {0, 2}
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == []


def fail_to_explain(resources: Resources, job: Job) -> None:
    """Try to, and do not wait until the next try may be."""
    failing = held(resources, job)
    with pytest.raises(WorkFailed) as failed:
        explain_results(failing)
    failing.end(failed.value)
    with resources.sessions.begin() as session:
        waits = Unit.id == failing.claim.unit_id, Unit.finished_at.is_(None)
        session.execute(update(Unit).where(*waits).values(not_before=func.now()))
        lifecycle.enqueue_due(session)


def test_a_scan_that_cannot_be_explained_does_not_affect_others(
    ask: Ask, resources: Resources, poison: Callable[[int], None]
) -> None:
    """It is tried as often as any work, and ends without."""
    job = ask(*(encode(make_pixels(seed, 30, 30)) for seed in range(3)), kind=JobKind.PREDICT_BATCH, explain=True)
    predict_chunk(held(resources, job))
    poison(1)
    for _ in range(resources.settings.max_failures):
        with capture_logs() as logs:
            fail_to_explain(resources, job)
        assert set(explained(resources, job)) == {0, 2}
        (told,) = [entry for entry in logs if entry["event"] == "explanation_failed"]
        assert (told["ordinal"], told["error"]) == (1, "ArithmeticError")
        written = [entry | {"exc_info": private_logs.places(entry.get("exc_info"))} for entry in logs]
        assert "Miller" not in str(written), "of an exception, types and places are written"
    assert next_unit(resources, job) is None
    assert state_of(resources, job)[0] == JobState.SUCCEEDED


def test_a_retry_explains_what_failed_once(ask: Ask, resources: Resources, poison: Callable[[int], None]) -> None:
    job = ask(*(encode(make_pixels(seed, 30, 30)) for seed in range(2)), kind=JobKind.PREDICT_BATCH, explain=True)
    predict_chunk(held(resources, job))
    poison(0)
    fail_to_explain(resources, job)
    poison(-1)
    explain_results(held(resources, job))
    assert set(explained(resources, job)) == {0, 1}
    assert state_of(resources, job)[0] == JobState.SUCCEEDED


def test_each_class_is_stored_before_the_next_is_explained(
    ask: Ask, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a worker's memory does not grow with the number of classes."""
    happened, put, of_class = list[str](), BlobStore.put, Explainer._explain_class
    monkeypatch.setattr(BlobStore, "put", lambda *of: happened.append("stored") or put(*of))
    monkeypatch.setattr(Explainer, "_explain_class", lambda *of: happened.append("made") or of_class(*of))
    job = ask(GOOD, explain="all")
    happened.clear()
    predict_chunk(held(resources, job))
    made = [place for place, what in enumerate(happened) if what == "made"]
    assert len(made) == len(CLASSES)
    assert all(happened[place + 1] == "stored" for place in made)


def test_a_second_attempt_explains_after_the_result(ask: Ask, resources: Resources) -> None:
    """Else a worker that is killed for its memory would take the prediction with it each time."""
    job = ask(GOOD, explain=True)
    held(resources, job).end(Draining())
    predict_chunk(held(resources, job))
    assert state_of(resources, job)[1] in CLASSES, "the result is written"
    assert explained(resources, job) == {}
    explain_results(held(resources, job))
    assert set(explained(resources, job)) == {0}
    assert state_of(resources, job)[0] == JobState.SUCCEEDED


def test_an_interrupted_unit_keeps_written_explanations(
    ask: Ask, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "WRITE_SECONDS", 0.0)
    scans = [encode(make_pixels(seed, 30, 30)) for seed in range(3)]
    job = ask(*scans, kind=JobKind.PREDICT_BATCH, explain="all")
    predict_chunk(held(resources, job))
    interrupted = held(resources, job)
    keep, kept = explain.explanations.save, list[int]()

    def once(session: Any, held: Claim, made: Any) -> None:
        keep(session, held, made)
        kept.append(1)
        if len(kept) == 2:  # the first time there was nothing yet
            interrupted.interrupt(Draining())

    monkeypatch.setattr(explain.explanations, "save", once)
    with pytest.raises(Draining):
        explain_results(interrupted)
    interrupted.end(Draining())
    assert set(explained(resources, job)) == {0}
    assert len(explained(resources, job)[0]) == len(CLASSES), "of a scan all is written, or nothing"
    monkeypatch.setattr(explain.explanations, "save", keep)
    explain_results(held(resources, job))
    assert set(explained(resources, job)) == {0, 1, 2}


def test_a_cancelled_batch_keeps_what_is_explained(
    ask: Ask, resources: Resources, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "WRITE_SECONDS", 0.0)
    scans = [encode(make_pixels(seed, 30, 30)) for seed in range(3)]
    job = ask(*scans, kind=JobKind.PREDICT_BATCH, explain=True)
    predict_chunk(held(resources, job))
    cancelled = held(resources, job)
    keep = explain.explanations.save

    def kept(session: Session, held: Claim, made: list[Any]) -> None:
        keep(session, held, made)
        if made:
            cancelled.interrupt(CancelRequested())

    monkeypatch.setattr(explain.explanations, "save", kept)
    with pytest.raises(CancelRequested):
        explain_results(cancelled)
    cancelled.end(CancelRequested())
    assert set(explained(resources, job)) == {0}
    assert state_of(resources, job)[1] in CLASSES
    with sessions.begin() as session:
        assert len(session.scalars(select(Unit).where(Unit.job_id == job.id)).all()) == 2
