"""A hospital's studies by REST alone: slices in mixed order, multi-frame objects and volumes are answered alike."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from ml.runtime.pseudonyms import pseudonym
from ml.synthetic import phantom_files
from tests.depth import rest_in_full
from tests.e2e.conftest import PARAMS, Client
from tests.study_files import Study, make_studies

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SIZE = 64
NDJSON = {"Accept": "application/x-ndjson"}
NUMBERS = rest_in_full([(3, 4), (12, 20)], lambda one: one == (3, 4))
"""Studies, and slices of each."""


@pytest.fixture(scope="module")
def of_ct(client: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training on DICOM files of CT."""
    made = tmp_path_factory.mktemp("ct") / "ct.zip"
    phantom_files.write_zip(made, patients=24, slices=1, seed=3, size=SIZE, format="dicom")
    with made.open("rb") as file:
        dataset = client.post("/datasets", files={"file": (made.name, file)}).json()
    client.ended(client.get(f"/jobs/{dataset['job_id']}").json())
    params = {**PARAMS, "network": "resnet18", "image_size": [SIZE, SIZE, 3], "epochs": 1}
    order = {"dataset_id": dataset["id"], "params": params, "promote": "never"}
    job = client.ended(client.post("/jobs/train", json=order).json())
    assert job["state"] == "succeeded", job["error"]
    return job


def zipped(files: list[tuple[str, bytes]]) -> bytes:
    """A zip of these files, in this order."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return packed.getvalue()


def predicted(client: Client, model: str, files: list[tuple[str, bytes]]) -> dict[str, Any]:
    """The job of a zip of these files, at its end."""
    form = {"model": model, "precision": "fp32"}
    answer = client.post("/jobs/predict/batch", files={"files": ("a.zip", zipped(files))}, data=form)
    assert answer.status_code == 202, answer.text
    job = client.ended(answer.json())
    assert job["state"] == "succeeded", job["error"]
    return job


def lines(answer: requests.Response) -> list[dict[str, Any]]:
    """Of NDJSON."""
    return [json.loads(line) for line in answer.text.splitlines() if line]


def answered(client: Client, job: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The job's studies, and its results in their order."""
    found = lines(client.get(job["links"]["studies"], headers=NDJSON))
    assert client.get(job["links"]["studies"]).json()["data"] == found
    return found, lines(client.get(job["links"]["results"], headers=NDJSON))


def mixed(number: int) -> list[int]:
    """An order in which nothing is where it belongs."""
    return np.random.default_rng(7).permutation(number).tolist()


def in_mixed_order(made: list[Study], slices: int) -> list[tuple[str, bytes]]:
    """A file for each slice, all studies' among each other."""
    files = [one.slices() for one in made]
    order = [divmod(number, slices) for number in mixed(len(made) * slices)]
    return [(f"{place:04}.dcm", files[study][number]) for place, (study, number) in enumerate(order)]


def as_objects(made: list[Study], slices: int) -> list[tuple[str, bytes]]:
    """One multi-frame object for each study."""
    return [(f"{number}.dcm", one.multi_frame(mixed(slices))) for number, one in enumerate(made)]


def as_volumes(made: list[Study], slices: int) -> list[tuple[str, bytes]]:
    """One NIfTI volume for each study."""
    return [(f"{number}.nii", one.volume()) for number, one in enumerate(made)]


@pytest.mark.parametrize(("number", "slices"), NUMBERS)
def test_studies_are_answered_alike_whatever_files_they_come_in(
    client: Client, of_ct: dict[str, Any], number: int, slices: int
) -> None:
    made, model = make_studies(number, slices, SIZE), of_ct["model_version"]
    found, rows = answered(client, predicted(client, model, in_mixed_order(made, slices)))
    assert len(found) == number
    by_uid = {one["study_uid"]: one for one in found}
    reference = []
    for study in made:
        datasets = study.datasets
        one = by_uid[datasets[0].StudyInstanceUID]
        assert (one["slices"], one["accession"]) == (slices, datasets[0].AccessionNumber)
        assert one["patient"] == pseudonym(datasets[0].PatientID)
        assert one["series_uids"] == [datasets[0].SeriesInstanceUID]
        in_order = [rows[ordinal] for ordinal in one["ordinals"]]
        assert [row["sop_uid"] for row in in_order] == [dataset.SOPInstanceUID for dataset in reversed(datasets)]
        assert [row["position_mm"] for row in in_order] == sorted(row["position_mm"] for row in in_order)
        assert (one["disposition"] == "rejected") >= (study.modality == "MR")
        reference.append([row["probabilities"]["Tumor"] for row in in_order])
    foreign = by_uid[made[-1].datasets[0].StudyInstanceUID]
    assert (foreign["disposition"], foreign["used"], foreign["rejected"]) == ("rejected", 0, slices)
    assert "its modality is MR" in foreign["reason"]

    for form in (as_objects, as_volumes):
        same, rows = answered(client, predicted(client, model, form(made, slices)))
        assert [one["slices"] for one in same] == [slices] * number
        assert same[-1]["disposition"] == "rejected"
        found_again = [[rows[ordinal]["probabilities"]["Tumor"] for ordinal in one["ordinals"]] for one in same]
        assert np.abs(np.array(found_again) - reference).max() < 1e-6, form.__name__


def test_a_study_is_found_again_and_told_to_a_spreadsheet(client: Client, of_ct: dict[str, Any]) -> None:
    made = make_studies(2, 3, SIZE, seed=90)
    job = predicted(client, of_ct["model_version"], in_mixed_order(made, 3))
    uid = made[0].datasets[0].StudyInstanceUID
    (found,) = client.get(f"/studies/{uid}").json()["data"]
    assert found["job_id"] == job["id"]
    table = client.get(job["links"]["studies"], headers={"Accept": "text/csv"}).text.splitlines()
    assert len(table) == 3
    assert any(line.startswith(uid) for line in table)


def test_the_evaluation_has_figures_by_patient(client: Client, of_ct: dict[str, Any]) -> None:
    metrics = of_ct["metrics"]
    assert metrics["by_patient"]["patients"] == metrics["independent"]
    assert metrics["by_patient"]["pooling"] == metrics["pooling"]


def test_no_log_of_the_stack_names_a_patient(client: Client, of_ct: dict[str, Any]) -> None:
    """Every log of every process, after studies in all forms have passed."""
    made = make_studies(2, 3, SIZE, seed=95)
    predicted(client, of_ct["model_version"], in_mixed_order(made, 3) + as_objects(made, 3))
    datasets = [study.datasets[0] for study in made]
    secrets = [str(value) for one in datasets for value in (one.PatientID, one.StudyInstanceUID, one.AccessionNumber)]
    for uid in (one.StudyInstanceUID for one in datasets):
        client.get(f"/studies/{uid}")
    logs = [path for path in Path(client.home).rglob("*.log") if path.is_file()]
    assert logs
    for path in logs:
        text = path.read_text(errors="replace")
        assert [secret for secret in secrets if secret in text] == [], path.name
