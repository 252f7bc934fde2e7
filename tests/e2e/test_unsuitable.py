"""A network that has learnt from CT, asked by REST about what it has not learnt from."""

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.data import get_testdata_file

from ml.synthetic import phantom_files
from ml.synthetic.phantom import generate
from tests.e2e.conftest import PARAMS, Client

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def of_ct(client: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training on DICOM files of CT."""
    made = tmp_path_factory.mktemp("ct") / "ct.zip"
    phantom_files.write_zip(made, patients=24, slices=1, seed=3, size=128, format="dicom")
    with made.open("rb") as file:
        dataset = client.post("/datasets", files={"file": (made.name, file)}).json()
    client.ended(client.get(f"/jobs/{dataset['job_id']}").json())
    params = {**PARAMS, "network": "resnet18", "image_size": [64, 64, 3], "epochs": 1}
    order = {"dataset_id": dataset["id"], "params": params, "promote": "never"}
    job = client.ended(client.post("/jobs/train", json=order).json())
    assert job["state"] == "succeeded", job["error"]
    return job


def slices() -> dict[str, bytes]:
    """A CT that the network has not seen, an empty one, and files of pydicom's."""
    (seen,) = generate(patients=1, slices=1, seed=99, size=128)
    empty = replace(seen, hu=np.full_like(seen.hu, -1000))
    others = {"mr.dcm": "MR_small.dcm", "us.dcm": "examples_rgb_color.dcm"}
    files = {name: Path(str(get_testdata_file(source))).read_bytes() for name, source in others.items()}
    return {"ct.dcm": phantom_files.dicom_bytes(seen), "blank.dcm": phantom_files.dicom_bytes(empty), **files}


EXPECTED = {"blank.dcm": "The scan is blank", "mr.dcm": "its modality is MR", "us.dcm": "its modality is US"}


def test_what_it_has_not_learnt_from_is_rejected_with_the_reason(client: Client, of_ct: dict[str, Any]) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in slices().items():
            archive.writestr(name, content)
    form = {"model": of_ct["model_version"], "explain": "true"}
    answer = client.post("/jobs/predict/batch", files={"files": ("a.zip", packed.getvalue())}, data=form)
    assert answer.status_code == 202, answer.text
    job = client.ended(answer.json())
    assert job["state"] == "succeeded", job["error"]
    found = {row["name"]: row for row in client.get(job["links"]["results"]).json()["data"]}
    for name, reason in EXPECTED.items():
        assert (found[name]["disposition"], reason in found[name]["reason"]) == ("rejected", True), found[name]
    assert not any(reason in str(found["ct.dcm"]["reason"]) for reason in EXPECTED.values())


def test_its_card_says_what_it_has_learnt_from(client: Client, of_ct: dict[str, Any]) -> None:
    card = client.get(f"/models/{of_ct['model_version']}/card").text
    assert "It has learnt from CT: DICOM of other modalities is rejected." in card
