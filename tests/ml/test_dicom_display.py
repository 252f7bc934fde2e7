"""What a DICOM frame looks like: units, windows, lookup tables, padding, polarity and bits, by PS3.3 C.7.6, C.11."""

from __future__ import annotations

import io
import logging
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from ml.image.pixels.decoding import decode, read
from ml.image.pixels.picture import Window
from ml.runtime.errors import ImageError
from tests.ml.raw_dicom import BIG_ENDIAN, CAPTURE, ENHANCED_CT, EXPLICIT, IMPLICIT, raw_dicom

HU = np.array([[-300, -160, -60, 40, 140, 239, 400, 1000]], np.int16)
ABDOMEN = [0, 0, 64, 128, 192, 255, 255, 255]
"""HU in the window 40/400: ((value − 39.5)/399 + 0.5) × 255 by C.11.2.1.2.1, rounded."""
NARROW = {"WindowCenter": "40", "WindowWidth": "100"}


def levels(content: bytes, **choice: object) -> list[int]:
    """The grey levels of the first row."""
    found = decode(content, **choice)
    assert (found[..., 0] == found[..., 1]).all()
    assert (found[..., 0] == found[..., 2]).all()
    return found[0, :, 0].tolist()


def linear(values: np.ndarray, centre: float, width: float) -> list[int]:
    """C.11.2.1.2.1, written out."""
    found = []
    for value in values.ravel().tolist():
        if value <= centre - 0.5 - (width - 1) / 2:
            found.append(0)
        elif value > centre - 0.5 + (width - 1) / 2:
            found.append(255)
        else:
            found.append(round(((value - (centre - 0.5)) / (width - 1) + 0.5) * 255))
    return found


# --- units -----------------------------------------------------------------------------------------------------------

INTERCEPT = {"RescaleIntercept": "-1024"}
TRANSFORMATION = [{"RescaleSlope": "1", "RescaleIntercept": "-1024", "RescaleType": "HU"}]
ADDED = [{"PixelValueTransformationSequence": TRANSFORMATION}]


