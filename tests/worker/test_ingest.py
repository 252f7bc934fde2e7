"""What the check of an upload leaves in the dataset's row."""

import json
from pathlib import Path

from ml.image.dataset.scans import DatasetReport, check_dataset
from tests.api.conftest import png
from worker.handlers.ingest import as_json


def test_inspection_and_warnings_are_kept_as_json(tmp_path: Path) -> None:
    for number in range(10):
        path = tmp_path / ("Normal" if number % 2 else "Tumor") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(16, 16, shade=number))
    kept = json.loads(json.dumps(as_json(check_dataset(tmp_path))))
    assert kept["inspection"]["tiny"] == 10
    assert any("32 pixels" in warning for warning in kept["warnings"])
    assert str(tmp_path) not in json.dumps(kept)


def test_a_zip_that_could_not_be_unpacked_has_no_warnings() -> None:
    assert as_json(DatasetReport({}, 0, "", ("This is no zip.",)))["warnings"] == []
