"""Decoding of all image formats, and refused files."""

from __future__ import annotations

import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import DeflatedExplicitVRLittleEndian

from ml.image.pixels.decoding import PIXELS_VERSION, colour_mode, decode, frames, is_dicom, read
from ml.image.pixels.limits import MAX_PIXELS, MAX_SIDE
from ml.image.pixels.picture import Origin, foreign, is_blank
from ml.runtime.errors import ImageError
from tests.ml.builders import encode, make_dicom, make_pixels
from tests.ml.raw_dicom import BIG_ENDIAN, EXPLICIT, IMPLICIT, raw_dicom


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_forms_give_back_the_same_pixels(form):
    pixels = make_pixels()
    assert np.array_equal(decode(encode(pixels, form, **({"lossless": True} if form == "WEBP" else {}))), pixels)


def test_jpeg_gives_nearly_the_same_pixels():
    pixels = make_pixels()
    assert np.abs(decode(encode(pixels, "JPEG", quality=95)).astype(int) - pixels).mean() < 4


def test_a_path_is_read_like_its_bytes(tmp_path):
    (tmp_path / "scan.png").write_bytes(encode(make_pixels()))
    assert np.array_equal(decode(tmp_path / "scan.png"), make_pixels())


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "YCbCr"])
def test_every_colour_mode_becomes_rgb(mode):
    form = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    image = decode(encode(Image.fromarray(make_pixels()).convert(mode), form))
    assert image.shape == (48, 48, 3)
    assert image.dtype == np.uint8