@pytest.mark.parametrize(
    ("slope", "fields"),
    [
        (1, INTERCEPT),
        (1, INTERCEPT | {"RescaleSlope": ""}),
        (1, INTERCEPT | {"RescaleSlope": "1"}),
        (1, INTERCEPT | {"RescaleSlope": " 1 \0"}),
        (1, INTERCEPT | {"RescaleSlope": "one"}),
        (1, INTERCEPT | {"RescaleSlope": "0"}),
        (2, INTERCEPT | {"RescaleSlope": "2"}),
        (0.5, {"RescaleSlope": "0,5", "RescaleIntercept": "-1024,0"}),
        (1, {"RescaleIntercept": "-1024\\7", "RescaleSlope": "1\\9"}),
        (1, {"SharedFunctionalGroupsSequence": ADDED}),
        (1, {"PerFrameFunctionalGroupsSequence": ADDED}),
        (1, {"PerFrameFunctionalGroupsSequence": ADDED, "SharedFunctionalGroupsSequence": [{}], "RescaleSlope": "7"}),
        (1, {"SharedFunctionalGroupsSequence": [{"PixelValueTransformationSequence": []}], **INTERCEPT}),
        (1, {"SharedFunctionalGroupsSequence": [], **INTERCEPT}),
        (1, {"PerFrameFunctionalGroupsSequence": [{"PixelValueTransformationSequence": [INTERCEPT]}],
             "SharedFunctionalGroupsSequence": [{"PixelValueTransformationSequence": [{"RescaleSlope": "1"}]}],
             "RescaleSlope": "3", "RescaleIntercept": "5"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
def test_slope_and_intercept_come_from_the_nearest_place_each_by_itself(slope, fields, syntax):
    stored = ((HU.astype(int) + 1024) / slope).astype(np.uint16)
    assert levels(raw_dicom(stored, syntax, **fields)) == pytest.approx(ABDOMEN, abs=1)


def test_without_slope_and_intercept_the_stored_values_are_hounsfield_units():
    assert levels(raw_dicom(HU)) == ABDOMEN


def test_each_frame_has_its_own_units_and_window():
    groups = [
        {"PixelValueTransformationSequence": [{"RescaleIntercept": str(intercept)}],
         "FrameVOILUTSequence": [{"WindowCenter": str(centre), "WindowWidth": "400"}]}
        for intercept, centre in ((0, 40), (100, 140), (-100, 240))
    ]  # fmt: skip
    content = raw_dicom(np.stack([HU, HU, HU]), SOPClassUID=ENHANCED_CT, PerFrameFunctionalGroupsSequence=groups)
    assert [levels(content, frame=frame) for frame in range(3)] == [ABDOMEN, ABDOMEN, linear(HU - 100, 240, 400)]
    assert read(content, frame=1).window == Window(140, 400)


def test_a_modality_lut_replaces_the_rescale():
    stored = np.array([[0, 1, 2, 3, 9]], np.uint16)
    table = [{"LUTDescriptor": [4, 0, 16], "ModalityLUTType": "HU", "LUTData": [0, 40, 140, 400]}]
    assert levels(raw_dicom(stored, ModalityLUTSequence=table)) == linear(np.array([0, 40, 140, 400, 400]), 40, 400)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("centre", "width", "window"),
    [
        ("40", "100", (40, 100)),
        ("40,5", "100,0", (40.5, 100)),
        ("40.0\0", "100 \0", (40, 100)),
        ("40\\-600", "100\\1500", (40, 100)),
        ("4e1", "+100", (40, 100)),
        ("NaN", "100", None),
        ("40", "inf", None),
        ("soft", "tissue", None),
        ("", "", None),
        ("40", "", None),
        ("40", "0", None),
        ("40", "-100", None),
        ("nan\\40", "100\\100", None),
    ],
)
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_a_window_is_what_two_numbers_say_and_none_without_them(centre, width, window, syntax):
    content = raw_dicom(HU, syntax, WindowCenter=centre, WindowWidth=width)
    assert levels(content) == pytest.approx(linear(HU, *window) if window else ABDOMEN, abs=1)
    assert read(content).window == Window(*(window or (40, 400)))


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"SharedFunctionalGroupsSequence": [{"FrameVOILUTSequence": [NARROW]}]}, (40, 100)),
        ({"PerFrameFunctionalGroupsSequence": [{"FrameVOILUTSequence": [NARROW]}], "WindowCenter": "1",
          "WindowWidth": "2"}, (40, 100)),
        ({"PerFrameFunctionalGroupsSequence": [{"FrameVOILUTSequence": [{"WindowCenter": "x", "WindowWidth": "2"}]}],
          **NARROW}, (40, 100)),
        ({"PerFrameFunctionalGroupsSequence": [{}]}, (40, 400)),
    ],
)  # fmt: skip
def test_the_window_of_a_functional_group_comes_before_that_of_the_file(fields, window):
    assert levels(raw_dicom(HU, **fields)) == linear(HU, *window)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("LINEAR", lambda value: linear(np.array([value]), 40, 100)[0]),
        ("LINEAR_EXACT", lambda value: np.clip((value - 40) / 100 + 0.5, 0, 1) * 255),
        ("linear_exact \0", lambda value: np.clip((value - 40) / 100 + 0.5, 0, 1) * 255),
        ("SIGMOID", lambda value: 255 / (1 + math.exp(-4 * (value - 40) / 100))),
        ("SOMETHING", lambda value: linear(np.array([value]), 40, 100)[0]),
    ],
)
def test_the_functions_of_windows_are_those_of_the_standard(function, expected):
    values = np.arange(-100, 181, dtype=np.int16)[None]
    found = np.array(levels(raw_dicom(values, VOILUTFunction=function, **NARROW)))
    assert np.abs(found - np.array([expected(value) for value in values[0].tolist()])).max() <= 0.51


def test_a_window_that_is_asked_for_is_linear_and_overrides_table_and_window():
    table = [{"LUTDescriptor": [2, 0, 8], "LUTData": [0, 255]}]
    content = raw_dicom(HU, VOILUTFunction="SIGMOID", VOILUTSequence=table, WindowCenter="1", WindowWidth="2")
    assert levels(content, window=(40, 400)) == ABDOMEN


