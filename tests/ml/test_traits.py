"""Traits of scans: what DICOM and patients.csv say, without telling who anybody is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset

from ml.image.dataset.scan import ScanFile
from ml.image.dataset.scans import check_dataset, load_manifest, save_manifest
from ml.image.dataset.traits import age_band, listed_traits, read_traits, subgroup_values
from ml.image.pixels.dicom import open_dataset
from tests.ml.builders import make_dicom

PIXELS = np.arange(64 * 64, dtype=np.int16).reshape(64, 64) % 251


def thick(mm: str) -> list[Dataset]:
    """Functional groups of one frame, which say how thick its slice is."""
    measures, group = Dataset(), Dataset()
    measures.SliceThickness = mm
    group.PixelMeasuresSequence = [measures]
    return [group]


@pytest.mark.parametrize(
    ("tags", "traits"),
    [
        ({}, {}),
        (
            {"Manufacturer": "SIEMENS", "ManufacturerModelName": "Somatom Force"},
            {"scanner": "SIEMENS Somatom Force"},
        ),
        ({"Manufacturer": "Philips", "ManufacturerModelName": "Philips iCT"}, {"scanner": "Philips iCT"}),
        ({"Manufacturer": " ", "ManufacturerModelName": ""}, {}),
        ({"PatientSex": "F", "PatientAge": "045Y"}, {"sex": "F", "age": "40 to 59"}),
        ({"PatientSex": "?", "PatientAge": "45 years"}, {}),
        ({"PatientAge": "011M"}, {"age": "under 18"}),
        ({"PatientAge": "102Y"}, {"age": "80 and older"}),
        ({"SliceThickness": "1.5"}, {"slice thickness": "up to 1.5 mm"}),
        ({"SliceThickness": "2.999"}, {"slice thickness": "over 1.5 to 3 mm"}),
        ({"SliceThickness": "7"}, {"slice thickness": "over 5 mm"}),
        ({"SliceThickness": "0"}, {}),
        ({"PerFrameFunctionalGroupsSequence": thick("2.0")}, {"slice thickness": "over 1.5 to 3 mm"}),
        ({"SharedFunctionalGroupsSequence": thick("5")}, {"slice thickness": "over 3 to 5 mm"}),
        (
            {"PerFrameFunctionalGroupsSequence": thick("1"), "SharedFunctionalGroupsSequence": thick("5")},
            {"slice thickness": "up to 1.5 mm"},
        ),
    ],
)
def test_a_header_tells_scanner_sex_age_and_thickness(tags: dict[str, Any], traits: dict[str, str]) -> None:
    assert read_traits(open_dataset(make_dicom(PIXELS, **tags), header_only=True)) == traits


def test_a_site_is_a_pseudonym() -> None:
    by_name = [
        read_traits(open_dataset(make_dicom(PIXELS, **tags), header_only=True))["site"]
        for tags in (
            {"InstitutionName": "St. Mary's", "StationName": "CT1"},
            {"InstitutionName": "St. Mary's", "StationName": "CT2"},
            {"StationName": "CT1"},
        )
    ]
    assert by_name[0] == by_name[1] != by_name[2]
    assert "Mary" not in str(by_name)


@pytest.mark.parametrize(
    ("years", "band"), [(0, "under 18"), (17.9, "under 18"), (18, "18 to 39"), (59, "40 to 59"), (80, "80 and older")]
)
def test_bands_of_age(years: float, band: str) -> None:
    assert age_band(years) == band


def test_columns_of_the_list_are_traits() -> None:
    cells = {"age": "61", "sex": "female", "slice_thickness": "3,0", "stage": " pT1a ", "note": ""}
    assert listed_traits(cells) == {
        "age": "60 to 79",
        "sex": "F",
        "slice thickness": "over 1.5 to 3 mm",
        "stage": "pT1a",
    }


def scan_of(patient: int, **traits: str) -> ScanFile:
    return ScanFile(f"{patient}.png", "Normal", f"sha {patient}", f"patient {patient}", traits=traits)


def test_what_few_patients_share_is_not_told() -> None:
    """A column may hold names, however few patients there are; scanners tell nobody."""
    scans = [scan_of(n, name=f"Jane Doe {n}", stage="pT1" if n < 6 else f"pT{n}", scanner=f"CT {n}") for n in range(9)]
    told = subgroup_values([*scans, *(scan_of(9, scanner="CT 0") for _ in range(5))])
    assert [one["stage"] for one in told] == ["pT1"] * 6 + ["other values"] * 3 + ["not known"] * 5
    assert told[0] == {"stage": "pT1", "scanner": "CT 0"}
    assert "Jane" not in str(told)


def test_a_column_of_numbers_is_cut_in_thirds() -> None:
    told = [one["creatinine"] for one in subgroup_values([scan_of(n, creatinine=str(n / 10)) for n in range(30)])]
    assert sorted({value: told.count(value) for value in told}.values()) == [10, 10, 10]
    assert (told[0], told[15]) == ("up to 0.966667", "over 0.966667 to 1.93333")


def test_of_many_values_the_most_frequent_are_told() -> None:
    scans = [scan_of(n, scanner=f"CT {n % 20 if n < 100 else 0}") for n in range(120)]
    told = {one["scanner"] for one in subgroup_values(scans)}
    assert len(told) == 13
    assert {"CT 0", "other values"} <= told


def test_traits_of_files_and_of_the_list_reach_the_manifest(tmp_path: Path) -> None:
    folder, rows = tmp_path / "scans", ["path,patient,stage,sex"]
    for number in range(12):
        label = ("Normal", "Tumor")[number % 2]
        (folder / label).mkdir(parents=True, exist_ok=True)
        pixels = (PIXELS + 13 * number) % 199
        content = make_dicom(pixels.astype(np.int16), PatientSex="M", PatientAge="050Y", PatientID=f"ID{number}")
        (folder / label / f"{number}.dcm").write_bytes(content)
        rows.append(f"{label}/{number}.dcm,P{number},pT{number % 2},{'F' if number == 0 else ''}")
    (folder / "patients.csv").write_text("\n".join(rows))
    report = check_dataset(folder)
    assert report.problems == ()
    by_path = {scan.path: scan.traits for scan in report.scans}
    assert by_path["Normal/0.dcm"] == {"sex": "F", "age": "40 to 59", "stage": "pT0"}
    assert by_path["Tumor/1.dcm"] == {"sex": "M", "age": "40 to 59", "stage": "pT1"}
    save_manifest(report, tmp_path / "manifest.json")
    assert load_manifest(tmp_path / "manifest.json") == report
