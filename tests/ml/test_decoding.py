"""Decoding of all image formats, and refused files."""

from __future__ import annotations

import struct
import time
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import DeflatedExplicitVRLittleEndian

from ml.image.pixels.decoding import MAX_PIXELS, MAX_SIDE, colour_mode, decode, is_dicom
from ml.runtime.errors import ImageError
from tests.ml.builders import encode, make_dicom, make_pixels


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


def test_many_frames_give_the_middle_one():
    frames = np.stack([np.full((4, 4), value, np.int16) for value in (-1000, 240, -1000)])
    assert decode(make_dicom(frames)).min() == 255


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
