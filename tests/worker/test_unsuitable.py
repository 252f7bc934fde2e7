"""Blank and foreign scans are rejected on the whole way from a model file to the stored result; older files keep their
ways."""

from __future__ import annotations

import io
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.models import promotion
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.states import JobKind
from jobs.tables import Artifact, ModelVersion, Scan, ScanResult
from ml.image.networks import network
from ml.image.networks.network import Model
from ml.image.pixels.picture import Origin
from ml.image.pixels.transforms import Transform
from tests import builders
from tests.builders import TENANT
from tests.ml.builders import CLASSES, encode, last_linear, make_pixels
from tests.ml.raw_dicom import CAPTURE, raw_dicom
from worker.execution.resources import Resources
from worker.execution.unit import UnitLease
from worker.handlers.predict import predict_chunk

VALUES = make_pixels(1, 48, 48, bright=True)[..., 0].astype(np.int16)
GREYS = np.stack([VALUES.astype(np.uint8)] * 3, axis=2)
RED = GREYS * np.array([1, 0, 0], np.uint8)
STORED_IN_COLOUR = {
    "SOPClassUID": CAPTURE, "SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0,
}  # fmt: skip
SCANS = {
    "CT": raw_dicom(VALUES, Modality="CT"),
    "MR": raw_dicom(VALUES, Modality="MR"),
    "fusion": raw_dicom(RED[..., 0], PixelData=RED.tobytes(), **STORED_IN_COLOUR),
    "capture": raw_dicom(GREYS[..., 0], PixelData=GREYS.tobytes(), **STORED_IN_COLOUR),
    "PNG": encode(GREYS),
    "blank": raw_dicom(np.full((48, 48), -1000, np.int16)),
}
REASONS = {
    "MR": "The scan is foreign to this network: its modality is MR, and the network has learnt from CT. Use a network "
    "that has learnt from such scans.",
    "fusion": "The scan is foreign to this network: it is in colour, and the network has learnt from "
    "grey scans alone. Use a network that has learnt from such scans.",
    "blank": "The scan is blank: it shows nothing but one grey level. Check that it was exported with its pixels.",
}
LEARNT = [asdict(Origin("CT", "KIDNEY")), asdict(Origin())]


def version_of(resources: Resources, folder: Path, metadata: dict[str, Any], rules: int = 2) -> ModelVersion:
    """A version of a small network whose file says so much of its training."""
    path = folder / "model.safetensors"
    built = network.build(2, 0, "vgg16", "gap")
    model = Model(built, CLASSES, Transform(32, 32, rules=rules), metadata, "vgg16", "gap")
    with torch.no_grad():
        last_linear(model).weight *= 500  # an untrained network says 0.5 to everything
    network.save(model, path)
    blob = resources.artifacts.put_file(path)
    with resources.sessions.begin() as session:
        held = builders.claim(session, builders.units_of(session, builders.make_job(session))[0])
        return promotion.register(session, held, NewModel(blob.sha256, list(CLASSES), {}, {}, None, None), GatePolicy())


def stored(session: Session, sha256: str) -> uuid.UUID:
    """The scan with these bytes, new or known."""
    known = session.scalar(select(Scan.id).where(Scan.sha256 == sha256))
    return known or builders.make_scan(session, sha256=sha256).id


def predicted(
    resources: Resources,
    model: ModelVersion,
    files: Sequence[bytes],
    kind: JobKind = JobKind.PREDICT_BATCH,
    **params: Any,
) -> list[ScanResult]:
    """The results of a job with these files, in their order."""
    with resources.sessions.begin() as session:
        scans = [NewResult(stored(session, resources.artifacts.put(io.BytesIO(content)).sha256)) for content in files]
        new = NewJob(
            TENANT, kind, builders.LANES[kind], model_id=model.id, model_version=model.version,
            params={"precision": "fp32", **params},
        )  # fmt: skip
        job = submit(session, new, scans, 100)
        held = UnitLease(builders.claim(session, builders.units_of(session, job)[0]), resources)
    predict_chunk(held)
    with resources.sessions.begin() as session:
        session.expire_on_commit = False
        rows = select(ScanResult).where(ScanResult.job_id == job.id).order_by(ScanResult.ordinal)
        return list(session.scalars(rows))


@pytest.mark.usefixtures("sessions")
def test_blank_and_foreign_scans_of_a_batch_are_rejected_with_the_reason(resources: Resources, tmp_path: Path) -> None:
    model = version_of(resources, tmp_path, {"origins": LEARNT})
    for cached in (False, True):
        found = dict(zip(SCANS, predicted(resources, model, list(SCANS.values())), strict=True))
        assert {name: row.reason for name, row in found.items() if row.disposition == "rejected"} == REASONS
        assert {row.cached for row in found.values()} == {cached}
        assert all(row.label in CLASSES for row in found.values()), "what the network says is kept"


@pytest.mark.usefixtures("sessions")
@pytest.mark.parametrize("name", REASONS)
def test_a_single_scan_is_rejected_and_yet_explained(resources: Resources, tmp_path: Path, name: str) -> None:
    model = version_of(resources, tmp_path, {"origins": LEARNT})
    (row,) = predicted(resources, model, [SCANS[name]], JobKind.PREDICT, explain=True)
    assert (row.disposition, row.reason, row.output) == ("rejected", REASONS[name], {"unsuitable": REASONS[name]})
    with resources.sessions.begin() as session:
        names = session.scalars(select(Artifact.name).where(Artifact.job_id == row.job_id)).all()
    assert any(name.endswith(".png") for name in names)


@pytest.mark.usefixtures("sessions")
def test_a_version_that_does_not_say_what_it_has_learnt_from_rejects_only_what_is_blank(
    resources: Resources, tmp_path: Path
) -> None:
    rows = predicted(resources, version_of(resources, tmp_path, {}), list(SCANS.values()))
    assert [name for name, row in zip(SCANS, rows, strict=True) if row.disposition == "rejected"] == ["blank"]


@pytest.mark.usefixtures("sessions")
@pytest.mark.parametrize("rules", [1, 2])
def test_a_version_is_served_by_the_pixel_rules_that_it_learnt_with(
    resources: Resources, tmp_path: Path, rules: int
) -> None:
    """MR with a hot pixel and without a window: the first rules squeeze all else into the darkest levels."""
    stored = np.clip(VALUES, 20, 220)
    stored[0, 0] = 30_000
    levels = np.clip(VALUES, 20, 220).astype(float)
    levels[0, 0] = 30_000
    low, high = (levels.min(), levels.max()) if rules == 1 else np.percentile(levels, [0.5, 99.5])
    drawn = np.rint(np.clip((levels - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    picture = io.BytesIO()
    Image.fromarray(drawn).save(picture, "PNG")
    model = version_of(resources, tmp_path, {}, rules)
    dicom, png = predicted(resources, model, [raw_dicom(stored, Modality="MR"), picture.getvalue()])
    assert dicom.probabilities == pytest.approx(png.probabilities, abs=1e-3)
    other = version_of(resources, tmp_path, {}, 3 - rules)
    (elsewhere,) = predicted(resources, other, [raw_dicom(stored, Modality="MR")])
    assert elsewhere.probabilities != pytest.approx(png.probabilities, abs=1e-2)
