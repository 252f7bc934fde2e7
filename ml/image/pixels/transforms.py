"""The transform from a decoded scan to network input; it is stored with the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ml.image.pixels.decoding import PIXELS_VERSION
from ml.runtime.errors import ModelFileError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Spacing = tuple[float, float] | None
"""Millimetres (between rows, between columns) of a decoded picture; None where its file does not say."""


@dataclass(frozen=True)
class View:
    """The rectangle of a scan that the network sees, in pixels of the scan; beyond the scan the network sees black."""

    top: float
    left: float
    height: float
    width: float


@dataclass(frozen=True)
class Transform:
    """Resizing (Pillow, bilinear with antialiasing), then (x/255 - mean) / std.

    `window`: centre and width in Hounsfield units for decoding CT; None: the window stored in each file.
    `spacing_mm`: millimetres of a pixel of the network's input, so that an organ has one size whatever the field of
    view; None: the whole picture is resized. `rules`: the version of the pixel rules (ml.image.pixels.decoding).
    """

    height: int = 224
    width: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    window: tuple[float, float] | None = None
    spacing_mm: float | None = None
    rules: int = PIXELS_VERSION

    def view(self, height: int, width: int, spacing: Spacing = None) -> View:
        """What the network sees of a scan of this size: all of it, or with `spacing_mm` its middle."""
        if self.spacing_mm is None or spacing is None:
            return View(0, 0, height, width)
        seen = (self.height * self.spacing_mm / spacing[0], self.width * self.spacing_mm / spacing[1])
        return View((height - seen[0]) / 2, (width - seen[1]) / 2, *seen)

    def resize(self, image: np.ndarray, spacing: Spacing = None) -> np.ndarray:
        """uint8 [any, any, 3] → uint8 [height, width, 3].

        With `spacing_mm` and the picture's spacing it is resampled to the one spacing, then cropped or padded with
        black around its centre. Without either, it is resized as a whole.
        """
        if image.shape[:2] == (self.height, self.width) and (self.spacing_mm is None or spacing is None):
            return image
        rows = _Side.of(image.shape[0], self.height, spacing[0] if spacing else None, self.spacing_mm)
        columns = _Side.of(image.shape[1], self.width, spacing[1] if spacing else None, self.spacing_mm)
        size, box = (columns.length, rows.length), (columns.first, rows.first, columns.last, rows.last)
        resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, box))
        if resized.shape[:2] == (self.height, self.width):
            return resized
        padded = np.zeros((self.height, self.width, 3), np.uint8)
        padded[rows.at : rows.at + rows.length, columns.at : columns.at + columns.length] = resized
        return padded

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, height, width, 3] → float32 [N, 3, height, width]. The engines fuse this into their graph."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std

    @property
    def of_pixels(self) -> tuple[Any, ...]:
        """What the resized pixels depend on: two transforms that are equal in this need one decoding."""
        return self.height, self.width, self.window, self.spacing_mm, self.rules

    def as_dict(self) -> dict[str, Any]:
        """For the model file's metadata."""
        return {"resize": "bilinear-antialias", **asdict(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Transform:
        """The inverse of `as_dict`. ModelFileError if a later version wrote it, whose rules are not known here."""
        mean, std = (tuple(float(value) for value in fields[name]) for name in ("mean", "std"))
        window, rules = fields.get("window"), int(fields.get("rules", 1))
        if not 1 <= rules <= PIXELS_VERSION:
            raise ModelFileError(
                f"The network learnt with version {rules} of the pixel rules, and this installation knows 1 to "
                f"{PIXELS_VERSION}: update it, or train the network anew."
            )
        return cls(
            int(fields["height"]), int(fields["width"]), mean, std,  # type: ignore[arg-type]
            tuple(window) if window else None, fields.get("spacing_mm"), rules,  # type: ignore[arg-type]
        )  # fmt: skip


@dataclass(frozen=True)
class _Side:
    """One side of a resize: pixels `first` to `last` of the scan become `length` pixels of the input, from `at` on."""

    first: float
    last: float
    at: int
    length: int

    @classmethod
    def of(cls, pixels: int, side: int, spacing: float | None, wanted: float | None) -> _Side:
        if spacing is None or wanted is None:
            return cls(0, pixels, 0, side)
        seen = side * wanted / spacing  # pixels of the scan that fill the input
        if seen <= pixels:
            return cls((pixels - seen) / 2, (pixels + seen) / 2, 0, side)
        length = max(1, round(pixels * spacing / wanted))
        return cls(0, pixels, (side - length) // 2, length)
