"""Reads a frame of a DICOM file, by pydicom with gdcm and pyjpegls, or says why it cannot be read.

pydicom is imported with the first file: it takes a quarter of a second.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ml.image.pixels.limits import MAX_BYTES, check_size
from ml.image.pixels.picture import Origin, Picture
from ml.image.pixels.terms import body_part_of, modality_of
from ml.runtime.errors import ImageError
from ml.spec.headers import dicom as dicom_header
from ml.spec.headers import dicom_classes

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_REQUIRED = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated")
_OF_ONE_SAMPLE = frozenset({"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"})
_PHOTOMETRIC = _OF_ONE_SAMPLE | {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420"}
_REQUIRED_OF_INTEGERS = ("BitsStored", "PixelRepresentation")
_DAMAGED = "The DICOM file is damaged or cut off: its elements cannot be read."


def open_dataset(content: bytes, header_only: bool = False) -> Dataset:
    """The data set of a file, with or without a part-10 header.

    Raises:
        ImageError: it cannot be read, or is of a SOP class that is no picture.
    """
    import pydicom

    # What it finds odd it logs and warns of with the value, which may be a name.
    pydicom.config.logger.propagate = False
    _check_inflated_size(content)
    with _refusing(_DAMAGED):
        dataset = pydicom.dcmread(io.BytesIO(content), force=True, stop_before_pixels=header_only)
        sop_class = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or ""
    if refused := dicom_classes.refusal(str(sop_class)):
        raise ImageError(refused)
    return dataset


def origin_of(dataset: Dataset) -> Origin:
    """Where the picture comes from, in terms that the standard defines."""
    photometric = str(dataset.get("PhotometricInterpretation") or "").upper()
    kind = {"PALETTE COLOR": "palette"}.get(photometric, "grey" if photometric.startswith("MONOCHROME") else "colour")
    return Origin(modality_of(dataset.get("Modality")), body_part_of(dataset.get("BodyPartExamined")), kind)


def frame_count(dataset: Dataset) -> int:
    """How many frames the file declares; 1 where it does not say. ImageError if that is no number."""
    with _refusing("The DICOM file's NumberOfFrames is no number."):
        return max(1, int(dataset.get("NumberOfFrames") or 1))


def check_readable(dataset: Dataset) -> None:
    """ImageError that names what is missing, or what prevents the decoding; nothing is decoded for it."""
    pixels = next((keyword for keyword in _PIXELS if keyword in dataset), None)
    required = _REQUIRED + (_REQUIRED_OF_INTEGERS if pixels in ("PixelData", None) else ())
    missing = [keyword for keyword in required if dataset.get(keyword) in (None, "")]
    if missing or pixels is None:
        raise ImageError(f"The DICOM file lacks {', '.join(missing or ['PixelData'])}.")
    _check_values(dataset)
    check_size(int(dataset.Columns), int(dataset.Rows))
    _check_transfer_syntax(dataset)
    _check_colours(dataset)
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        _check_complete(dataset, len(dataset[pixels].value or b""))


def stored_values(dataset: Dataset, frame: int) -> np.ndarray:
    """The frame's values as the file stores them: [rows, columns], or [rows, columns, 3] in RGB.

    Bits above HighBit (overlays of old files) and below the lowest stored one are removed.
    """
    unused = _bits_below(dataset)
    if unused:
        dataset.BitsStored += unused
    try:
        values = decoded(dataset, frame)
    finally:
        if unused:
            dataset.BitsStored -= unused
    return values >> unused if unused else values


def decoded(dataset: Dataset, frame: int) -> np.ndarray:
    """The frame's values as pydicom gives them: [rows, columns], or [rows, columns, 3] in RGB."""
    from pydicom.pixels import pixel_array
    from pydicom.uid import JPEGBaseline8Bit

    # gdcm ends the whole process on some damaged JPEGs. Pillow decodes those of eight bits to the same values.
    plugin = "pillow" if dataset.file_meta.TransferSyntaxUID == JPEGBaseline8Bit else ""
    return pixel_array(dataset, index=frame, decoding_plugin=plugin)


