"""Reads a page of a PNG, JPEG, BMP, TIFF or WebP picture, by Pillow.

Eight bits are shown as they are, palettes too. More bits and floating-point numbers are stretched over the range of
their data (ml.image.pixels.grey): 12 bits stored in 16 would be nearly black. NaN and infinities are no data: black.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ml.image.pixels.grey import in_range, in_rgb
from ml.image.pixels.limits import TOO_LARGE, check_size
from ml.image.pixels.picture import Origin, Picture
from ml.runtime.errors import ImageError
from ml.spec.headers.image import open_picture

NOT_AN_IMAGE = "The file is not a readable PNG, JPEG, BMP, TIFF, WebP or DICOM image."
_MODES = {"1": "grey", "L": "grey", "LA": "grey", "I": "16-bit", "F": "float", "P": "palette", "PA": "palette"}
_BITS, _PHOTOMETRIC, _SUBFILE_TYPE, _SAMPLE_FORMAT = 258, 262, 254, 339  # TIFF tags
_REDUCED, _MASK = 1, 4  # bits of the subfile type: a preview and a mask are no slices
_DEEP_COLOURS = tuple(f"{channels};16{order}" for channels in ("RGB", "RGBA", "RGBX", "LA") for order in "BLN")


Draw = Callable[[Image.Image, bytes], np.ndarray]
"""From an opened picture and the file's bytes to uint8 [height, width, 3]."""


def read(content: bytes, choose: Callable[[int], int], draw: Draw) -> Picture:
    """The page that `choose` takes of so many, as `draw` shows it.

    Raises:
        ImageError: it cannot be read; the message names the cause.
    """
    with _opened(content) as picture:
        pages = _pages(picture)
        page = choose(len(pages))
        if pages[page]:
            picture.seek(pages[page])
            check_size(picture.width, picture.height)
        return Picture(draw(picture, content), Origin(kind=_kind(picture)), page, len(pages))


def page_count(content: bytes) -> int:
    """How many slices a picture holds. ImageError if it cannot be read."""
    with _opened(content) as picture:
        return len(_pages(picture))


def colour_mode(content: bytes) -> str:
    """How a picture stores its colours: grey, 16-bit, float, RGB, RGBA, palette, CMYK, … ImageError if unreadable."""
    with _opened(content) as picture:
        return "16-bit" if picture.mode.startswith("I;16") else _MODES.get(picture.mode, picture.mode)


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """The picture, of a sane size; whatever is wrong with it becomes an ImageError."""
    form = "picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_picture(io.BytesIO(content)) as picture:
                form = picture.format or form
                check_size(picture.width, picture.height)
                yield picture
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(TOO_LARGE) from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, …
        raise ImageError(_cause(form, content)) from error


def _cause(form: str, content: bytes) -> str:
    if form != "picture":
        return f"The {form} is damaged, or cut off after {len(content)} bytes."
    if content[:4] in (b"II*\0", b"MM\0*"):
        return "The TIFF has no picture that can be read: send grey of 1 to 32 bits, or RGB of 8 or 16 bits a channel."
    return NOT_AN_IMAGE


def _pages(picture: Image.Image) -> list[int]:
    """The pages that are slices. The previews of a TIFF and of a telephone's JPEG (MPO) are none."""
    count = getattr(picture, "n_frames", 1)
    if count == 1 or picture.format in ("JPEG", "MPO"):
        return [0]
    if picture.format != "TIFF":
        return list(range(count))
    pages = []
    for page in range(count):
        picture.seek(page)
        if not picture.tag_v2.get(_SUBFILE_TYPE, 0) & (_REDUCED | _MASK):  # type: ignore[attr-defined]
            pages.append(page)
    picture.seek(0)
    return pages or [0]


def _kind(picture: Image.Image) -> str:
    if picture.mode in ("P", "PA"):
        return "palette"
    return "grey" if picture.mode in ("1", "L", "LA", "I", "F") or picture.mode.startswith("I;16") else "colour"


