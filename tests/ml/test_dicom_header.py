"""What the API says of a DICOM file by its first elements: the size, the frames, and what is no picture."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest

from ml.spec.headers import dicom as dicom_header
from ml.spec.headers.image import look
from ml.spec.pipeline import RefusedInput
from tests.ml.raw_dicom import BIG_ENDIAN, EXPLICIT, IMPLICIT, raw_dicom

VALUES = np.zeros((6, 12, 20), np.int16)
SIZE = (12, 20, 6)


@pytest.mark.parametrize("part10", [True, False])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
def test_rows_columns_and_frames_are_read_with_and_without_a_header(syntax, part10):
    stream = io.BytesIO(raw_dicom(VALUES, syntax, part10, ImageType="ORIGINAL\\PRIMARY"))
    assert dicom_header.is_dicom(stream)
    assert dicom_header.read(stream) == SIZE
    assert look(stream, 10**6) == ("application/dicom", 20, 12, 6)


def test_a_file_may_begin_with_its_meta_header_or_lack_it_behind_the_preamble():
    whole, bare = raw_dicom(VALUES), raw_dicom(VALUES, part10=False)
    for content in (whole[132:], bytes(128) + b"DICM" + bare):
        assert dicom_header.is_dicom(io.BytesIO(content))
        assert dicom_header.read(io.BytesIO(content)) == SIZE


def test_a_deflated_file_is_read():
    whole = raw_dicom(VALUES, "1.2.840.10008.1.2.1.99", ImageType="A\\B")
    start = 144 + int.from_bytes(whole[140:144], "little")
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    assert dicom_header.read(io.BytesIO(whole[:start] + deflater.compress(whole[start:]) + deflater.flush())) == SIZE


@pytest.mark.parametrize("part10", [True, False])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize(
    ("sop_class", "name"),
    [
        ("1.2.840.10008.5.1.4.1.1.66.4", "segmentation (SEG)"),
        ("1.2.840.10008.5.1.4.1.1.88.11", "structured report (SR)"),
        ("1.2.840.10008.5.1.4.1.1.481.3", "radiotherapy structure set (RTSTRUCT)"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "encapsulated PDF"),
        ("1.2.840.10008.5.1.4.1.1.9.1.1", "waveform"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(sop_class, name, syntax, part10):
    for fields in ({}, {"Rows": None, "Columns": None}):
        content = raw_dicom(VALUES, syntax, part10, SOPClassUID=sop_class, **fields)
        with pytest.raises(RefusedInput) as refused:
            look(io.BytesIO(content), 10**6)
        assert f" {name}, no picture: send the images that it belongs to." in str(refused.value)


def test_the_meta_header_names_the_class_where_the_data_set_does_not():
    content = raw_dicom(VALUES, SOPClassUID="1.2.840.10008.1.3.10").replace(b"\x08\0\x16\0UI", b"\x08\0\x13\0UI")
    with pytest.raises(RefusedInput, match="directory"):
        look(io.BytesIO(content), 10**6)


@pytest.mark.parametrize("missing", [["Rows"], ["Columns"], ["Rows", "Columns"]])
def test_the_missing_side_is_named(missing):
    with pytest.raises(RefusedInput, match=f"no picture: it lacks {' and '.join(missing)}."):
        look(io.BytesIO(raw_dicom(VALUES, **dict.fromkeys(missing))), 10**6)


@pytest.mark.parametrize("cut", [133, 140, 170, 300])
def test_a_file_that_is_cut_off_is_refused_and_repeats_nothing(cut):
    with pytest.raises(RefusedInput) as refused:
        look(io.BytesIO(raw_dicom(VALUES, ImageComments="SECRET" * 20)[:cut]), 10**6)
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("sides", [{"Rows": 0}, {"Rows": 60_000, "Columns": 60_000}])
def test_a_size_that_cannot_be_is_refused(sides):
    with pytest.raises(RefusedInput):
        look(io.BytesIO(raw_dicom(VALUES, **sides)), 10**6)
