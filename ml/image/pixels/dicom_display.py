"""The grey levels and colours of a DICOM frame, as a viewer shows them (PS3.3 C.7.6.3, C.11.1 and C.11.2).

Grey values are rescaled to the units of the modality, then shown by the first of

1. the window that is asked for, in Hounsfield units, on frames that hold them;
2. the file's VOI LUT: the standard leaves the choice between LUT and window to the viewer, and whoever writes a LUT
   into a file says more by it than by the window beside it. pydicom and dcmtk prefer it as well;
3. the file's first window;
4. the soft tissue window, on frames in Hounsfield units;
5. as they are, if they have at most eight bits and no rescale, like an 8-bit PNG;
6. the range of the data, between percentiles (ml.image.pixels.grey).

MONOCHROME1 and the presentation LUT shape INVERSE both say that the least value is white: either inverts, both invert
once. Padding is black in the end, whatever the polarity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ml.image.pixels import frame_attributes as attributes
from ml.image.pixels.dicom import stored_values
from ml.image.pixels.grey import between, in_range, in_rgb, looked_up, windowed
from ml.image.pixels.picture import Picture, Window

if TYPE_CHECKING:
    from pydicom import Dataset

SOFT_TISSUE = Window(40.0, 400.0)
"""In Hounsfield units, the usual one for the abdomen."""
_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary captures: this SOP class, and those that begin with it and a dot."""


def draw(dataset: Dataset, frame: int, asked: Window | None = None) -> Picture:
    """The frame's pixels, uint8 [rows, columns, 3], and the window that they were drawn with."""
    from pydicom.pixels import apply_color_lut

    stored = stored_values(dataset, frame)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return Picture(_eight_bits(apply_color_lut(stored, dataset)[..., :3]))
    if stored.ndim == 3:
        shown = stored.astype(np.uint8) if dataset.BitsStored <= 8 and stored.min() >= 0 else in_range(stored)
        return Picture(np.ascontiguousarray(shown))
    grey, window = _grey(dataset, stored, frame, asked)
    return Picture(in_rgb(grey), window=window)


def _eight_bits(colours: np.ndarray) -> np.ndarray:
    """The colours of a palette, which are not stretched. Some files declare 16 bits, and use eight of them."""
    shift = 8 if colours.dtype.itemsize > 1 and colours.max() > 255 else 0
    return np.ascontiguousarray((colours >> shift).astype(np.uint8))


def _grey(dataset: Dataset, stored: np.ndarray, frame: int, asked: Window | None) -> tuple[np.ndarray, Window | None]:
    padding = _padding(dataset, stored)
    if _is_capture_of_ct(dataset):
        levels, window = _as_they_are(dataset, stored, padding), None
    else:
        levels, window = _shown(dataset, stored, frame, asked, padding)
    if _is_least_white(dataset):
        levels = 255 - levels
    if padding is not None:
        levels[padding] = 0
    return levels, window


def _is_least_white(dataset: Dataset) -> bool:
    shape = attributes.term(dataset, "PresentationLUTShape")
    return dataset.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE"


def _shown(
    dataset: Dataset, stored: np.ndarray, frame: int, asked: Window | None, padding: np.ndarray | None
) -> tuple[np.ndarray, Window | None]:
    in_hounsfield = _holds_hounsfield(dataset, frame)
    asked = asked if in_hounsfield else None
    table = None if asked else _first_item(dataset, "VOILUTSequence")
    window = asked or attributes.window(dataset, frame) or (SOFT_TISSUE if in_hounsfield else None)
    if table is None and window is None and _bits(dataset) <= 8 and not _is_rescaled(dataset, frame):
        return _as_they_are(dataset, stored, padding), None
    if table is None and window is None and _first_item(dataset, "ModalityLUTSequence") is None:
        return _whole_range(stored, attributes.rescale(dataset, frame)[0], padding), None
    values = _in_units(dataset, stored, frame)
    if table is not None:
        return _by_table(dataset, values, table), None
    return (in_range(values, padding) if window is None else windowed(values, window)), window


def _whole_range(stored: np.ndarray, slope: float, padding: np.ndarray | None) -> np.ndarray:
    """The range of the data in any unit: a rescale changes nothing of it but, with a negative slope, its direction."""
    levels = in_range(stored, padding)
    return levels if slope > 0 else 255 - levels