def as_shown(picture: Image.Image, content: bytes) -> np.ndarray:
    """The pixels of a picture, uint8 [height, width, 3], upright; `content`: the file's bytes."""
    if _is_deep_colour(picture):
        return _upright(_colours(_all_bits(picture, content)), picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return in_rgb(_upright(_levels(picture), picture))
    ImageOps.exif_transpose(picture, in_place=True)
    return np.asarray(flat(picture), dtype=np.uint8)


def flat(picture: Image.Image) -> Image.Image:
    """A picture of eight bits a channel, in RGB."""
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        return _on_black(picture.convert("RGBA"))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _on_black(picture: Image.Image) -> Image.Image:
    """RGBA without its alpha channel."""
    # Scans have a black background. Just dropping the alpha channel would show hidden colours of transparent pixels.
    black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, picture).convert("RGB")


# --- more than eight bits --------------------------------------------------------------------------------------------


def _is_deep_colour(picture: Image.Image) -> bool:
    """Several channels of 16 bits. Pillow keeps the upper eight only: of 12 bits stored in 16 there would be four."""
    return picture.mode in ("RGB", "RGBA") and _raw_mode(picture).startswith(_DEEP_COLOURS)


def _raw_mode(picture: Image.Image) -> str:
    tiles: list[Any] = getattr(picture, "tile", [])
    arguments = tiles[0].args if tiles else ""
    return str(arguments if isinstance(arguments, str) else arguments[0])


def _set_raw_mode(picture: Image.Image, raw: str) -> None:
    def changed(arguments: Any) -> Any:
        return raw if isinstance(arguments, str) else (raw, *arguments[1:])

    picture.tile = [tile._replace(args=changed(tile.args)) for tile in picture.tile]  # type: ignore[attr-defined]


def _levels(picture: Image.Image) -> np.ndarray:
    """Grey levels of more than eight bits, uint8 [height, width]. TIFF's min-is-white (photometric interpretation 0)
    is inverted here: Pillow does so by itself up to eight bits, and no more."""
    tags = getattr(picture, "tag_v2", {})
    native = {"F;32BF": "F;32F", "I;32BS": "I;32S", "I;16BS": "I;16S"}.get(_raw_mode(picture))
    if native and picture.tile[0].codec_name == "libtiff":  # type: ignore[attr-defined]
        _set_raw_mode(picture, native)  # libtiff gives the machine's byte order; Pillow expects the file's
    values = _as_declared(np.asarray(picture), tags)
    levels = in_range(values)
    if tags.get(_PHOTOMETRIC) != 0:
        return levels
    return np.where(np.isfinite(values), 255 - levels, 0).astype(np.uint8)


def _as_declared(values: np.ndarray, tags: Mapping[int, Any]) -> np.ndarray:
    """Pillow has one mode, of signed 32 bits, for all integers of a TIFF but unsigned ones of 16 bits."""
    if values.dtype != np.int32 or not tags:
        return values
    if tags[_BITS][0] == 16:
        return values.astype(np.int16)
    return values.view(np.uint32) if tags.get(_SAMPLE_FORMAT, (1,))[0] == 1 else values


def _all_bits(picture: Image.Image, content: bytes) -> np.ndarray:
    """Values uint16 [height, width, 3 or 4]. Read twice: in one byte order Pillow keeps the upper bytes, in the other
    the lower ones."""
    raw = _raw_mode(picture)
    with open_picture(io.BytesIO(content)) as again:
        again.seek(picture.tell())
        if raw.startswith("LA;"):
            _set_raw_mode(again, "RGBA")  # the bytes as they are: upper and lower of grey, then of alpha
            grey, alpha = np.asarray(again).view(">u2").transpose(2, 0, 1)
            return np.stack([grey, grey, grey, alpha], axis=2).astype(np.uint16)
        _set_raw_mode(again, raw[:-1] + ("L" if raw.endswith("B") else "B"))
        return np.asarray(picture).astype(np.uint16) << 8 | np.asarray(again)


def _colours(values: np.ndarray) -> np.ndarray:
    """RGB of 16-bit channels: stretched as grey is, all channels alike, then on black where alpha says so."""
    levels = in_range(values[..., :3])
    if values.shape[2] == 3:
        return levels
    return np.rint(levels * (values[..., 3:] / 65_535.0)).astype(np.uint8)


def _upright(levels: np.ndarray, picture: Image.Image) -> np.ndarray:
    oriented = Image.fromarray(levels)
    oriented.getexif().update(picture.getexif())
    return np.asarray(ImageOps.exif_transpose(oriented))
