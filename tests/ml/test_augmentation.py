"""Augmentation in one pass compared with document 000's four passes; and RandAugment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ml.image.pixels.augmentation import Augment, Augmentation, Draw, augment, draw
from ml.runtime.torchvision_import import torchvision
from tests.ml.builders import make_pixels

STILL = Draw(0.0, False, 0, 0, 1.0)


def smooth(side: int = 224) -> np.ndarray:
    """A smooth picture without symmetry: interpolation hardly matters, and a wrong map is noticed."""
    y, x = np.mgrid[:side, :side] / side
    return np.stack([255 * x, 255 * y, 127 + 120 * np.sin(5 * x + 3 * y)], axis=2).astype(np.uint8)


def in_four_passes(image: np.ndarray, one: Draw) -> np.ndarray:
    """The result of torchvision's four transforms with given random numbers."""
    functional = torchvision().transforms.functional
    picture = functional.rotate(Image.fromarray(image), math.degrees(one.angle))
    picture = functional.hflip(picture) if one.flip else picture
    picture = functional.affine(picture, 0.0, [one.shift_x, one.shift_y], 1.0, [0.0, 0.0])
    return np.asarray(functional.affine(picture, 0.0, [0, 0], one.scale, [0.0, 0.0]))


@pytest.mark.parametrize("index", range(12))
def test_one_pass_shows_what_four_passes_show(index):
    one, image = draw(Augmentation(), (7, 1, index), 224, 224), smooth()
    ours, theirs = augment(image[None], [one])[0].astype(int), in_four_passes(image, one).astype(int)
    inside = (ours.max(axis=2) > 0) & (theirs.max(axis=2) > 0)
    assert np.abs(ours - theirs)[inside].mean() < 2.0
    # The black frame is the same but for a line of pixels at its edges.
    assert ((ours.max(axis=2) > 0) != (theirs.max(axis=2) > 0)).mean() < 0.02


def test_a_still_draw_changes_nothing():
    image = make_pixels(side_seed := 3)
    assert np.array_equal(augment(image[None], [STILL])[0], image), side_seed


def test_a_flip_alone_mirrors_exactly():
    image = make_pixels(4)
    assert np.array_equal(augment(image[None], [Draw(0.0, True, 0, 0, 1.0)])[0], image[:, ::-1])


def test_a_shift_alone_moves_whole_pixels_and_leaves_black():
    image = make_pixels(5)
    moved = augment(image[None], [Draw(0.0, False, 7, -3, 1.0)])[0]
    assert np.array_equal(moved[:-3, 7:], image[3:, :-7])
    assert moved[-3:].max() == 0
    assert moved[:, :7].max() == 0


def test_what_left_the_frame_stays_black_when_the_scale_shrinks():
    white = np.full((100, 100, 3), 255, np.uint8)
    small = augment(white[None], [Draw(0.0, False, 20, 0, 0.8)])[0]
    columns = np.flatnonzero(small[50, :, 0] > 127)
    assert len(columns) == pytest.approx(64, abs=1)  # 80 of 100 columns stayed in the frame, then shrank


def test_draws_have_document_000s_distribution():
    draws = [draw(Augmentation(), (0, 1, index), 224, 224) for index in range(3000)]
    angles = np.degrees([one.angle for one in draws])
    shifts, scales = np.array([one.shift_x for one in draws]), np.array([one.scale for one in draws])
    assert (angles.min(), angles.max()) == pytest.approx((-40, 40), abs=0.5)
    assert (shifts.min(), shifts.max()) == (-45, 45)
    assert (scales.min(), scales.max()) == pytest.approx((0.8, 1.2), abs=0.01)
    assert np.mean([one.flip for one in draws]) == pytest.approx(0.5, abs=0.03)
    assert angles.std() == pytest.approx(80 / math.sqrt(12), rel=0.03)


def test_a_draw_depends_on_seed_epoch_and_picture_alone():
    assert draw(Augmentation(), (1, 2, 3), 64, 64) == draw(Augmentation(), (1, 2, 3), 64, 64)
    assert len({draw(Augmentation(), key, 64, 64) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))}) == 4


def test_a_batch_is_changed_as_its_pictures_are_alone():
    images = np.stack([make_pixels(index) for index in range(5)])
    draws = [draw(Augmentation(), (0, 0, index), 48, 48) for index in range(5)]
    alone = np.stack([augment(image[None], [one])[0] for image, one in zip(images, draws, strict=True)])
    assert np.array_equal(augment(images, draws), alone)


# --- by epoch --------------------------------------------------------------------------------------------------------


def changed(kind: str, count: int = 200, epoch: int = 1, flip: bool = True, side: int = 24) -> np.ndarray:
    """One picture, augmented as `count` different scans."""
    same = np.repeat(make_pixels(3, side, side, bright=True)[None], count, axis=0)
    return Augment(kind, 0, epoch, flip)(same, np.arange(count), np.zeros(count, np.int64))


@pytest.mark.parametrize("kind", ["document", "randaugment"])
def test_an_epochs_pictures_are_pictures(kind):
    found = changed(kind, 30)
    assert (found.shape, found.dtype) == ((30, 24, 24, 3), np.uint8)
    assert len({picture.tobytes() for picture in found}) > 20
    assert np.array_equal(found, changed(kind, 30))
    assert not np.array_equal(found, changed(kind, 30, epoch=2))


@pytest.mark.parametrize("kind", ["document", "randaugment"])
def test_the_changes_leave_the_global_random_numbers_alone(kind):
    torch.manual_seed(3), np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3), np.random.seed(3)
    changed(kind, 5)
    assert (torch.rand(1), np.random.rand()) == expected


def test_what_is_drawn_before_does_not_matter():
    torch.manual_seed(1)
    first = changed("randaugment", 10)
    torch.manual_seed(2)
    assert np.array_equal(first, changed("randaugment", 10))


def mirrored(kind: str, flip: bool) -> float:
    """The number of pictures in which the square of the left half is on the right."""
    side = 48
    marked = np.zeros((side, side, 3), np.uint8)
    marked[14:34, 6:18] = 255
    count = 150
    found = Augment(kind, 0, 1, flip)(np.repeat(marked[None], count, axis=0), np.arange(count), np.zeros(count, int))
    bright = np.abs(found.astype(int) - np.median(found, axis=(1, 2, 3), keepdims=True)).sum(axis=(1, 3))
    return float((bright[:, : side // 2].sum(1) < bright[:, side // 2 :].sum(1)).mean())


@pytest.mark.parametrize("kind", ["document", "randaugment"])
def test_flips_can_be_turned_off_where_left_and_right_matter(kind):
    assert 0.3 < mirrored(kind, flip=True) < 0.7
    assert mirrored(kind, flip=False) < 0.1


def test_without_flips_the_other_changes_are_drawn_all_the_same():
    key = (0, 1, 7, 0)
    with_flips, without = draw(Augmentation(), key, 64, 64), draw(Augmentation(flip=0.0), key, 64, 64)
    assert (with_flips.angle, with_flips.shift_x, with_flips.scale) == (without.angle, without.shift_x, without.scale)
    assert not without.flip