def _as_they_are(dataset: Dataset, stored: np.ndarray, padding: np.ndarray | None) -> np.ndarray:
    """Eight bits are grey levels already; fewer are spread over them. Signed ones are not levels, but a range."""
    if dataset.PixelRepresentation:
        return in_range(stored, padding)
    return between(stored, 0, 2**dataset.BitsStored - 1)


def _bits(dataset: Dataset) -> int:
    """The bits of a value; files of floating-point numbers store all of them."""
    return int(dataset.get("BitsStored") or dataset.BitsAllocated)


# --- units -----------------------------------------------------------------------------------------------------------


def _in_units(dataset: Dataset, stored: np.ndarray, frame: int) -> np.ndarray:
    """The values in the units of the modality (C.11.1): as stored, or float32, or float64 where 24 bits are too few."""
    if _first_item(dataset, "ModalityLUTSequence") is not None:
        from pydicom.pixels import apply_modality_lut

        return np.asarray(apply_modality_lut(stored, dataset), dtype=np.float32)
    slope, intercept = attributes.rescale(dataset, frame)
    exact = np.result_type(stored.dtype, np.float32)
    values = stored if slope == 1 else np.multiply(stored, slope, dtype=exact)
    return values if intercept == 0 else np.add(values, intercept, dtype=exact)


def _is_rescaled(dataset: Dataset, frame: int) -> bool:
    return _first_item(dataset, "ModalityLUTSequence") is not None or attributes.rescale(dataset, frame) != (1, 0)


def _holds_hounsfield(dataset: Dataset, frame: int) -> bool:
    """CT, unless it says that its values are something else, or has eight bits and nothing to make units of them."""
    if attributes.term(dataset, "Modality") != "CT":
        return False
    if attributes.rescale_type(dataset, frame) not in ("", "HU", "US"):  # US: unspecified
        return False
    return _bits(dataset) > 8 or attributes.has_rescale(dataset, frame)


def _is_capture_of_ct(dataset: Dataset) -> bool:
    """A screenshot of eight bits: its window and rescale, if any, are those of the picture that was on the screen."""
    sop_class = str(dataset.get("SOPClassUID") or "")
    is_capture = sop_class == _CAPTURE or sop_class.startswith(f"{_CAPTURE}.")
    return is_capture and attributes.term(dataset, "Modality") == "CT" and _bits(dataset) <= 8


def _padding(dataset: Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Where there is no data: PixelPaddingValue, or from it to PixelPaddingRangeLimit (C.7.5.1.1.2), and not finite."""
    if stored.dtype.kind == "f":
        value = dataset.get("FloatPixelPaddingValue", dataset.get("DoubleFloatPixelPaddingValue"))
        return ~np.isfinite(stored) | (stored == value)
    value = dataset.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted(_as_stored(dataset, each) for each in (value, limit if isinstance(limit, int) else value))
    return stored == low if low == high else (stored >= low) & (stored <= high)


def _as_stored(dataset: Dataset, value: int) -> int:
    """Some writers give the padding another sign than the pixels: the same bits, such as 63536 for −2000."""
    if not dataset.PixelRepresentation:
        return value % 2**dataset.BitsAllocated
    widths = (dataset.BitsStored, dataset.BitsAllocated)
    return next((value - 2**bits for bits in widths if 2 ** (bits - 1) <= value < 2**bits), value)


# --- lookup tables ---------------------------------------------------------------------------------------------------


def _first_item(dataset: Dataset, sequence: str) -> Dataset | None:
    items = dataset.get(sequence)
    return items[0] if items and "LUTData" in items[0] and "LUTDescriptor" in items[0] else None


def _by_table(dataset: Dataset, values: np.ndarray, item: Dataset) -> np.ndarray:
    """A VOI LUT (C.11.2.1.1): its descriptor has the number of entries (0: 65,536), the first value, and the bits."""
    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    table = _entries(item.LUTData, entries or 65_536, little=dataset.original_encoding[1] is not False)
    if first > 32_767 and values.min() < 0:  # a negative first value, written as an unsigned one
        first -= 65_536
    return looked_up(values, table, first, bits if 1 <= bits <= 16 else int(table.max()).bit_length())


def _entries(data: bytes | list[int], count: int, little: bool) -> np.ndarray:
    """The entries of a LUT, one a word, or (of eight bits) one a byte."""
    if not isinstance(data, bytes):
        return np.atleast_1d(np.asarray(data))[:count]
    word = "<u2" if little else ">u2"
    return np.frombuffer(data, word if len(data) >= 2 * count else np.uint8)[:count]
