"""Input statistics: six simple figures of a scan, independent of any network.

They take a quarter of a millisecond, show drift over time (ml.image.serving.drift_reference), and detect what networks
do not: a colour photograph, a negative, another window (ml.image.networks.ood).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DARK, BRIGHT = 8.0, 247.0
"""Grey levels below which a pixel is black, and above which it is white."""
_STEP = 2  # every second pixel in each direction; all of them would give nearly the same figures


@dataclass(frozen=True)
class Meaning:
    """One figure: the difference that another encoder or resizing may cause (`tolerance`), and how to describe scans
    with far `less` or far `more` of it than the training scans."""

    tolerance: float
    less: str
    more: str


MEANINGS = {
    "brightness": Meaning(2.0, "it is darker than they are", "it is brighter than they are"),
    "contrast": Meaning(2.0, "it has less contrast than they have", "it has more contrast than they have"),
    "black": Meaning(0.01, "less of it is black", "more of it is black"),
    "white": Meaning(0.01, "less of it is white", "more of it is white"),
    "sharpness": Meaning(0.5, "it is smoother than they are", "it is sharper or noisier than they are"),
    "colour": Meaning(1.0, "it has less colour than they have", "it has more colour than they have"),
}
"""By name. In grey levels, 0 to 255: brightness (mean), contrast (standard deviation), sharpness (mean difference of
pixels two apart), colour (mean difference of red and green, and of green and blue). Shares of pixels, 0 to 1: black,
white."""


def in_colour(pixels: np.ndarray) -> bool:
    """Whether a picture, uint8 [height, width, 3], shows colours, and not grey that is stored as colour."""
    red, green, blue = pixels[::_STEP, ::_STEP].transpose(2, 0, 1).astype(np.float32)
    return _colour(red, green, blue) > MEANINGS["colour"].tolerance


def _colour(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> float:
    return float(np.abs(red - green).mean() + np.abs(green - blue).mean()) / 2


def input_statistics(pixels: np.ndarray) -> dict[str, float]:
    """The figures of `MEANINGS` for a resized scan, uint8 [height, width, 3], with sides of at least 3 pixels."""
    red, green, blue = pixels[::_STEP, ::_STEP].transpose(2, 0, 1).astype(np.float32)
    grey = (red + green + blue) / 3
    values = (
        grey.mean(),
        grey.std(),
        (grey < DARK).mean(),
        (grey > BRIGHT).mean(),
        (np.abs(grey[1:] - grey[:-1]).mean() + np.abs(grey[:, 1:] - grey[:, :-1]).mean()) / 2,
        _colour(red, green, blue),
    )
    # Digits after the fourth differ between machines.
    return {name: round(float(value), 4) for name, value in zip(MEANINGS, values, strict=True)}
