"""The transform from pixels to network input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ml.image.pixels.transforms import Transform
from tests.ml.builders import make_pixels


@pytest.mark.parametrize("window", [None, (40.0, 400.0)])
def test_a_transform_comes_back_from_its_metadata(window):
    transform = Transform(64, 96, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), window)
    assert Transform.from_dict(transform.as_dict()) == transform


def test_a_transform_of_before_there_were_windows_comes_back_too():
    fields = Transform(64, 96).as_dict()
    del fields["window"]
    assert Transform.from_dict(fields) == Transform(64, 96)


def test_resize_gives_the_networks_size():
    assert Transform(64, 96).resize(make_pixels()).shape == (64, 96, 3)


def test_a_picture_of_the_right_size_is_left_as_it_is():
    pixels = make_pixels(0, 64, 96)
    assert Transform(64, 96).resize(pixels) is pixels


def test_resizing_is_pillows_with_antialiasing():
    pixels = make_pixels(0, 90, 90)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(Transform(32, 32).resize(pixels), expected)


def test_normalized_pixels_have_the_channels_first():
    pixels = np.stack([make_pixels(0, 32, 32), make_pixels(1, 32, 32)])
    transform = Transform(32, 32, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    found = transform.normalize(torch.from_numpy(pixels))
    assert found.shape == (2, 3, 32, 32)
    assert found[1, 0].numpy() == pytest.approx((pixels[1, :, :, 0] / 255 - 0.5) / 0.5, abs=1e-6)
    assert found[1, 1].numpy() == pytest.approx((pixels[1, :, :, 1] / 255 - 0.25) / 0.25, abs=1e-6)
    assert found[1, 2].numpy() == pytest.approx(pixels[1, :, :, 2] / 255, abs=1e-6)
