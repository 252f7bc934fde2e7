"""What the check of an upload leaves in the dataset's row."""

import json
import zipfile
from pathlib import Path

from ml.pipelines import DatasetCheck, pipeline_of
from tests.api.conftest import png
from worker.handlers.ingest import as_json


def test_inspection_and_warnings_are_kept_as_json(tmp_path: Path) -> None:
    archive = tmp_path / "scans.zip"
    with zipfile.ZipFile(archive, "w") as scans:
        for number in range(10):
            scans.writestr(f"{'Normal' if number % 2 else 'Tumor'}/{number}.png", png(16, 16, shade=number))
    checked = pipeline_of("image").check(archive, tmp_path / "unpacked", lambda fraction: None)
    kept = json.loads(json.dumps(as_json(checked)))
    assert kept["inspection"]["tiny"] == 10
    assert any("32 pixels" in warning for warning in kept["warnings"])
    assert str(tmp_path) not in json.dumps(kept)


def test_a_zip_that_could_not_be_unpacked_has_a_problem_and_no_warnings(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"no zip")
    checked = pipeline_of("image").check(tmp_path / "no.zip", tmp_path / "unpacked", lambda fraction: None)
    assert isinstance(checked, DatasetCheck)
    assert checked.problems
    assert as_json(checked)["warnings"] == []


def test_a_damaged_zip_makes_the_dataset_invalid_and_names_the_file(tmp_path: Path) -> None:
    archive = tmp_path / "scans.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as scans:
        scans.writestr("Normal/1.png", b"0123456789" * 9)
    archive.write_bytes(archive.read_bytes().replace(b"0123456789", b"0123x56789", 1))
    checked = pipeline_of("image").check(archive, tmp_path / "unpacked", lambda fraction: None)
    assert "'Normal/1.png' cannot be unpacked: the zip is damaged (wrong checksum)" in checked.problems[0]
