"""The transform from pixels to network input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ml.image.pixels.decoding import PIXELS_VERSION
from ml.image.pixels.transforms import Transform, View
from ml.runtime.errors import ModelFileError
from tests.ml.builders import make_pixels


@pytest.mark.parametrize("window", [None, (40.0, 400.0)])
@pytest.mark.parametrize("spacing", [None, 0.8])
@pytest.mark.parametrize("rules", [1, PIXELS_VERSION])
def test_a_transform_comes_back_from_its_metadata(window, spacing, rules):
    transform = Transform(64, 96, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), window, spacing, rules)
    assert Transform.from_dict(json.loads(json.dumps(transform.as_dict()))) == transform


def test_a_transform_of_an_older_version_has_the_pixel_rules_of_then():
    fields = Transform(64, 96).as_dict()
    for added_later in ("window", "spacing_mm", "rules"):
        del fields[added_later]
    assert Transform.from_dict(fields) == Transform(64, 96, rules=1)


def test_a_transform_of_a_later_version_is_refused_with_what_to_do():
    fields = Transform().as_dict() | {"rules": PIXELS_VERSION + 1}
    with pytest.raises(ModelFileError, match="update it, or train the network anew"):
        Transform.from_dict(fields)


def test_pixels_depend_on_all_but_the_normalization():
    assert Transform(mean=(0, 0, 0), std=(1, 1, 1)).of_pixels == Transform().of_pixels
    changes = ({}, {"height": 32}, {"width": 32}, {"window": (40, 400)}, {"spacing_mm": 1}, {"rules": 1})
    assert len({Transform(**change).of_pixels for change in changes}) == len(changes)


def test_resize_gives_the_networks_size():
    assert Transform(64, 96).resize(make_pixels()).shape == (64, 96, 3)


def test_a_picture_of_the_right_size_is_left_as_it_is():
    pixels = make_pixels(0, 64, 96)
    assert Transform(64, 96).resize(pixels) is pixels


def test_resizing_is_pillows_with_antialiasing():
    pixels = make_pixels(0, 90, 90)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(Transform(32, 32).resize(pixels), expected)


# --- one size in millimetres -----------------------------------------------------------------------------------------


def organ(field_mm: float, side: int, height_mm: float = 40, width_mm: float = 60) -> tuple[np.ndarray, float]:
    """A slice of `side` pixels that shows a field of view of `field_mm`, with a bright rectangle in its middle; and
    its spacing."""
    spacing = field_mm / side
    y, x = (np.mgrid[:side, :side] + 0.5 - side / 2) * spacing
    inside = (abs(y) < height_mm / 2) & (abs(x) < width_mm / 2)
    return np.repeat((inside * 200).astype(np.uint8)[:, :, None], 3, axis=2), spacing


@pytest.mark.parametrize(("field_mm", "side"), [(300, 512), (500, 512), (200, 256), (90, 128), (120, 96)])
def test_an_organ_has_one_size_whatever_the_field_of_view(field_mm, side):
    picture, spacing = organ(field_mm, side)
    seen = Transform(128, 128, spacing_mm=1.0).resize(picture, (spacing, spacing))
    bright = seen[..., 0] > 100
    assert bright.any(1).sum() == pytest.approx(40, abs=1)
    assert bright.any(0).sum() == pytest.approx(60, abs=1)
    assert np.argwhere(bright).mean(0) == pytest.approx([63.5, 63.5], abs=1)


def test_pixels_that_are_no_squares_become_squares():
    picture, spacing = organ(300, 300, 40, 40)
    seen = Transform(128, 128, spacing_mm=1.0).resize(picture[::2], (2 * spacing, spacing))
    bright = seen[..., 0] > 100
    assert (bright.any(1).sum(), bright.any(0).sum()) == (40, 40)


def test_what_lies_beyond_the_scan_is_black():
    seen = Transform(100, 120, spacing_mm=1.0).resize(np.full((50, 200, 3), 90, np.uint8), (1.0, 0.5))
    assert (seen[25:75, 10:110] == 90).all()
    assert seen.sum() == 90 * 50 * 100 * 3
    assert Transform(100, 120, spacing_mm=1.0).view(50, 200, (1.0, 0.5)) == View(-25, -20, 100, 240)


def test_without_either_spacing_the_whole_picture_is_resized():
    pixels = make_pixels(0, 90, 60)
    plain = Transform(32, 32).resize(pixels)
    assert np.array_equal(Transform(32, 32, spacing_mm=0.5).resize(pixels), plain)
    assert np.array_equal(Transform(32, 32).resize(pixels, (0.3, 0.3)), plain)
    assert Transform(32, 32).view(90, 60, (0.3, 0.3)) == View(0, 0, 90, 60)


def test_a_tiny_spacing_leaves_a_pixel_to_see():
    seen = Transform(32, 32, spacing_mm=10.0).resize(np.full((40, 40, 3), 90, np.uint8), (0.01, 0.01))
    assert (seen > 0).any(2).sum() == 1


def test_normalized_pixels_have_the_channels_first():
    pixels = np.stack([make_pixels(0, 32, 32), make_pixels(1, 32, 32)])
    transform = Transform(32, 32, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    found = transform.normalize(torch.from_numpy(pixels))
    assert found.shape == (2, 3, 32, 32)
    assert found[1, 0].numpy() == pytest.approx((pixels[1, :, :, 0] / 255 - 0.5) / 0.5, abs=1e-6)
    assert found[1, 1].numpy() == pytest.approx((pixels[1, :, :, 1] / 255 - 0.25) / 0.25, abs=1e-6)
    assert found[1, 2].numpy() == pytest.approx(pixels[1, :, :, 2] / 255, abs=1e-6)
