"""PNG and TIFF of more than eight bits, min-is-white, pages, and what is refused; TIFF files are written by hand."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ml.image.pixels.decoding import colour_mode, decode, frames, read
from ml.runtime.errors import ImageError
from ml.spec.headers.image import look
from tests.ml.builders import encode, make_pixels

KINDS = {"u": 1, "i": 2, "f": 3}
DEFLATE = 8


def tiff(
    *pages: np.ndarray, order: str = "<", min_is_white: bool = False, deflated: bool = False, **tags: int
) -> bytes:
    """A TIFF 6.0 file of one strip a page: [rows, columns] or [rows, columns, 3]; `tags` (tag254=1) go to each page."""
    result = bytearray(struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8))
    for index, page in enumerate(pages):
        data = page.astype(page.dtype.newbyteorder(order)).tobytes()
        data = zlib.compress(data) if deflated else data
        channels = 1 if page.ndim == 2 else page.shape[2]
        entries = {
            256: page.shape[1], 257: page.shape[0], 258: 8 * page.itemsize, 259: DEFLATE if deflated else 1,
            262: 2 if channels == 3 else int(not min_is_white), 273: 0, 277: channels, 278: page.shape[0],
            279: len(data), 339: KINDS[page.dtype.kind],
        } | {int(name[3:]): value for name, value in tags.items()}  # fmt: skip
        begin, wide = len(result), channels > 1
        entries[273] = begin + 2 + 12 * len(entries) + 4 + (12 if wide else 0)
        result += struct.pack(f"{order}H", len(entries))
        for tag, value in sorted(entries.items()):
            if wide and tag in (258, 339):  # a value for each channel, behind the directory
                result += struct.pack(f"{order}HHII", tag, 3, channels, entries[273] - (12 if tag == 258 else 6))
            elif tag in (256, 257, 258, 259, 262, 277, 339, 274):
                result += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
            else:
                result += struct.pack(f"{order}HHII", tag, 4, 1, value)
        behind = struct.pack(f"{order}6H", *[8 * page.itemsize] * 3, *[KINDS[page.dtype.kind]] * 3) if wide else b""
        last = index == len(pages) - 1
        result += struct.pack(f"{order}I", 0 if last else entries[273] + len(data)) + behind + data
    return bytes(result)


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel: [rows, columns] or [rows, columns, 2 to 4]."""
    channels = 1 if values.ndim == 2 else values.shape[2]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def stretched(values: np.ndarray) -> np.ndarray:
    """Over the percentiles 0.5 to 99.5 of what is finite; the rest is black."""
    values = values.astype(float)
    low, high = np.percentile(values[np.isfinite(values)], [0.5, 99.5])
    return np.where(np.isfinite(values), np.clip((np.nan_to_num(values) - low) / (high - low), 0, 1) * 255, 0)


def ramp(kind: str) -> np.ndarray:
    """A ramp over 64 × 48 pixels with two outliers."""
    spans = {"u1": (0, 255), "u2": (1000, 3000), "i2": (-1000, 3000), "u4": (3_000_000_000, 4_000_000_000)}
    values = np.linspace(*spans.get(kind, (-1000, 3000)), 64 * 48).astype(kind).reshape(64, 48)
    if kind != "u1":
        values[0, :2] = (
            (np.iinfo(kind).min + (kind == "i2"), np.iinfo(kind).max) if kind[0] in "ui" else (np.nan, np.inf)
        )
    return values


@pytest.mark.parametrize("min_is_white", [False, True])
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "u4", "i4", "f4"])
def test_a_grey_tiff_is_read_in_both_byte_orders_and_polarities(kind, order, deflated, min_is_white):
    values = ramp(kind)
    content = tiff(values, order=order, min_is_white=min_is_white, deflated=deflated)
    expected = values.astype(float) if kind == "u1" else stretched(values)
    if min_is_white:
        expected = np.where(np.isfinite(values), 255 - expected, 0)
    found = decode(content)
    assert np.abs(found - expected[:, :, None]).max() <= 0.51
    assert look(io.BytesIO(content), 10**6) == ("image/tiff", 48, 64, 1)


@pytest.mark.parametrize("min_is_white", [False, True])
def test_a_tiff_of_one_bit_is_black_and_white(min_is_white):
    picture = Image.fromarray(np.array([[0, 255] * 8] * 8, np.uint8)).convert("1")
    options = {"tiffinfo": {262: 0}} if min_is_white else {}
    expected = np.asarray(picture.convert("L"))
    found = decode(encode(picture, "TIFF", **options))
    with Image.open(io.BytesIO(encode(picture, "TIFF", **options))) as stored:
        assert stored.tag_v2[262] == (0 if min_is_white else 1)
    assert found[..., 0].tolist() == expected.tolist()


