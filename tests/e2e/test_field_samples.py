"""What other people's trouble is made of (shared/data/field, not part of the project), by REST alone.

`pytest -s` prints the table of scans.
"""

from pathlib import Path
from typing import Any

import pytest

from ml.synthetic import phantom_files
from tests.e2e.conftest import PARAMS, Client
from tests.field import FIELD, ZIPS

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not FIELD.exists(), reason="shared/data/field is not beside the project"),
]
PICTURES = {path.name.removesuffix(".expected.png"): path for path in sorted(FIELD.glob("scans/*.expected.png"))}
SAMPLES = {path.stem: path for path in sorted(FIELD.glob("scans/*")) if ".expected." not in path.name}
REFUSED = {
    "htj2k-label-no-decoder-here-what-the-error-says": "transfer syntax 1.2.840.10008.1.2.4.201",
    "photometricinterpretation-missing": "lacks PhotometricInterpretation",
}
FRAMES = {"enhanced-ct-shared": 3, "enhanced-ct-shared-no-window": 3}
"""Of the files with several, by their NumberOfFrames."""
LIMIT = 0.01
"""Between the probabilities of a file and those of the picture that it shows."""
LOSSY = ("jfif-labelled-rgb", "jpeg-exif-orientation-6")
"""The pictures of these are as they were before they were compressed."""

Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def rows(client: Client, trained: dict[str, Any]) -> Rows:
    """Results of all scans and pictures in fp32, by the names of the files."""
    return predicted(client, trained)


@pytest.fixture(scope="module")
def unsure_rows(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The same of a network that is sure of nothing: five grey levels more change a probability by 0.09."""
    made = tmp_path_factory.mktemp("few") / "few.zip"
    phantom_files.write_zip(made, patients=24, slices=1, seed=3, size=128)
    return predicted(client, trained_on(client, uploaded(client, made), learning_rate=0.0003))


def predicted(client: Client, training: dict[str, Any]) -> Rows:
    """What the training's network says of all files."""
    paths = [*SAMPLES.values(), *PICTURES.values()]
    files = [("files", (path.name, path.read_bytes())) for path in paths]
    form = {"precision": "fp32", "model": training["model_version"]}
    answer = client.post("/jobs/predict/batch", files=files, data=form)
    assert answer.status_code == 202, answer.text
    job = client.ended(answer.json())
    found = client.get(job["links"]["results"], params={"limit": 100}).json()["data"]
    of_files = {path.name: [row for row in found if row["name"] == path.name] for path in paths}
    assert sum(map(len, of_files.values())) == len(found) < 100
    for path in paths:
        frames = [row.get("frame") for row in of_files[path.name]]
        assert frames == (list(range(FRAMES[path.stem])) if path.stem in FRAMES else [None]), path.name
    # Of several frames each has a result; the picture beside the file shows the middle one.
    return {name: some[len(some) // 2] for name, some in of_files.items()}


def tumor_pair(rows: Rows, name: str) -> tuple[float, float]:
    """Probabilities of the file and of its picture."""
    scan, picture = rows[SAMPLES[name].name], rows[PICTURES[name].name]
    assert scan["state"] == "succeeded", scan
    return scan["probabilities"]["Tumor"], picture["probabilities"]["Tumor"]


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in REFUSED])
def test_a_scan_is_predicted_as_the_picture_that_it_shows(rows: Rows, unsure_rows: Rows, name: str) -> None:
    pairs = [tumor_pair(rows, name), tumor_pair(unsure_rows, name)]
    print(f"{name:<52}", *(f"{found:.4f} {expected:.4f}  " for found, expected in pairs))
    for found, expected in pairs[:1] if name in LOSSY else pairs:
        assert found == pytest.approx(expected, abs=LIMIT)


def test_the_unsure_network_can_tell_pictures_apart(unsure_rows: Rows) -> None:
    found = [tumor_pair(unsure_rows, name)[1] for name in SAMPLES if name not in REFUSED]
    assert max(found) - min(found) > 0.2
    assert 0.05 < min(found) < max(found) < 0.95


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_is_refused_with_the_cause(rows: Rows, name: str) -> None:
    error = rows[SAMPLES[name].name]["error"]
    assert error["code"] == "BAD_IMAGE"
    assert REFUSED[name] in error["detail"]


@pytest.mark.parametrize(("name", "classes", "warning"), ZIPS)
def test_a_zip_holds_the_right_classes(client: Client, name: str, classes: dict[str, int], warning: str) -> None:
    dataset = uploaded(client, FIELD / "zips" / f"{name}.zip")
    assert (dataset["state"], dataset["classes"], dataset["problems"]) == ("ready", classes, [])
    assert any(warning in one for one in dataset["warnings"])
    answer = client.post("/jobs/predict/batch", json={"dataset_id": dataset["id"]})
    job = client.ended(answer.json())
    assert (job["state"], job["counts"]["succeeded"]) == ("succeeded", sum(classes.values())), "as many as a batch"


def test_folders_of_a_split_can_be_kept(client: Client) -> None:
    dataset = uploaded(client, FIELD / "zips" / "train-test-folders.zip")
    job = trained_on(client, dataset, split="folders")
    assert job["metrics"]["counts"] == {"train": 20, "validation": 6, "test": 6}


def trained_on(client: Client, dataset: dict[str, Any], **params: Any) -> dict[str, Any]:
    """A short training of a small network."""
    short = {**PARAMS, "network": "resnet18", "image_size": [64, 64, 3], "epochs": 1, **params}
    order = {"dataset_id": dataset["id"], "params": short, "promote": "never"}
    job = client.ended(client.post("/jobs/train", json=order).json())
    assert job["state"] == "succeeded", job["error"]
    return job


def uploaded(client: Client, path: Path) -> dict[str, Any]:
    """The dataset of this zip, checked."""
    with path.open("rb") as file:
        dataset = client.post("/datasets", files={"file": (path.name, file)}).json()
    client.ended(client.get(f"/jobs/{dataset['job_id']}").json())
    checked: dict[str, Any] = client.get(f"/datasets/{dataset['id']}").json()
    return checked