def test_a_rotated_photograph_stands_upright():
    wide = np.zeros((20, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90°
    assert decode(encode(wide, "JPEG", exif=exif)).shape == (40, 20, 3)


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(1000, 3000, 48 * 48).reshape(48, 48).astype(np.uint16)
    grey = decode(encode(Image.fromarray(ramp)))[:, :, 0]
    assert (grey.min(), grey.max()) == (0, 255)
    assert len(np.unique(grey)) == 256


def test_transparent_pixels_become_black_background():
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:4, :, 3] = 0
    image = decode(encode(pixels))
    assert image[:4].max() == 0
    assert image[4:].min() == 255


def test_a_real_ct_file_is_read():
    image = decode(open(get_testdata_file("CT_small.dcm"), "rb").read())  # noqa: SIM115, PTH123
    assert image.shape == (128, 128, 3)
    assert image.std() > 20


@pytest.mark.parametrize(
    "name", ["JPEG2000.dcm", "MR_small_RLE.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_gdcm.dcm"]
)
def test_compressed_dicom_is_read(name):
    assert decode(open(get_testdata_file(name), "rb").read()).std() > 1  # noqa: SIM115, PTH123


def test_ct_without_a_window_shows_soft_tissue():
    values = np.array([[-1000, -160], [40, 240]], np.int16)
    assert decode(make_dicom(values))[:, :, 0].tolist() == [[0, 0], [128, 255]]


def test_the_window_in_the_file_is_used_after_rescaling():
    values = np.array([[1024, 1074], [1124, 3000]], np.int16)
    image = decode(make_dicom(values, RescaleIntercept=-1024, WindowCenter=50, WindowWidth=100))
    assert image[:, :, 0].tolist() == [[0, 129], [255, 255]]


def standard_window(value: float, centre: float, width: float) -> float:
    """The pseudo code of DICOM PS3.3, C.11.2.1.2.1, for an output of 0 to 255."""
    if value <= centre - 0.5 - (width - 1) / 2:
        return 0
    if value > centre - 0.5 + (width - 1) / 2:
        return 255
    return ((value - (centre - 0.5)) / (width - 1) + 0.5) * 255


@pytest.mark.parametrize("window", [(40, 400), (50, 2), (2048, 4096), (-600, 1500), (0, 100), (0, 1)])
def test_a_window_is_the_linear_function_of_the_standard(window):
    values = np.arange(-2000, 5000, dtype=np.int16)[None]
    expected = [round(standard_window(value, *window), 3) for value in values[0].tolist()]
    in_file = decode(make_dicom(values, WindowCenter=window[0], WindowWidth=window[1]))[0, :, 0]
    asked = decode(make_dicom(values), window)[0, :, 0]
    assert np.abs(in_file - np.array(expected)).max() <= 0.5
    assert np.array_equal(in_file, asked)


def test_a_window_that_is_asked_for_is_in_hounsfield_units_and_overrides_the_files_own():
    values = np.array([[1024, 1074, 1124, 3000]], np.int16)
    content = make_dicom(values, RescaleIntercept=-1024, WindowCenter=1000, WindowWidth=10)
    assert decode(content, (50, 100))[0, :, 0].tolist() == [0, 129, 255, 255]


@pytest.mark.parametrize("slope", [1, 2, 0.5])
def test_the_rescale_slope_and_intercept_of_the_file_are_applied(slope):
    values = (np.array([[-200, -160, 40, 240]]) / slope + 100).astype(np.int16)
    content = make_dicom(values, RescaleSlope=slope, RescaleIntercept=-100 * slope)
    assert decode(content, (40, 400))[0, :, 0].tolist() == [0, 0, 128, 255]


def test_only_ct_has_hounsfield_units():
    magnetic = make_dicom(np.array([[100, 200], [150, 300]], np.int16), Modality="MR")
    assert np.array_equal(decode(magnetic, (40, 400)), decode(magnetic))
    assert np.array_equal(decode(encode(make_pixels()), (40, 400)), make_pixels())


@pytest.mark.parametrize("width", [0, 0.5, -400, float("nan")])
def test_a_window_without_width_is_refused(width):
    with pytest.raises(ValueError, match="window"):
        decode(encode(make_pixels()), (40, width))


@pytest.mark.parametrize(
    ("mode", "form", "told"),
    [
        ("L", "PNG", "grey"),
        ("1", "PNG", "grey"),
        ("I;16", "PNG", "16-bit"),
        ("RGB", "JPEG", "RGB"),
        ("RGBA", "PNG", "RGBA"),
        ("P", "PNG", "palette"),
        ("CMYK", "TIFF", "CMYK"),
        ("F", "TIFF", "float"),
    ],
)
def test_the_colour_mode_is_told(mode, form, told):
    picture = Image.fromarray(make_pixels())
    picture = picture.convert("I;16") if mode == "I;16" else picture.convert(mode)
    assert colour_mode(encode(picture, form)) == told


def test_the_colour_mode_of_a_dicom_file_is_dicom_and_of_rubbish_an_error():
    assert colour_mode(make_dicom(np.zeros((2, 2), np.int16))) == "DICOM"
    with pytest.raises(ImageError):
        colour_mode(b"rubbish")


def test_another_modality_without_a_window_is_scaled_from_minimum_to_maximum():
    image = decode(make_dicom(np.array([[100, 200], [150, 300]], np.int16), Modality="MR"))
    assert (image.min(), image.max()) == (0, 255)


def test_monochrome1_is_inverted():
    values = np.array([[-1000, 1000]], np.int16)
    assert decode(make_dicom(values, PhotometricInterpretation="MONOCHROME1"))[0, :, 0].tolist() == [255, 0]


def test_each_frame_of_a_file_is_a_slice_of_its_own():
    content = make_dicom(np.stack([np.full((4, 4), value, np.int16) for value in (-1000, 240, 40)]))
    assert frames(content) == 3
    assert [int(decode(content, frame=frame).mean()) for frame in range(3)] == [0, 255, 128]
    found = read(content, frame="middle")
    assert (found.frame, found.frames, found.pixels.min()) == (1, 3, 255)


def test_of_several_frames_none_is_taken_in_silence():
    content = make_dicom(np.zeros((3, 4, 4), np.int16))
    with pytest.raises(ImageError, match="holds 3 frames, and each is a slice: send each as a file of its own"):
        decode(content)
    for frame in (3, -1):
        with pytest.raises(ImageError, match="it holds 3, counted from 0"):
            decode(content, frame=frame)


def test_one_frame_needs_no_number():
    content = make_dicom(np.full((1, 4, 4), 240, np.int16))
    for choice in ({}, {"frame": 0}, {"frame": "middle"}):
        assert decode(content, **choice).min() == 255


def test_a_number_of_frames_that_is_none_is_refused():
    with pytest.raises(ImageError, match="NumberOfFrames is no number"):
        decode(raw_dicom(np.zeros((4, 4), np.int16), NumberOfFrames="1A"))


# --- without a part-10 header ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
def test_a_file_without_preamble_and_meta_header_is_dicom_by_its_first_element(syntax):
    content = raw_dicom(np.array([[-160, 40, 240]], np.int16), syntax, part10=False)
    assert is_dicom(content)
    assert decode(content)[0, :, 0].tolist() == [0, 128, 255]
    assert frames(content) == 1


def test_a_file_without_a_preamble_may_begin_with_its_meta_header():
    content = raw_dicom(np.array([[-160, 40, 240]], np.int16))[132:]
    assert is_dicom(content)
    assert decode(content)[0, :, 0].tolist() == [0, 128, 255]


def test_compressed_pixels_without_a_part_10_header_are_refused():
    whole = Path(get_testdata_file("MR_small_RLE.dcm")).read_bytes()
    bare = whole[144 + int.from_bytes(whole[140:144], "little") :]
    with pytest.raises(ImageError, match="part-10 header is missing"):
        decode(bare)


@pytest.mark.parametrize(
    "content", [b"\x08\0", b"\x08\0\x08\0hello", b"\x08\0\x05\0\xff\xff\xff\xff", b"MM\0*", b"II*\0", b"BM", b""]
)
def test_what_only_begins_alike_is_no_dicom(content):
    assert not is_dicom(content + b"\xff" * 4)


# --- origin ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "origin"),
    [
        ({"BodyPartExamined": "KIDNEY"}, Origin("CT", "KIDNEY", "grey")),
        ({"BodyPartExamined": "kidney \0", "Modality": "mr"}, Origin("MR", "KIDNEY", "grey")),
        ({"BodyPartExamined": "SECRET NAME", "Modality": "Secret Name"}, Origin("other", "other", "grey")),
        ({"Modality": ""}, Origin(None, None, "grey")),
        ({"Modality": None, "PhotometricInterpretation": "MONOCHROME1"}, Origin(None, None, "grey")),
    ],
)
def test_a_dicom_file_says_where_it_comes_from_in_defined_terms(fields, origin):
    assert read(raw_dicom(np.zeros((4, 4), np.int16), **fields)).origin == origin