# --- lookup tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize(
    ("first", "bits", "table"),
    [(0, 12, [4095, 2048, 1024, 0]), (2, 8, [0, 10, 20, 255]), (1, 16, [0, 32768, 65535, 65535])],
)
def test_a_voi_lut_wins_over_the_window(syntax, first, bits, table):
    """C.11.2.1.1: below the first value its first entry, above the last value its last one."""
    stored = np.array([[0, 1, 2, 3, 4, 5, 6]], np.uint16)
    items = [{"LUTDescriptor": [4, first, bits], "LUTData": table}]
    content = raw_dicom(stored, syntax, Modality="DX", VOILUTSequence=items, WindowCenter="1", WindowWidth="2")
    expected = [table[min(max(value - first, 0), 3)] * 255 / (2**bits - 1) for value in stored[0].tolist()]
    assert levels(content) == pytest.approx(expected, abs=0.51)


def test_a_voi_lut_may_begin_below_zero():
    stored = np.array([[-3, -2, -1, 0, 1]], np.int16)
    items = [{"LUTDescriptor": [3, -2, 8], "LUTData": [0, 100, 255]}]
    assert levels(raw_dicom(stored, Modality="MR", VOILUTSequence=items)) == [0, 0, 100, 255, 255]
    items = [{"LUTDescriptor": [3, 65_534, 8], "LUTData": [0, 100, 255]}]
    assert levels(raw_dicom(stored, Modality="MR", VOILUTSequence=items)) == [0, 0, 100, 255, 255]


# --- polarity --------------------------------------------------------------------------------------------------------

RAMP = np.array([[0, 64, 255]], np.uint8)


@pytest.mark.parametrize(
    ("photometric", "shape", "expected"),
    [
        ("MONOCHROME2", None, [0, 64, 255]),
        ("MONOCHROME2", "IDENTITY", [0, 64, 255]),
        ("MONOCHROME2", "INVERSE", [255, 191, 0]),
        ("MONOCHROME1", None, [255, 191, 0]),
        ("MONOCHROME1", "INVERSE", [255, 191, 0]),
    ],
)
def test_the_least_value_is_white_where_either_attribute_says_so(photometric, shape, expected):
    content = raw_dicom(RAMP, Modality="DX", PhotometricInterpretation=photometric, PresentationLUTShape=shape)
    assert levels(content) == expected


# --- the range without a window --------------------------------------------------------------------------------------


def body() -> np.ndarray:
    """An MR picture: a ramp from 100 to 400, int16 [64, 64]."""
    return np.linspace(100, 400, 64 * 64).astype(np.int16).reshape(64, 64)


def stretched(values: np.ndarray, data: np.ndarray) -> np.ndarray:
    low, high = np.percentile(data, [0.5, 99.5])
    return np.clip((values - low) / (high - low), 0, 1) * 255


@pytest.mark.parametrize("outlier", [-32767, 32767])
def test_a_hot_pixel_does_not_squeeze_the_body(outlier):
    values = body()
    values[0, 0] = outlier
    found = decode(raw_dicom(values, Modality="MR"))[..., 0]
    assert np.abs(found.astype(float) - stretched(values, values)).max() <= 0.51
    assert np.ptp(found[1:]) > 240


@pytest.mark.parametrize("slope", ["1", "0.01", "-2", "1e3"])
def test_the_range_is_that_of_the_rescaled_values(slope):
    values = body().astype(float) * float(slope) - 50
    content = raw_dicom(body(), Modality="PT", RescaleSlope=slope, RescaleIntercept="-50")
    assert np.abs(decode(content)[..., 0] - stretched(values, values)).max() <= 0.51


