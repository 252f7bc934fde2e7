"""Whose slice it is and where it lies: by the standard's own sum, and never by what is broken or a placeholder."""

from __future__ import annotations

import numpy as np
import pytest

from ml.image.pixels.decoding import read
from ml.image.pixels.picture import Identity
from ml.image.serving.predictor import _told
from ml.runtime.errors import ImageError
from tests.ml.raw_dicom import ENHANCED_CT, EXPLICIT, IMPLICIT, raw_dicom

VALUES = np.arange(64, dtype=np.int16).reshape(8, 8)
WHO = {
    "StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.1", "SOPInstanceUID": "1.2.3.1.7", "InstanceNumber": "7",
    "AccessionNumber": "ACC1", "PatientID": "P-9",
}  # fmt: skip
AXIAL = "1\\0\\0\\0\\1\\0"


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_the_identity_is_read(syntax: str) -> None:
    place = {"ImagePositionPatient": "-100\\-90\\55.5", "ImageOrientationPatient": AXIAL}
    found = read(raw_dicom(VALUES, syntax, **WHO, **place)).identity
    assert found == Identity("1.2.3", "1.2.3.1", "1.2.3.1.7", 7, "ACC1", "P-9", 55.5)
    assert "P-9" not in repr(found)


POSITIONS = {
    "axial": (AXIAL, "3\\4\\5", 5.0),
    "upside down": ("1\\0\\0\\0\\-1\\0", "3\\4\\5", -5.0),
    "coronal": ("1\\0\\0\\0\\0\\-1", "3\\4\\5", 4.0),
    "sagittal": ("0\\1\\0\\0\\0\\-1", "3\\4\\5", -3.0),
    "oblique": ("1\\0\\0\\0\\0.6\\0.8", "0\\-8\\6", 0.6 * 6 + 0.8 * 8),
    "without an orientation": (None, "3\\4\\5", None),
    "without a position": (AXIAL, None, None),
    "broken": (AXIAL, "a\\b\\c", None),
    "no plane": ("1\\0\\0\\1\\0\\0", "3\\4\\5", None),
}


@pytest.mark.parametrize(("orientation", "position", "right"), POSITIONS.values(), ids=POSITIONS)
def test_the_position_is_the_projection_on_the_normal(orientation: str, position: str, right: float | None) -> None:
    place = {"ImagePositionPatient": position, "ImageOrientationPatient": orientation}
    found = read(raw_dicom(VALUES, **place)).identity.position_mm
    assert found == (right if right is None else pytest.approx(right))


def test_each_frame_of_an_enhanced_object_has_its_own_position() -> None:
    frames = np.stack([VALUES] * 3)
    per_frame = [{"PlanePositionSequence": [{"ImagePositionPatient": f"0\\0\\{z}"}]} for z in (30, 10, 20)]
    shared = [{"PlaneOrientationSequence": [{"ImageOrientationPatient": AXIAL}]}]
    sequences = {"PerFrameFunctionalGroupsSequence": per_frame, "SharedFunctionalGroupsSequence": shared}
    content = raw_dicom(frames, SOPClassUID=ENHANCED_CT, **WHO, **sequences)
    assert [read(content, frame=frame).identity.position_mm for frame in range(3)] == [30.0, 10.0, 20.0]


@pytest.mark.parametrize("text", ["", "x" * 65, "a\x07b"], ids=["empty", "too long", "control character"])
def test_what_the_standard_does_not_allow_says_nothing(text: str) -> None:
    found = read(raw_dicom(VALUES, StudyInstanceUID=text, AccessionNumber=text)).identity
    assert (found.study_uid, found.accession) == (None, None)


@pytest.mark.parametrize("number", ["", "x", "99999999999", "nan"])
def test_an_instance_number_that_is_none_says_nothing(number: str) -> None:
    assert read(raw_dicom(VALUES, InstanceNumber=number)).identity.instance_number is None


def test_a_placeholder_is_nobody() -> None:
    told = _told(Identity("1.2.840.10008.1.2", "1.2.3", None, 1, None, "ANONYMOUS", 0.0))
    assert told == {"series_uid": "1.2.3", "instance_number": 1, "position_mm": 0.0}
    assert _told(Identity()) is None


def test_a_slice_that_cannot_be_shown_still_says_whose_it_is() -> None:
    content = raw_dicom(VALUES, **WHO, PixelData=b"\0\0")
    with pytest.raises(ImageError) as caught:
        read(content)
    assert caught.value.identity.study_uid == "1.2.3"
    assert "P-9" not in str(caught.value)