@pytest.mark.parametrize(
    ("modality", "learnt", "reason"),
    [
        ("NM", ["CT"], "its modality is NM, and the network has learnt from CT"),
        ("other", ["MR", "CT", None], "its modality is other, and the network has learnt from CT, MR"),
        ("CT", ["CT", "MR"], None),
        (None, ["CT"], None),
        ("CT", [None], None),
        ("CT", [], None),
    ],
)
def test_a_picture_of_another_modality_is_foreign(modality, learnt, reason):
    assert foreign(Origin(modality), [Origin(each, "KIDNEY") for each in learnt]) == reason


@pytest.mark.parametrize(("mode", "kind"), [("L", "grey"), ("1", "grey"), ("RGB", "colour"), ("P", "palette")])
def test_a_picture_says_how_it_stores_its_colours(mode, kind):
    assert read(encode(Image.fromarray(make_pixels()).convert(mode))).origin == Origin(None, None, kind)


SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
MEASURES = [{"PixelMeasuresSequence": [{"PixelSpacing": "2\\3"}]}]


@pytest.mark.parametrize(
    ("fields", "spacing"),
    [
        ({"PixelSpacing": "0.5\\0.7"}, (0.5, 0.7)),
        ({"PixelSpacing": "0,5\\0,7"}, (0.5, 0.7)),
        ({"ImagerPixelSpacing": "0.1\\0.1"}, (0.1, 0.1)),
        ({"PixelSpacing": "0.5\\0.7", "ImagerPixelSpacing": "0.1\\0.1"}, (0.5, 0.7)),
        ({"PixelSpacing": "", "ImagerPixelSpacing": "0.1\\0.1"}, (0.1, 0.1)),
        ({SHARED: MEASURES}, (2, 3)),
        ({PER_FRAME: MEASURES, "PixelSpacing": "1\\1"}, (2, 3)),
        ({"PixelSpacing": "0\\0.7"}, None),
        ({"PixelSpacing": "0.7"}, None),
        ({"PixelSpacing": "a\\b"}, None),
        ({}, None),
    ],
)
def test_the_spacing_comes_from_the_frame_or_the_file(fields, spacing):
    assert read(raw_dicom(np.zeros((4, 4), np.int16), **fields)).spacing_mm == spacing


def noisy(level: int, noise: int) -> np.ndarray:
    """A picture of one level, with noise around it."""
    return np.random.default_rng(0).integers(level, level + noise + 1, (200, 200, 3)).astype(np.uint8)


def test_a_blank_picture_is_one_of_one_level():
    assert [is_blank(each) for each in (noisy(0, 0), noisy(255, 0), noisy(90, 2))] == [True] * 3
    assert not is_blank(make_pixels())


# --- older models ----------------------------------------------------------------------------------------------------