@pytest.mark.parametrize(
    ("dtype", "padding", "fields"),
    [
        (np.int16, [-2000], {"PixelPaddingValue": -2000}),
        (np.int16, [-2000], {"PixelPaddingValue": 63_536}),
        (np.uint16, [63_536], {"PixelPaddingValue": -2000}),
        (np.uint16, [0], {"PixelPaddingValue": 0}),
        (np.int16, [-32_768, -3000, -2000], {"PixelPaddingValue": -32_768, "PixelPaddingRangeLimit": -2000}),
        (np.int16, [-32_768, -3000, -2000], {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -32_768}),
        (np.uint16, [4000, 4095], {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 4095}),
    ],
)
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_padding_is_no_data_and_black(dtype, padding, fields, photometric):
    values = body().astype(dtype)
    values[:16] = np.resize(padding, (16, 64))
    found = decode(raw_dicom(values, Modality="MR", PhotometricInterpretation=photometric, **fields))[..., 0]
    expected = stretched(values[16:].astype(float), values[16:])
    assert found[:16].max() == 0
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    assert np.abs(found[16:] - expected).max() <= 0.51


@pytest.mark.parametrize("rows", [1, 32])
def test_corners_of_the_least_number_do_not_squeeze_the_body_though_no_attribute_names_them(rows):
    values = body()
    values[:rows] = -32_768
    found = decode(raw_dicom(values, Modality="MR"))[..., 0]
    assert found[:rows].max() == 0
    assert np.abs(found[rows:] - stretched(values[rows:].astype(float), values[rows:])).max() <= 0.51


def test_padding_is_black_under_a_window_too():
    content = raw_dicom(HU, PixelPaddingValue=1000, WindowCenter="40", WindowWidth="400")
    assert levels(content) == [*ABDOMEN[:-1], 0]


def test_of_padding_alone_nothing_is_shown():
    assert decode(raw_dicom(np.full((4, 4), 7, np.int16), Modality="MR", PixelPaddingValue=7)).max() == 0


def test_a_few_bright_pixels_on_nothing_are_seen():
    values = np.zeros((64, 64), np.uint16)
    values[3, 3:6] = [100, 200, 400]
    assert decode(raw_dicom(values, Modality="NM"))[3, 3:6, 0].tolist() == [64, 128, 255]