def _bits_below(dataset: Dataset) -> int:
    """The bits below the lowest stored one. A JPEG codestream has none: it says itself how many bits it stores."""
    from pydicom.uid import RLELossless

    syntax, stored, high = dataset.file_meta.TransferSyntaxUID, dataset.get("BitsStored"), dataset.get("HighBit")
    if (syntax.is_encapsulated and syntax != RLELossless) or not isinstance(high, int) or not stored:
        return 0
    return max(0, high + 1 - stored) if high < dataset.BitsAllocated else 0


def read(content: bytes, choose: Callable[[int], int], draw: Callable[[Dataset, int], Picture]) -> Picture:
    """The frame that `choose` takes of so many, as `draw` shows it; raises as `open_picture` and `read_frame`."""
    return read_frame(open_picture(content), choose, draw)


def open_picture(content: bytes) -> Dataset:
    """The data set of a file whose frames can be read.

    Raises:
        ImageError: they cannot; the message names the cause.
    """
    dataset = open_dataset(content)
    with _telling_identity(dataset):
        if "Rows" not in dataset and "PixelData" not in dataset:
            raise ImageError(_why_empty(content))
        with _refusing(_DAMAGED):
            check_readable(dataset)
    return dataset


def read_frame(dataset: Dataset, choose: Callable[[int], int], draw: Callable[[Dataset, int], Picture]) -> Picture:
    """The frame that `choose` takes of so many, as `draw` shows it. Not for two threads at once.

    Raises:
        ImageError: it cannot be read; the message names the cause.
    """
    from ml.image.pixels import frame_attributes

    with _telling_identity(dataset), _refusing(_DAMAGED):
        frames = frame_count(dataset)
        frame = choose(frames)
        origin, spacing = origin_of(dataset), frame_attributes.spacing_mm(dataset, frame)
        identity = frame_attributes.identity(dataset, frame)
    with _telling_identity(dataset), _refusing(partial(_cause, dataset)):
        drawn = draw(dataset, frame)
    return Picture(drawn.pixels, origin, frame, frames, spacing, drawn.window, identity)


@contextmanager
def _telling_identity(dataset: Dataset) -> Iterator[None]:
    """A slice that cannot be shown still counts as one of its study: its ImageError tells whose it is."""
    from ml.image.pixels import frame_attributes

    try:
        yield
    except ImageError as error:
        with suppress(Exception):  # of a damaged file anything may raise anything
            error.identity = frame_attributes.identity(dataset, 0)
        raise


