"""Augmentation of training scans, drawn again in each epoch: that of document 000, or RandAugment.

Document 000's is rotation by ±40°, horizontal flip, translation by up to 0.2 of the side, and scale 0.8 to 1.2, each in
its own pass over the pixels. Here the four affine maps are multiplied first, and a whole batch is resampled once.

The distribution of the maps is the same: the same uniform angle, coin, whole-pixel shifts and scale, about the same
centre. With separate passes, pixels that leave the frame are black even if a later pass moves them back. Since only a
scale and a shift follow, what remains is an axis-parallel rectangle in the result; everything outside of it is set to
black here. One difference is intended: separate passes take the nearest pixel three times, while the single pass
interpolates linearly once, so edges are smoother. On smooth pictures the two differ by a few grey levels
(tests/ml/test_augmentation.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from ml.runtime.torchvision_import import torchvision

RAND_AUGMENT = {"num_ops": 2, "magnitude": 9}  # Cubuk et al. 2020, with the values of torchvision's references


@dataclass(frozen=True)
class Augment:
    """The augmentation of an epoch: a function of seed, epoch, scan, and how often the scan occurred before."""

    kind: Literal["document", "randaugment"]
    seed: int
    epoch: int
    flip: bool = True

    def __call__(self, pixels: np.ndarray, scans: np.ndarray, repetitions: np.ndarray) -> np.ndarray:
        """Augment pixels, uint8 [n, height, width, 3], of these scans; the shape stays the same.

        `repetitions`: int [n], how often the scan occurred in this epoch before.
        """
        pairs = zip(scans, repetitions, strict=True)
        keys = [(self.seed, self.epoch, int(scan), int(repetition)) for scan, repetition in pairs]
        if self.kind == "randaugment":
            return np.stack([_rand_augment(image, key, self.flip) for image, key in zip(pixels, keys, strict=True)])
        ranges = Augmentation(flip=Augmentation.flip if self.flip else 0.0)
        return augment(pixels, [draw(ranges, key, *pixels.shape[1:3]) for key in keys])


def _rand_augment(image: np.ndarray, key: tuple[int, ...], flip: bool) -> np.ndarray:
    transform = torchvision().transforms.RandAugment(**RAND_AUGMENT)
    random = np.random.default_rng(key)
    mirrored = image[:, ::-1] if flip and random.random() < 0.5 else image
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
        torch.manual_seed(int(random.integers(2**62)))
        augmented: torch.Tensor = transform(torch.from_numpy(mirrored.copy()).permute(2, 0, 1))
    return augmented.permute(1, 2, 0).numpy()


# --- document 000 -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """The ranges of the random changes: degrees, probability, share of the side, factor."""

    degrees: float = 40.0
    flip: float = 0.5
    translate: float = 0.2
    scale: tuple[float, float] = (0.8, 1.2)


@dataclass(frozen=True)
class Draw:
    """The change of one picture: angle in radians (counter-clockwise), shifts in whole pixels."""

    angle: float
    flip: bool
    shift_x: int
    shift_y: int
    scale: float


def draw(augmentation: Augmentation, key: tuple[int, ...], height: int, width: int) -> Draw:
    """The change of picture `key` = (seed, epoch, scan, …), a function of the key, so that a run can be resumed."""
    random = np.random.default_rng(key)
    angle = math.radians(random.uniform(-augmentation.degrees, augmentation.degrees))
    flip = bool(random.random() < augmentation.flip)
    reach_x, reach_y = augmentation.translate * width, augmentation.translate * height
    shift_x, shift_y = round(random.uniform(-reach_x, reach_x)), round(random.uniform(-reach_y, reach_y))
    return Draw(angle, flip, shift_x, shift_y, float(random.uniform(*augmentation.scale)))


def augment(images: np.ndarray, draws: list[Draw]) -> np.ndarray:
    """Change each picture, uint8 [N, height, width, 3], by its draw. Pixels from outside of the frame are black."""
    height, width = images.shape[1:3]
    thetas = torch.tensor([_theta(one, height, width) for one in draws], dtype=torch.float32)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    grid = F.affine_grid(thetas, list(pixels.shape), align_corners=False)
    warped = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    result = warped.round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    for picture, one in zip(result, draws, strict=True):
        _blacken_outside(picture, one)
    return result


def _theta(one: Draw, height: int, width: int) -> list[list[float]]:
    """The affine map from output to input coordinates, both in [-1, 1]: inverse scale, shift, flip, then rotation."""
    cos, sin = math.cos(one.angle), math.sin(one.angle)
    mirror = -1.0 if one.flip else 1.0
    aspect = height / width
    inverse = 1.0 / one.scale
    shift_x, shift_y = mirror * 2 * one.shift_x / width, 2 * one.shift_y / height
    return [
        [cos * mirror * inverse, -sin * aspect * inverse, -cos * shift_x + sin * aspect * shift_y],
        [sin / aspect * mirror * inverse, cos * inverse, -sin / aspect * shift_x - cos * shift_y],
    ]


def _blacken_outside(picture: np.ndarray, one: Draw) -> None:
    for axis, shift in ((0, one.shift_y), (1, one.shift_x)):
        first, last = _inside(picture.shape[axis], shift, one.scale)
        lines = picture if axis == 0 else picture.swapaxes(0, 1)
        lines[:first] = 0
        lines[last:] = 0


def _inside(side: int, shift: int, scale: float) -> tuple[int, int]:
    """The lines [first, last) of the result whose pixels were inside the frame before and after the shift."""
    centre = (side - 1) / 2
    low, high = max(0, shift), min(side - 1, side - 1 + shift)
    first = math.ceil((low - 0.5 - centre) * scale + centre)
    last = math.floor((high + 0.5 - centre) * scale + centre) + 1
    return max(0, first), max(0, min(side, last))
