"""Training scans changed anew in each epoch: document 000's augmentation, or RandAugment.

Document 000's is rotation ±40°, horizontal flip, translation up to 0.2 of the side, scale 0.8–1.2, each with its own
pass over the pixels. Here the four affine maps are multiplied first, and a whole batch is resampled once.

The drawn maps have the same distribution: the same uniform angle, coin, whole-pixel shifts and scale, about the same
centre. What leaves the frame between two passes stays black even when a later pass brings it back; since only a scale
and a shift follow, the rest is an axis-parallel rectangle in the result, and what lies outside it is blackened here.
What differs on purpose: the separate passes take the nearest pixel three times, the single pass interpolates linearly
once, so its edges are smoother; on smooth pictures the two differ by a few grey levels (tests/ml/test_transforms.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from ml.runtime.torchvision_import import torchvision

RAND_AUGMENT = {"num_ops": 2, "magnitude": 9}  # Cubuk et al. 2020, as torchvision's references train with it


@dataclass(frozen=True)
class Augment:
    """How an epoch changes its scans: by seed, epoch, scan and how often it stood there before, and by nothing else."""

    kind: Literal["document", "randaugment"]
    seed: int
    epoch: int
    flip: bool = True

    def __call__(self, pixels: np.ndarray, scans: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """uint8 [n, height, width, 3] of these scans → the same shape."""
        keys = [(self.seed, self.epoch, int(scan), int(turn)) for scan, turn in zip(scans, turns, strict=True)]
        if self.kind == "randaugment":
            return np.stack([_rand_augment(image, key, self.flip) for image, key in zip(pixels, keys, strict=True)])
        ranges = Augmentation(flip=Augmentation.flip if self.flip else 0.0)
        return augment(pixels, [draw(ranges, key, *pixels.shape[1:3]) for key in keys])


def _rand_augment(image: np.ndarray, key: tuple[int, ...], flip: bool) -> np.ndarray:
    changes = torchvision().transforms.RandAugment(**RAND_AUGMENT)
    random = np.random.default_rng(key)
    mirrored = image[:, ::-1] if flip and random.random() < 0.5 else image
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
        torch.manual_seed(int(random.integers(2**62)))
        changed: torch.Tensor = changes(torch.from_numpy(mirrored.copy()).permute(2, 0, 1))
    return changed.permute(1, 2, 0).numpy()


# --- document 000's ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """The ranges that are drawn from."""

    degrees: float = 40.0
    flip: float = 0.5
    translate: float = 0.2
    scale: tuple[float, float] = (0.8, 1.2)


@dataclass(frozen=True)
class Draw:
    """One drawn change of one picture: angle in radians (counter-clockwise), shifts in whole pixels."""

    angle: float
    flip: bool
    shift_x: int
    shift_y: int
    scale: float


def draw(augmentation: Augmentation, key: tuple[int, ...], height: int, width: int) -> Draw:
    """What happens to picture `key` = (seed, epoch, scan, …): by the key alone, so that a run can be resumed."""
    random = np.random.default_rng(key)
    angle = math.radians(random.uniform(-augmentation.degrees, augmentation.degrees))
    flip = bool(random.random() < augmentation.flip)
    reach_x, reach_y = augmentation.translate * width, augmentation.translate * height
    shift_x, shift_y = round(random.uniform(-reach_x, reach_x)), round(random.uniform(-reach_y, reach_y))
    return Draw(angle, flip, shift_x, shift_y, float(random.uniform(*augmentation.scale)))


def augment(images: np.ndarray, draws: list[Draw]) -> np.ndarray:
    """uint8 [N, height, width, 3] → the same shape, each picture changed by its draw, black where nothing was."""
    height, width = images.shape[1:3]
    thetas = torch.tensor([_theta(one, height, width) for one in draws], dtype=torch.float32)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    grid = F.affine_grid(thetas, list(pixels.shape), align_corners=False)
    warped = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    result = warped.round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    for picture, one in zip(result, draws, strict=True):
        _blacken_what_left_the_frame(picture, one)
    return result


def _theta(one: Draw, height: int, width: int) -> list[list[float]]:
    """Output to input coordinates, both in [-1, 1]: undo the scale, the shift, the flip, then the rotation."""
    cos, sin = math.cos(one.angle), math.sin(one.angle)
    mirror = -1.0 if one.flip else 1.0
    aspect = height / width
    inverse = 1.0 / one.scale
    shift_x, shift_y = mirror * 2 * one.shift_x / width, 2 * one.shift_y / height
    return [
        [cos * mirror * inverse, -sin * aspect * inverse, -cos * shift_x + sin * aspect * shift_y],
        [sin / aspect * mirror * inverse, cos * inverse, -sin / aspect * shift_x - cos * shift_y],
    ]


def _blacken_what_left_the_frame(picture: np.ndarray, one: Draw) -> None:
    for axis, shift in ((0, one.shift_y), (1, one.shift_x)):
        first, last = _kept(picture.shape[axis], shift, one.scale)
        lines = picture if axis == 0 else picture.swapaxes(0, 1)
        lines[:first] = 0
        lines[last:] = 0


def _kept(side: int, shift: int, scale: float) -> tuple[int, int]:
    """The lines of the result whose pixels were inside the frame before and after the shift: [first, last)."""
    centre = (side - 1) / 2
    low, high = max(0, shift), min(side - 1, side - 1 + shift)
    first = math.ceil((low - 0.5 - centre) * scale + centre)
    last = math.floor((high + 0.5 - centre) * scale + centre) + 1
    return max(0, first), max(0, min(side, last))