@contextmanager
def _refusing(cause: str | Callable[[Exception], str]) -> Iterator[None]:
    """Errors become ImageErrors: pydicom and its decoders raise all kinds of them on damaged files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(cause if isinstance(cause, str) else cause(error)) from error


def _cause(dataset: Dataset, error: Exception) -> str:
    kind = f"{dataset.file_meta.TransferSyntaxUID.name}, {dataset.BitsAllocated} bits allocated"
    causes = str(error).splitlines()  # a summary, then a line for each decoder
    if all("support" in cause for cause in causes[1:] or causes):  # such as JPEG of 12 bits a sample
        return f"The DICOM file's pixels ({kind}) are of a kind that no decoder here supports: send it uncompressed."
    return f"The DICOM file's pixels ({kind}) are damaged or cut off."


# --- refusals --------------------------------------------------------------------------------------------------------


def _why_empty(content: bytes) -> str:
    """Of a file that is cut off inside its compressed pixels pydicom gives nothing at all."""
    needed = 0 if _DEFLATED in content[:2048] else dicom_header.needed_bytes(io.BytesIO(content))
    if needed > len(content):
        return f"The DICOM file is cut off after {len(content)} of {needed} bytes (at least)."
    return "The DICOM file holds no picture: it lacks Rows, Columns and PixelData."


def _check_values(dataset: Dataset) -> None:
    """ImageError that names an attribute whose value the standard does not have."""
    photometric = str(dataset.PhotometricInterpretation).strip(" \0").upper()
    if photometric != dataset.PhotometricInterpretation:
        dataset.PhotometricInterpretation = photometric
    samples = 1 if photometric in _OF_ONE_SAMPLE else 3
    allocated, stored = dataset.BitsAllocated, dataset.get("BitsStored", 1)
    right = {
        "PhotometricInterpretation": photometric in _PHOTOMETRIC,
        "SamplesPerPixel": photometric not in _PHOTOMETRIC or dataset.SamplesPerPixel == samples,
        "BitsAllocated": allocated in (1, 8, 16, 32, 64),
        "BitsStored": isinstance(stored, int) and 1 <= stored <= max(1, allocated),
        "PixelRepresentation": dataset.get("PixelRepresentation", 0) in (0, 1),
    }
    wrong = [keyword for keyword, is_right in right.items() if not is_right]
    if wrong:
        raise ImageError(f"The DICOM file's {' and '.join(wrong)} cannot be: the standard has no such value.")


def _check_transfer_syntax(dataset: Dataset) -> None:
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.get("TransferSyntaxUID") or _guessed_syntax(dataset)
    dataset.file_meta.TransferSyntaxUID = syntax
    try:
        readable = not syntax.is_private and get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        readable = False
    if not readable:
        raise ImageError(
            f"The DICOM file's transfer syntax {_described(syntax)} cannot be decoded here: send it uncompressed, or "
            "compressed by JPEG, JPEG-LS, JPEG 2000 or RLE."
        )


def _check_colours(dataset: Dataset) -> None:
    """ImageError that names what colours need besides; a codestream says itself how it orders its samples."""
    needed = "RedPaletteColorLookupTableDescriptor" if dataset.PhotometricInterpretation == "PALETTE COLOR" else None
    if dataset.SamplesPerPixel > 1 and "PlanarConfiguration" not in dataset:
        if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            dataset.PlanarConfiguration = 0
        else:
            needed = "PlanarConfiguration"
    if needed and needed not in dataset:
        raise ImageError(f"The DICOM file lacks {needed}.")


def _described(syntax: UID) -> str:
    """Its UID and its name; nothing of what is no UID."""
    if not syntax.is_valid:
        return "(no valid UID)"
    return f"{syntax} ({syntax.name})" if syntax.name != syntax else str(syntax)


def _guessed_syntax(dataset: Dataset) -> UID:
    """The transfer syntax of a file without a part-10 header. A compressed one could only be guessed."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
        raise ImageError(
            "The DICOM file's pixels are compressed, but its part-10 header is missing, so that nothing tells the "
            "transfer syntax: send it with its header."
        )
    implicit, little = dataset.original_encoding
    if not little:
        return ExplicitVRBigEndian
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian


def _check_complete(dataset: Dataset, there: int) -> None:
    from pydicom.pixels.utils import get_expected_length

    frame_count(dataset)
    expected = get_expected_length(dataset)
    if there < expected:
        raise ImageError(f"The DICOM file is cut off after {there} of {expected} bytes of its pixels.")


def _check_inflated_size(content: bytes) -> None:
    # pydicom inflates a deflated data set without limit, so its size is measured first, in bounded memory.
    if _DEFLATED not in content[:2048]:
        return
    group_length = int.from_bytes(content[140:144], "little")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = len(inflater.decompress(content[144 + group_length :], 1 << 20))
        while inflater.unconsumed_tail and inflated <= MAX_BYTES:
            inflated += len(inflater.decompress(inflater.unconsumed_tail, 1 << 20))
    except zlib.error as error:
        raise ImageError("The DICOM file is deflated, and damaged.") from error
    if inflated > MAX_BYTES:
        raise ImageError(f"The DICOM data set inflates to more than {MAX_BYTES // 2**20} MiB.")