def test_the_rules_of_version_1_are_kept_for_models_that_learnt_with_them():
    """They stretch from the least to the greatest value, and look at no functional groups."""
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    values[0, :2] = 65_535, 0
    for content in (raw_dicom(values, Modality="MR"), encode(Image.fromarray(values))):
        old, new = (read(content, rules=rules).pixels for rules in (1, PIXELS_VERSION))
        assert np.array_equal(old[..., 0], np.rint(values * (255 / 65_535)).astype(np.uint8))
        assert new.mean() > 100
    groups = [{"PixelValueTransformationSequence": [{"RescaleIntercept": "-1024"}]}]
    enhanced = raw_dicom(np.full((4, 4), 1064, np.uint16), SharedFunctionalGroupsSequence=groups)
    assert [int(read(enhanced, rules=rules).pixels[0, 0, 0]) for rules in (1, 2)] == [255, 128]


@pytest.mark.parametrize(
    "content",
    [
        encode(make_pixels()),
        encode(make_pixels(), "JPEG"),
        encode(make_pixels()[..., 0]),
        make_dicom(np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)),
        make_dicom(np.arange(4096, dtype=np.int16).reshape(64, 64), WindowCenter=50, WindowWidth=99),
    ],
)
def test_ordinary_files_look_alike_by_all_rules(content):
    assert np.array_equal(read(content, rules=1).pixels, read(content).pixels)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"<html>", b"\0" * 128 + b"DICMrubbish"])
def test_what_is_no_image_is_refused_in_one_sentence(content):
    with pytest.raises(ImageError, match=r"^The .*\.$"):
        decode(content)


def test_half_an_image_is_refused():
    whole = encode(make_pixels(), "JPEG")
    with pytest.raises(ImageError):
        decode(whole[: len(whole) // 2])


def test_half_a_dicom_file_is_refused_without_a_word_about_the_patient():
    whole = make_dicom(np.zeros((64, 64), np.int16))
    with pytest.raises(ImageError) as refused:
        decode(whole[: len(whole) // 2])
    assert "SECRET" not in str(refused.value)


def test_a_missing_file_is_refused_without_its_name(tmp_path):
    with pytest.raises(ImageError) as refused:
        decode(tmp_path / "SECRET.png")
    assert "SECRET" not in str(refused.value)


def declared_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 50_000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (12_000, 9_000)])
def test_a_declared_giant_is_refused_before_it_is_decoded(width, height):
    started = time.perf_counter()
    with pytest.raises(ImageError, match="pixels"):
        decode(declared_png(width, height))
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize(("width", "height"), [(MAX_PIXELS, 1), (1, MAX_PIXELS), (MAX_SIDE + 1, 2)])
def test_a_side_longer_than_any_scanner_makes_is_refused(width, height):
    """An explanation needs memory per row and per column, whatever their product is."""
    with pytest.raises(ImageError, match="side of more than 65,535 pixels"):
        decode(declared_png(width, height))


def test_the_longest_side_is_taken():
    assert decode(encode(Image.new("L", (MAX_SIDE, 1)))).shape == (1, MAX_SIDE, 3)


def test_a_dicom_that_declares_a_giant_is_refused():
    with pytest.raises(ImageError, match="pixels"):
        decode(make_dicom(np.zeros((2, 2), np.int16), Rows=60_000, Columns=60_000))


def deflated(content: bytes, extra: bytes) -> bytes:
    plain = pydicom.dcmread(__import__("io").BytesIO(content))
    plain.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    sink = __import__("io").BytesIO()
    plain.save_as(sink, enforce_file_format=True)
    whole = sink.getvalue()
    start = 144 + int.from_bytes(whole[140:144], "little")
    inflated = zlib.decompress(whole[start:], -zlib.MAX_WBITS) + extra
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return whole[:start] + deflater.compress(inflated) + deflater.flush()


def test_a_deflated_dicom_is_read():
    assert decode(deflated(make_dicom(np.full((4, 4), 240, np.int16)), b"")).min() == 255


@pytest.mark.slow
def test_a_deflated_dicom_bomb_is_refused():
    bomb = deflated(make_dicom(np.zeros((4, 4), np.int16)), b"\0" * (300 * 2**20))
    assert len(bomb) < 2**20
    with pytest.raises(ImageError, match="inflates"):
        decode(bomb)


def test_dicom_is_told_by_its_content():
    assert is_dicom(make_dicom(np.zeros((2, 2), np.int16)))
    assert not is_dicom(encode(make_pixels()))
