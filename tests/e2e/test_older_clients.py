"""A client that was written from the oldest document alone, and knows nothing but its base URL."""

import base64
import io
from typing import Any

import pytest
import requests
from PIL import Image

from ml.synthetic.phantom import generate
from ml.synthetic.phantom_files import png_bytes
from tests.e2e.conftest import Client

pytestmark = [pytest.mark.slow, pytest.mark.scaled, pytest.mark.timeout(900)]


class OlderClient:
    """What the document's section "API Design" tells: paths, JSON bodies, JSON answers."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def predict(self, image: str) -> Any:
        """POST /predict."""
        return requests.post(self.base_url + "/predict", json={"image": image}, timeout=90).json()

    def model_status(self) -> Any:
        """GET /model-status."""
        return requests.get(self.base_url + "/model-status", timeout=30).json()

    def train(self) -> requests.Response:
        """POST /train: no body."""
        return requests.post(self.base_url + "/train", timeout=30)


@pytest.fixture
def base(client: Client) -> str:
    """The base URL with the key in it: all that an operator configures."""
    return client.url.replace("http://", f"http://:{client.key}@")


@pytest.fixture(scope="module")
def scans() -> list[str]:
    """Synthetic slices in base64."""
    return [base64.b64encode(png_bytes(image)).decode() for image in generate(patients=3, slices=1, seed=5)]


def test_it_predicts_as_the_document_says(base: str, trained: dict[str, Any], scans: list[str]) -> None:
    (found,) = OlderClient(base).predict(scans[0])
    assert set(found) == {"image", "confidence"}
    assert found["image"] in ("Normal", "Tumor")
    assert 0 <= found["confidence"] <= 1


def test_it_asks_for_the_model(base: str, trained: dict[str, Any]) -> None:
    told = OlderClient(base).model_status()
    assert told["status"] == "ready"
    weights = requests.get(base + told["model_path"], stream=True, timeout=30)
    assert weights.status_code == 200
    weights.close()


def test_it_triggers_a_training(base: str, client: Client, trained: dict[str, Any]) -> None:
    answer = OlderClient(base).train()
    if answer.status_code == 422:  # the default weights are not on every machine
        assert (answer.json()["code"], "renalq weights fetch" in answer.text) == ("WEIGHTS_MISSING", True)
        return
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert job["kind"] == "train"
    assert client.post(job["links"]["cancel"]).status_code == 202


def test_many_images_and_a_heatmap(base: str, trained: dict[str, Any], scans: list[str]) -> None:
    answer = requests.post(base + "/batch_predict", json={"images": scans}, timeout=90)
    found = answer.json()
    assert len(answer.headers["Renalq-Disposition"].split(",")) == len(scans)
    alone = [OlderClient(base).predict(scan)[0] for scan in scans]
    assert [one["image"] for one in found] == [one["image"] for one in alone]
    overlay = requests.post(base + "/explain", json={"image": f"data:image/png;base64,{scans[0]}"}, timeout=90)
    assert overlay.headers["Content-Type"] == "image/png"
    with Image.open(io.BytesIO(overlay.content)) as picture:
        assert picture.size == (512, 512)


def test_a_broken_image_says_which(base: str, trained: dict[str, Any], scans: list[str]) -> None:
    images = [*scans, base64.b64encode(b"broken").decode()]
    answer = requests.post(base + "/batch_predict", json={"images": images}, timeout=90)
    assert answer.status_code == 422
    assert [error["pointer"] for error in answer.json()["errors"]] == ["/images/3"]


def test_health_names_the_model(base: str, client: Client, trained: dict[str, Any]) -> None:
    told = requests.get(base + "/health", timeout=30).json()
    assert told["status"] == "healthy"
    assert told["model"]["classes"] == ["Normal", "Tumor"]
    assert requests.get(client.url + "/health", timeout=30).json()["model"] is None