def test_floating_point_pixels_have_their_own_padding():
    values = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    values[0, :3] = np.nan, np.inf, -1e9
    padding = np.float32(-1e9).tobytes()
    content = raw_dicom(
        values, Modality="MR", PixelData=None, FloatPixelData=values.astype("<f4").tobytes(), BitsStored=None,
        PixelRepresentation=None, FloatPixelPaddingValue=padding,
    )  # fmt: skip
    found = decode(content)[..., 0]
    assert found[0, :3].tolist() == [0, 0, 0]
    assert np.abs(found[1:] - stretched(values[1:], values.ravel()[3:])).max() <= 0.51


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [EXPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize("high", [11, 12, 13, 15])
def test_stored_bits_are_shifted_to_their_place_and_others_removed(high, syntax):
    values = (HU.astype(int) + 1024).clip(0, 4095).astype(np.uint16)
    others = np.uint16(0xFFFF & ~(0xFFF << (high - 11)))
    content = raw_dicom(values << (high - 11) | others, syntax, BitsStored=12, HighBit=high, **INTERCEPT)
    assert levels(content) == ABDOMEN


@pytest.mark.parametrize("high", [11, 15])
def test_shifted_values_keep_their_sign(high):
    values = HU.clip(-2048, 2047) << (high - 11)
    assert levels(raw_dicom(values, BitsStored=12, HighBit=high)) == ABDOMEN


def test_a_high_bit_that_cannot_be_is_ignored():
    assert levels(raw_dicom(HU, HighBit=3)) == ABDOMEN
    assert levels(raw_dicom(HU, HighBit=None)) == ABDOMEN


@pytest.mark.parametrize(
    "fields",
    [
        {"SOPClassUID": CAPTURE},
        {"SOPClassUID": CAPTURE, **NARROW},
        {"SOPClassUID": CAPTURE + ".2", "RescaleSlope": "1", **INTERCEPT},
        {},
        {"Modality": "US", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"},
        {"Modality": "OT", "SOPClassUID": CAPTURE},
    ],
)
def test_eight_bits_without_units_are_shown_as_they_are(fields):
    assert levels(raw_dicom(RAMP, **fields), window=(40, 400)) == [0, 64, 255]
    assert levels(raw_dicom(RAMP, **fields)) == [0, 64, 255]


def test_eight_bits_with_a_rescale_are_hounsfield_units_in_a_ct_image():
    content = raw_dicom(RAMP, RescaleSlope="8", RescaleIntercept="-1024")
    assert levels(content) == linear(RAMP.astype(int) * 8 - 1024, 40, 400)


@pytest.mark.parametrize("kind", ["ED", "Z_EFF", "MGML"])
def test_values_that_are_no_hounsfield_units_get_no_window_of_them(kind):
    content = raw_dicom(body(), RescaleType=kind)
    assert np.array_equal(decode(content), decode(content, (40, 400)))
    assert np.abs(decode(content)[..., 0] - stretched(body(), body())).max() <= 0.51


# --- colours ---------------------------------------------------------------------------------------------------------


def in_colour(values: np.ndarray, photometric: str = "RGB", **fields: object) -> bytes:
    """[rows, columns, 3], by pixel."""
    return raw_dicom(
        values, Modality="US", SamplesPerPixel=3, PhotometricInterpretation=photometric, Rows=values.shape[0],
        Columns=values.shape[1], NumberOfFrames=None, **{"PlanarConfiguration": 0} | fields,
    )  # fmt: skip


def test_colours_of_eight_bits_are_shown_as_they_are():
    values = np.arange(10, 10 + 3 * 4 * 5, dtype=np.uint8).reshape(4, 5, 3)
    assert np.array_equal(decode(in_colour(values)), values)
    assert np.array_equal(decode(in_colour(values.astype(np.uint16), BitsStored=8)), values)


def test_colours_of_sixteen_bits_are_stretched_all_channels_alike():
    values = np.linspace(0, 4095, 64 * 64 * 3).astype(np.uint16).reshape(64, 64, 3)
    assert np.abs(decode(in_colour(values)) - stretched(values.astype(float), values)).max() <= 0.51


@pytest.mark.parametrize(("bits", "shift"), [(8, 0), (16, 8), (16, 0)])
def test_a_palette_is_not_stretched(bits, shift):
    """Some files declare 16 bits, and have entries of eight."""
    palette = {
        f"{colour}PaletteColorLookupTable{part}": value
        for colour, entries in (("Red", [10, 20, 30]), ("Green", [40, 50, 60]), ("Blue", [70, 80, 90]))
        for part, value in (("Descriptor", [3, 0, bits]), ("Data", [entry << shift for entry in entries]))
    }
    content = raw_dicom(
        np.array([[0, 1, 2]], np.uint8), Modality="US", PhotometricInterpretation="PALETTE COLOR", **palette
    )
    assert decode(content)[0].tolist() == [[10, 40, 70], [20, 50, 80], [30, 60, 90]]
    assert read(content).origin.kind == "palette"


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keyword",
    ["Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
     "PixelRepresentation", "PixelData"],
)  # fmt: skip
def test_the_missing_tag_is_named(keyword):
    with pytest.raises(ImageError, match=rf"^The DICOM file lacks {keyword}\.$"):
        decode(raw_dicom(HU, **{keyword: None}))


def test_what_colours_need_besides_is_named():
    with pytest.raises(ImageError, match=r"lacks PlanarConfiguration\.$"):
        decode(in_colour(np.zeros((4, 5, 3), np.uint8), **{"PlanarConfiguration": None}))
    with pytest.raises(ImageError, match=r"lacks RedPaletteColorLookupTableDescriptor\.$"):
        decode(raw_dicom(RAMP, PhotometricInterpretation="PALETTE COLOR"))


@pytest.mark.parametrize("name", ["SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_rle.dcm", "SC_rgb_gdcm_KY.dcm"])
def test_a_codestream_says_itself_how_it_orders_its_samples(name):
    dataset, stream = pydicom.dcmread(get_testdata_file(name)), io.BytesIO()
    del dataset.PlanarConfiguration
    dataset.save_as(stream)
    assert np.array_equal(decode(stream.getvalue()), decode(Path(get_testdata_file(name))))


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"PhotometricInterpretation": "PURPLE"}, "PhotometricInterpretation"),
        ({"SamplesPerPixel": 2}, "SamplesPerPixel"),
        ({"PhotometricInterpretation": "RGB"}, "SamplesPerPixel"),
        ({"BitsAllocated": 12, "BitsStored": 12}, "BitsAllocated"),
        ({"BitsStored": 20}, "BitsStored"),
        ({"PixelRepresentation": 3}, "PixelRepresentation"),
    ],
)
def test_a_value_that_cannot_be_is_named(fields, wrong):
    with pytest.raises(ImageError, match=rf"^The DICOM file's {wrong} cannot be: the standard has no such value\.$"):
        decode(raw_dicom(HU, **fields))