def test_the_same_sixteen_bits_look_the_same_in_every_file():
    values = ramp("u2")
    expected = decode(png16(values))
    for content in (tiff(values), tiff(values, order=">"), png16(np.repeat(values[:, :, None], 3, axis=2))):
        assert np.abs(decode(content).astype(int) - expected).max() <= 1


def test_corners_of_the_least_number_do_not_squeeze_a_tiff_of_signed_bits():
    values = ramp("i2")
    values[:16] = -32_768
    data = values[16:].astype(float)
    low, high = np.percentile(data, [0.5, 99.5])
    found = decode(tiff(values))[..., 0]
    assert found[:16].max() == 0
    assert np.abs(found[16:] - np.clip((data - low) / (high - low), 0, 1) * 255).max() <= 0.51


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflated", [False, True])
def test_colours_of_sixteen_bits_in_a_tiff_keep_all_their_bits(order, deflated):
    values = np.stack([ramp("u2"), ramp("u2") // 2, ramp("u2") // 4], axis=2)
    assert np.abs(decode(tiff(values, order=order, deflated=deflated)) - stretched(values)).max() <= 0.51


def test_colours_of_twelve_bits_in_a_png_are_stretched_all_channels_alike():
    values = np.random.default_rng(0).integers(0, 4096, (40, 50, 3)).astype(np.uint16)
    assert np.abs(decode(png16(values)) - stretched(values)).max() <= 0.51


@pytest.mark.parametrize("channels", [2, 4])
def test_the_alpha_of_sixteen_bits_puts_the_picture_on_black(channels):
    colours = np.random.default_rng(0).integers(0, 65_536, (40, 50, channels - 1)).astype(np.uint16)
    alpha = np.full((40, 50, 1), 65_535, np.uint16)
    alpha[:10], alpha[10:20] = 0, 32_768
    found = decode(png16(np.concatenate([colours, alpha], axis=2)))
    assert np.abs(found - stretched(colours) * (alpha / 65_535)).max() <= 1.01


def test_a_palette_is_not_stretched():
    picture = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    picture.putpalette([100, 110, 120, 130, 140, 150])
    assert decode(encode(picture))[0].tolist() == [[100, 110, 120], [130, 140, 150]]
    assert read(encode(picture)).origin.kind == "palette"


def test_a_deep_tiff_stands_upright_too():
    values = ramp("u2")
    assert np.array_equal(decode(tiff(values, tag274=6)), np.rot90(decode(tiff(values)), -1))


# --- pages -----------------------------------------------------------------------------------------------------------


def pages(count: int) -> list[np.ndarray]:
    """Pages of different grey, uint8 [8, 8]."""
    return [np.full((8, 8), 10 * (number + 1), np.uint8) for number in range(count)]


@pytest.mark.parametrize("form", ["TIFF", "WEBP", "PNG"])
def test_each_page_is_a_slice_of_its_own(form):
    first, *others = (Image.fromarray(page) for page in pages(3))
    content = encode(first, form, save_all=True, append_images=others, **({"lossless": True} if form == "WEBP" else {}))
    assert frames(content) == 3
    assert [int(decode(content, frame=page).mean()) for page in range(3)] == [10, 20, 30]
    found = read(content, frame="middle")
    assert (found.frame, found.frames, int(found.pixels.mean())) == (1, 3, 20)
    with pytest.raises(ImageError, match="holds 3 frames, and each is a slice"):
        decode(content)
    with pytest.raises(ImageError, match="no frame 3"):
        decode(content, frame=3)


def test_the_previews_of_a_tiff_are_no_slices():
    whole, preview = np.full((16, 16), 200, np.uint8), np.full((4, 4), 90, np.uint8)
    content = bytearray(tiff(whole, preview, tag254=0))
    at = content.rindex(struct.pack("<HHII", 254, 4, 1, 0))
    content[at : at + 12] = struct.pack("<HHII", 254, 4, 1, 1)
    assert frames(bytes(content)) == 1
    assert decode(bytes(content)).shape == (16, 16, 3)


def test_the_preview_behind_a_telephones_jpeg_is_no_slice():
    first, second = (Image.fromarray(make_pixels(seed)) for seed in (0, 1))
    content = encode(first, "MPO", save_all=True, append_images=[second])
    assert frames(content) == 1
    assert np.array_equal(decode(content), decode(encode(first, "JPEG")))
    assert look(io.BytesIO(content), 10**6).media_type == "image/jpeg"


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_a_picture_that_is_cut_off_says_after_how_many_bytes(form):
    whole = encode(make_pixels(0, 200, 200), form)
    half = len(whole) // 2
    with pytest.raises(ImageError, match=rf"The ({form}|file) .*(cut off after {half} bytes|not a readable)"):
        decode(whole[:half])


def test_a_tiff_of_a_kind_that_is_not_read_says_what_is():
    for refuse in (decode, colour_mode):
        with pytest.raises(ImageError, match=r"TIFF .* send grey of 1 to 32 bits"):
            refuse(tiff(np.zeros((4, 4), np.float64)))
