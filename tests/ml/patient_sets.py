"""Ways in which datasets tell the patients of their scans, or do not.

Each takes the numbers of patient and slice and int16 values [height, width], and gives the path below the class folder
and the file.
"""

from __future__ import annotations

import numpy as np

from tests.ml.builders import encode, make_dicom


def shown(values: np.ndarray) -> bytes:
    """Values from -256 to 255 as a PNG."""
    return encode((values // 2 + 128).astype(np.uint8))


def names_of_slices(patient: int, index: int, values: np.ndarray) -> tuple[str, bytes]:
    """(a) names that count slices, and right PatientIDs."""
    content = make_dicom(values, PatientID=f"UKE{1000 + patient}")
    return f"{patient:02}IM_p{index + 1}.dcm", content


def anonymous_studies(patient: int, index: int, values: np.ndarray) -> tuple[str, bytes]:
    """(b) PatientID is a placeholder; the studies have their own UIDs."""
    study = f"1.2.826.0.1.3680043.8.498.{9000 + patient}"
    content = make_dicom(values, PatientID="ANONYMOUS", StudyInstanceUID=study)
    return f"s{patient:02}{index}_p{index + 1}.dcm", content


def folders_alone(patient: int, index: int, values: np.ndarray) -> tuple[str, bytes]:
    """(c) pictures in a folder for each patient, with names that count slices."""
    return f"{patient + 1:02}/IM_p{index + 1}.png", shown(values)


def series_only(patient: int, index: int, values: np.ndarray) -> tuple[str, bytes]:
    """PatientID is empty, and only the series has a UID; names count slices with a word for patients."""
    series = f"1.2.826.0.1.3680043.8.498.{7000 + patient}"
    content = make_dicom(values, PatientID="", SeriesInstanceUID=series)
    return f"{patient:02}-{index} case_{index + 1}.dcm", content


def one_identity(patient: int, index: int, values: np.ndarray) -> tuple[str, bytes]:
    """PatientID is the name of the project."""
    study = f"1.2.826.0.1.3680043.8.498.{6000 + patient}"
    content = make_dicom(values, PatientID="KIDNEY-2026", StudyInstanceUID=study)
    return f"{patient:02}{index}.dcm", content


def numbered_volumes(patient: int, index: int, values: np.ndarray) -> tuple[str, bytes]:
    """Names as in LiTS."""
    return f"volume-{patient}_slice-{index}.png", shown(values)


def series_in_folders(patient: int, index: int, values: np.ndarray) -> tuple[str, bytes]:
    """A folder for each patient, and in it one for each series."""
    name = f"export/{1000 + patient}/T{index % 2 + 1}/IM{index:04}.png"
    return name, shown(values)


def identity_of_each_file(patient: int, index: int, values: np.ndarray) -> tuple[str, bytes]:
    """PatientID was made anew for each file; the studies are right."""
    study = f"1.2.826.0.1.3680043.8.498.{5000 + patient}"
    content = make_dicom(values, PatientID=f"{patient}{index}X", StudyInstanceUID=study)
    return f"{patient:02}{index}.dcm", content


def unknown(patient: int, index: int, values: np.ndarray) -> tuple[str, bytes]:
    """Nothing tells the patients."""
    return f"{patient}_p{index + 1}.png", shown(values)


KINDS = [
    identity_of_each_file,
    names_of_slices, anonymous_studies, folders_alone, series_only, one_identity, numbered_volumes, series_in_folders
]  # fmt: skip