def test_small_letters_in_a_code_are_capitals():
    assert levels(raw_dicom(HU, PhotometricInterpretation="monochrome2")) == ABDOMEN


def test_compressed_pixels_that_are_cut_off_are_counted():
    whole = Path(get_testdata_file("MR_small_RLE.dcm")).read_bytes()
    for length in (300, 2000, 7000):
        with pytest.raises(ImageError, match=rf"^The DICOM file is cut off after {length} of \d+ bytes \(at least\)"):
            decode(whole[:length])


def test_a_damaged_jpeg_is_refused_and_ends_no_process():
    whole = bytearray(Path(get_testdata_file("SC_rgb_jpeg_dcmtk.dcm")).read_bytes())
    begin = whole.index(b"\xff\xd8")
    for at in range(begin, begin + 900, 7):  # through all tables, and into the picture
        damaged = bytes(whole[:at]) + bytes([whole[at] ^ 0xFF]) + bytes(whole[at + 1 :])
        with suppress(ImageError):
            decode(damaged)
    whole[begin + 200 : begin + 800] = bytes(600)
    with pytest.raises(ImageError, match=r"pixels \(JPEG Baseline \(Process 1\), 8 bits allocated\) are damaged"):
        decode(bytes(whole))


def test_pixels_that_are_cut_off_are_counted():
    with pytest.raises(ImageError, match=r"cut off after 10 of 16 bytes of its pixels"):
        decode(raw_dicom(HU)[:-6])


def test_a_transfer_syntax_without_a_decoder_is_named():
    for syntax, named in (("1.2.840.10008.1.2.4.201", "High-Throughput JPEG 2000"), ("1.2.3.9", "1.2.3.9")):
        with pytest.raises(ImageError, match=f"transfer syntax {syntax}.*{named}|transfer syntax {named} cannot"):
            decode(raw_dicom(HU, syntax))


def test_text_in_place_of_a_transfer_syntax_is_not_repeated_and_not_logged():
    stream = io.StringIO()
    logging.getLogger().addHandler(handler := logging.StreamHandler(stream))  # pytest's caplog takes all there is
    with pytest.raises(ImageError, match="no valid UID") as refused:
        decode(raw_dicom(HU, "SECRET^NAME"))
    assert "SECRET" not in str(refused.value)
    logging.getLogger().removeHandler(handler)
    assert stream.getvalue() == "", "pydicom logs and warns of values that it finds odd"


@pytest.mark.parametrize(
    ("sop_class", "name"),
    [
        ("1.2.840.10008.5.1.4.1.1.66.4", r"a segmentation \(SEG\)"),
        ("1.2.840.10008.5.1.4.1.1.88.33", r"a structured report \(SR\)"),
        ("1.2.840.10008.5.1.4.1.1.481.2", r"a radiotherapy dose \(RTDOSE\)"),
        ("1.2.840.10008.5.1.4.1.1.481.3", r"a radiotherapy structure set \(RTSTRUCT\)"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "an encapsulated PDF"),
        ("1.2.840.10008.5.1.4.1.1.11.1", r"a presentation state \(PR\)"),
        ("1.2.840.10008.5.1.4.1.1.30", "a parametric map"),
        ("1.2.840.10008.1.3.10", r"a directory \(DICOMDIR\)"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(sop_class, name):
    with pytest.raises(ImageError, match=f"^The DICOM file is {name}, no picture"):
        decode(raw_dicom(HU, SOPClassUID=sop_class))


def test_a_radiotherapy_image_is_a_picture():
    assert levels(raw_dicom(HU, SOPClassUID="1.2.840.10008.5.1.4.1.1.481.1")) == ABDOMEN
