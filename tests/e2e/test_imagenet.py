"""`weights: imagenet` for real: fetched as an operator does, trained, promoted, predicted, all by REST."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest

from ml.synthetic import phantom_files
from ml.synthetic.phantom import generate
from tests.e2e.conftest import Client
from tests.whole_stack import RunningStack

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
TASK = "imagenet"
PARAMS = {
    "weights": "imagenet", "epochs": 15, "augmentation": False, "image_size": [128, 128, 3],
}  # fmt: skip
REPORT_SECONDS = 60


@pytest.fixture(scope="module")
def dataset(client: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Synthetic CT, checked."""
    archive = tmp_path_factory.mktemp("data") / "phantom.zip"
    phantom_files.write_zip(archive, patients=240, slices=2, seed=11)
    with archive.open("rb") as file:
        made: dict[str, Any] = client.post("/datasets", files={"file": (archive.name, file)}).json()
    client.ended(client.get(f"/jobs/{made['job_id']}").json())
    return made


@pytest.fixture(scope="module")
def weights(whole_stack: RunningStack) -> Path:
    """ImageNet's VGG16 in the stack's folder of weights."""
    done = whole_stack.renalq("weights", "fetch", "vgg16")
    if done.returncode != 0:
        pytest.skip(f"ImageNet's weights cannot be had here: {done.stderr}")
    return Path(done.stdout.strip().rpartition(": ")[2])


def submitted(client: Client, dataset: dict[str, Any]) -> dict[str, Any]:
    """A training from ImageNet's weights, once the worker has reported them."""
    body, deadline = {"dataset_id": dataset["id"], "params": PARAMS, "task": TASK}, time.monotonic() + REPORT_SECONDS
    while (answer := client.post("/jobs/train", json=body)).status_code == 422 and time.monotonic() < deadline:
        assert answer.json()["code"] == "WEIGHTS_MISSING", answer.text
        time.sleep(1)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def test_a_training_from_imagenets_weights_is_promoted_and_predicts(
    client: Client, dataset: dict[str, Any], weights: Path
) -> None:
    job = client.ended(submitted(client, dataset))
    assert job["state"] == "succeeded", job["error"]
    model = client.get(f"/models/{job['model_version']}").json()
    assert (model["champion"], model["task"], model["params"]["weights"]) == (True, TASK, "imagenet"), model["gate"]
    assert model["metrics"]["f1"] >= 0.85

    scans = list(generate(patients=12, slices=3, seed=99))
    files = [("files", (scan.name, io.BytesIO(phantom_files.png_bytes(scan)))) for scan in scans]
    batch = client.ended(client.post("/jobs/predict/batch", files=files, data={"task": TASK}).json())
    assert (batch["state"], batch["model_version"]) == ("succeeded", job["model_version"]), batch["error"]
    found = {one["name"]: one["label"] for one in client.get(batch["links"]["results"]).json()["data"]}
    right = sum(found[scan.name] == scan.label for scan in scans)
    assert right >= 0.75 * len(scans), f"{right} of {len(scans)} new scans"


def test_weights_that_nobody_has_are_refused_at_once(client: Client, dataset: dict[str, Any]) -> None:
    params = {**PARAMS, "weights": "file:nobody-has-this.pth"}
    began = time.monotonic()
    answer = client.post("/jobs/train", json={"dataset_id": dataset["id"], "params": params})
    assert (answer.status_code, answer.json()["code"]) == (422, "WEIGHTS_MISSING")
    assert time.monotonic() - began < 5
