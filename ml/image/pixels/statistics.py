"""Input statistics: what a scan looks like in six plain figures, whatever network sees it.

They cost a quarter of a millisecond, show drift from day to day (ml.image.serving.drift_reference), and tell what no
network was ever asked to tell apart: a colour photograph, a negative, another window (ml.image.networks.ood).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DARK, BRIGHT = 8.0, 247.0
"""Grey levels below which a pixel is black, and above which it is white."""
_STEP = 2  # pixels from one that is looked at to the next: a quarter of them says the same


@dataclass(frozen=True)
class Meaning:
    """One figure: how far another encoder, or another resizing, may move it without being noticed (`tolerance`), and
    what is said of a scan that has far `less` or far `more` of it than others."""

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
"""By name. Brightness (mean), contrast (standard deviation), sharpness (mean difference of neighbours, two pixels
apart) and colour (mean difference of red from green and of green from blue) are in grey levels, 0 to 255; black and
white are shares of the pixels, 0 to 1."""


def input_statistics(pixels: np.ndarray) -> dict[str, float]:
    """The figures of `MEANINGS` of a scan as the network sees it, uint8 [height, width, 3] with sides of 3 or more."""
    red, green, blue = pixels[::_STEP, ::_STEP].transpose(2, 0, 1).astype(np.float32)
    grey = (red + green + blue) / 3
    found = (
        grey.mean(),
        grey.std(),
        (grey < DARK).mean(),
        (grey > BRIGHT).mean(),
        (np.abs(grey[1:] - grey[:-1]).mean() + np.abs(grey[:, 1:] - grey[:, :-1]).mean()) / 2,
        (np.abs(red - green).mean() + np.abs(green - blue).mean()) / 2,
    )
    # What lies behind the fourth digit is the machine's, not the scan's.
    return {name: round(float(value), 4) for name, value in zip(MEANINGS, found, strict=True)}
