"""The attributes of one frame: its functional group, then the shared one, then the top level (PS3.3 C.7.6.16).

Numbers are read from the file's own text: what other software writes into a DS element (a decimal comma, NUL at the
end, "NaN") must neither stop the decoding nor pass for a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from ml.image.pixels.picture import Identity, Window

_TEXT = (None, "DS", "IS", "LO", "SH", "ST", "LT", "UT", "CS", "UN")
_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


def rescale(dataset: Dataset, frame: int) -> tuple[float, float]:
    """(slope, intercept); 1 and 0 where the file does not say, each by itself. A slope of 0 counts as none."""
    places = list(_places(dataset, frame, "PixelValueTransformationSequence"))
    slope, intercept = (_first(places, keyword) for keyword in ("RescaleSlope", "RescaleIntercept"))
    return slope or 1.0, intercept or 0.0


def has_rescale(dataset: Dataset, frame: int) -> bool:
    """Whether the file gives the frame a slope or an intercept."""
    places = list(_places(dataset, frame, "PixelValueTransformationSequence"))
    return any(_first(places, keyword) is not None for keyword in ("RescaleSlope", "RescaleIntercept"))


def rescale_type(dataset: Dataset, frame: int) -> str:
    """What the rescaled values are, such as HU; "" where the file does not say."""
    places = _places(dataset, frame, "PixelValueTransformationSequence")
    return next((text for place in places if (text := term(place, "RescaleType"))), "")


def window(dataset: Dataset, frame: int) -> Window | None:
    """The first window that the file gives the frame; None without one that has a centre and a width above 0."""
    for place in _places(dataset, frame, "FrameVOILUTSequence"):
        centre, width = number(place, "WindowCenter"), number(place, "WindowWidth")
        if centre is not None and width is not None and width > 0:
            function = term(place, "VOILUTFunction")
            return Window(centre, width, function if function in _FUNCTIONS else "LINEAR")
    return None


def spacing_mm(dataset: Dataset, frame: int) -> tuple[float, float] | None:
    """(between rows, between columns) in mm: PixelSpacing, else ImagerPixelSpacing; None where the file has none."""
    for place in _places(dataset, frame, "PixelMeasuresSequence"):
        for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
            found = [value for value in _numbers(place, keyword) if value is not None and value > 0]
            if len(found) == 2:
                return found[0], found[1]
    return None


def thickness_mm(dataset: Dataset, frame: int) -> float | None:
    """SliceThickness in mm; None where the file has none above 0."""
    found = _first(list(_places(dataset, frame, "PixelMeasuresSequence")), "SliceThickness")
    return found if found is not None and found > 0 else None


def identity(dataset: Dataset, frame: int) -> Identity:
    """Whose frame it is. What cannot be read, or is longer than the standard allows, says nothing."""
    number_ = number(dataset, "InstanceNumber")
    return Identity(
        _word(dataset, "StudyInstanceUID"),
        _word(dataset, "SeriesInstanceUID"),
        _word(dataset, "SOPInstanceUID"),
        int(number_) if number_ is not None and abs(number_) < 2**31 else None,
        _word(dataset, "AccessionNumber"),
        _word(dataset, "PatientID"),
        position_mm(dataset, frame),
    )


def position_mm(dataset: Dataset, frame: int) -> float | None:
    """Where the frame lies along the normal of its plane: ImagePositionPatient · (row × column) of
    ImageOrientationPatient (PS3.3 C.7.6.2.1.1), in mm; None where the file does not say both."""
    position = _vector(dataset, frame, "PlanePositionSequence", "ImagePositionPatient", 3)
    across = _vector(dataset, frame, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    if position is None or across is None:
        return None
    (a, b, c), (d, e, f) = across[:3], across[3:]
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    length = math.hypot(*normal)
    return math.fsum(p * n for p, n in zip(position, normal, strict=True)) / length if length > 0 else None


def _vector(dataset: Dataset, frame: int, macro: str, keyword: str, length: int) -> list[float] | None:
    for place in _places(dataset, frame, macro):
        found = [value for value in _numbers(place, keyword) if value is not None]
        if len(found) == length:
            return found
    return None


_MOST_CHARACTERS = 64  # of a UID and of a PatientID (PS3.5 6.2)


def _word(dataset: Dataset, keyword: str) -> str | None:
    try:
        value = dataset.get(keyword)
    except Exception:  # a value that breaks its representation; pydicom raises all kinds
        return None
    text = str(value).strip(" \0\t\r\n") if isinstance(value, str) else ""
    return text if text and len(text) <= _MOST_CHARACTERS and text.isprintable() else None


def number(place: Dataset, keyword: str) -> float | None:
    """The first value; None where there is none, or it is no finite number."""
    return next(iter(_numbers(place, keyword)), None)


def term(place: Dataset, keyword: str) -> str:
    """The first value of a code string, in capitals; "" where there is none."""
    return next(iter(_texts(place, keyword)), "").upper()


def _places(dataset: Dataset, frame: int, macro: str) -> Iterator[Dataset]:
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        sequence = dataset.get(groups) or ()
        items = sequence[index].get(macro) if index < len(sequence) else None
        if items:
            yield items[0]
    yield dataset


def _first(places: list[Dataset], keyword: str) -> float | None:
    return next((value for place in places if (value := number(place, keyword)) is not None), None)


def _numbers(place: Dataset, keyword: str) -> list[float | None]:
    return [_number(text) for text in _texts(place, keyword)]


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _texts(place: Dataset, keyword: str) -> list[str]:
    tag = Tag(keyword)
    if tag not in place:
        return []
    element = place.get_item(tag)
    if isinstance(element, RawDataElement) and element.VR in _TEXT:
        return [text.strip(" \0\t\r\n") for text in (element.value or b"").decode("ascii", "replace").split("\\")]
    value = place.get(keyword)
    if value is None:
        return []
    values = [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)
    return [str(each).strip(" \0\t\r\n") for each in values]
