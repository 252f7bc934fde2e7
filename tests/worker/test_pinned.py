"""A prediction is of the version that its job was pinned to when it was submitted, whoever is champion by now."""

from __future__ import annotations

import io
import uuid
from pathlib import Path

import pytest
import torch
from sqlalchemy import select

from jobs.models import promotion, registry
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.states import JobKind
from jobs.tables import Job, ModelVersion, PromotionMethod, ScanResult
from ml.image.networks import network
from ml.image.networks.network import Model
from ml.image.pixels.transforms import Transform
from ml.image.serving.predictor import Predictor, ScanInput
from tests import builders
from tests.builders import TENANT
from tests.ml.builders import CLASSES, encode, last_linear, make_pixels
from worker.execution.resources import Resources
from worker.execution.unit import UnitLease
from worker.handlers.predict import predict_chunk

SCAN = encode(make_pixels(1, 40, 60, bright=True))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of two small networks that disagree."""
    paths = [tmp_path_factory.mktemp("pinned") / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        model = Model(network.build(2, 0, "vgg16", "gap"), CLASSES, Transform(32, 32), {}, "vgg16", "gap")
        with torch.no_grad():
            last_linear(model).bias[1] = 4 * seed - 2  # one sees tumours nearly nowhere, the other nearly everywhere
        network.save(model, path)
    return paths


def version_of(resources: Resources, weights: Path) -> ModelVersion:
    """The next version, with that network."""
    blob = resources.artifacts.put_file(weights)
    with resources.sessions.begin() as session:
        held = builders.claim(session, builders.units_of(session, builders.make_job(session))[0])
        return promotion.register(session, held, NewModel(blob.sha256, list(CLASSES), {}, {}, None, None), GatePolicy())


def submitted(resources: Resources, kind: JobKind, model: ModelVersion) -> Job:
    """A prediction of the scan by this version."""
    sha256 = resources.artifacts.put(io.BytesIO(SCAN)).sha256
    new = NewJob(TENANT, kind, builders.LANES[kind], model_id=model.id, model_version=model.version)
    with resources.sessions.begin() as session:
        return submit(session, new, [NewResult(builders.make_scan(session, sha256=sha256).id)], 10)


def promote(resources: Resources, model: ModelVersion) -> None:
    """Make it the champion."""
    with resources.sessions.begin() as session:
        registry.lock(session, TENANT)
        promotion.set_champion(session, session.get_one(ModelVersion, model.id), PromotionMethod.REQUEST, None)


def stored(resources: Resources, job_id: uuid.UUID) -> dict[str, float]:
    """The result's probabilities."""
    with resources.sessions.begin() as session:
        return session.scalars(select(ScanResult.probabilities).where(ScanResult.job_id == job_id)).one() or {}


@pytest.mark.usefixtures("sessions")
@pytest.mark.parametrize("kind", [JobKind.PREDICT, JobKind.PREDICT_BATCH])
def test_a_later_champion_does_not_predict_in_place_of_the_pinned_version(
    resources: Resources, networks: list[Path], kind: JobKind
) -> None:
    first, second = (version_of(resources, path) for path in networks)
    promote(resources, first)
    job = submitted(resources, kind, first)
    promote(resources, second)
    with resources.sessions.begin() as session:
        champion = registry.find_champion(session, TENANT)
        assert champion is not None
        assert champion.version == second.version
        held = UnitLease(builders.claim(session, builders.units_of(session, job)[0]), resources)
    predict_chunk(held)
    ours, theirs = (next(Predictor.load(path).predict([ScanInput("a", SCAN)])).probabilities for path in networks)
    assert ours["Tumor"] < 0.2 < 0.8 < theirs["Tumor"]
    assert stored(resources, job.id) == pytest.approx(ours, abs=1e-4)


def test_a_batch_keeps_the_threshold_that_it_was_submitted_with(resources: Resources, networks: list[Path]) -> None:
    """Also where the result of the scan is in the cache, from under another threshold."""
    blob = resources.artifacts.put_file(networks[0])
    (probabilities,) = (each.probabilities for each in Predictor.load(networks[0]).predict([ScanInput("1", SCAN)]))
    low, high = probabilities["Tumor"] * 0.9, probabilities["Tumor"] * 1.1
    metrics = {"positive": ["Tumor"], "threshold": high}
    with resources.sessions.begin() as session:
        held = builders.claim(session, builders.units_of(session, builders.make_job(session))[0])
        new = NewModel(blob.sha256, list(CLASSES), {}, metrics, None, None)
        model = promotion.register(session, held, new, GatePolicy())
    sha256 = resources.artifacts.put(io.BytesIO(SCAN)).sha256
    with resources.sessions.begin() as session:
        scan = builders.make_scan(session, sha256=sha256).id
    found = []
    for threshold in (high, low, None):
        point = {"positive": ["Tumor"], "threshold": threshold} if threshold else None
        kind = JobKind.PREDICT_BATCH
        new_job = NewJob(TENANT, kind, builders.LANES[kind], model_id=model.id, operating_point=point)
        with resources.sessions.begin() as session:
            job = submit(session, new_job, [NewResult(scan)], 10)
            unit = UnitLease(builders.claim(session, builders.units_of(session, job)[0]), resources)
        predict_chunk(unit)
        with resources.sessions.begin() as session:
            result = session.scalars(select(ScanResult).where(ScanResult.job_id == job.id)).one()
            found.append((result.label, result.confidence, result.cached))
    tumor, normal = (pytest.approx(probabilities[name]) for name in ("Tumor", "Normal"))
    assert found == [("Normal", normal, False), ("Tumor", tumor, True), ("Normal", normal, True)]
