"""Input statistics: each measures what its name says."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ml.image.pixels.statistics import MEANINGS, input_statistics
from tests.ml.builders import make_pixels
from tests.ml.ood_pictures import phantoms, resaved


def flat(*colour: int) -> np.ndarray:
    return np.full((32, 32, 3), colour or 100, np.uint8)


def test_all_figures_of_a_flat_grey_picture():
    found = input_statistics(flat(100))
    assert found == {"brightness": 100, "contrast": 0, "black": 0, "white": 0, "sharpness": 0, "colour": 0}
    assert list(found) == list(MEANINGS)


@pytest.mark.parametrize(("level", "name"), [(0, "black"), (255, "white")])
def test_shares_of_black_and_white_are_counted(level, name):
    half = flat(100)
    half[:16] = level
    assert input_statistics(half)[name] == 0.5
    assert input_statistics(half)["contrast"] > 40


def test_colour_is_how_far_the_channels_are_apart():
    assert input_statistics(flat(100, 120, 90))["colour"] == pytest.approx((20 + 30) / 2)


def test_noise_is_sharper_than_what_it_was_added_to():
    plain = make_pixels(seed=1, height=64, width=64)
    noisy = np.clip(plain + np.random.default_rng(0).normal(0, 30, plain.shape), 0, 255).astype(np.uint8)
    assert input_statistics(noisy)["sharpness"] > 1.5 * input_statistics(plain)["sharpness"]


def test_what_another_encoder_changes_lies_within_the_tolerances():
    for pixels in phantoms(4, 1, seed=3):
        before, after = input_statistics(pixels), input_statistics(resaved(pixels, 90, len(pixels)))
        for name, meaning in MEANINGS.items():
            assert after[name] == pytest.approx(before[name], abs=meaning.tolerance), name


def test_a_scan_of_224_pixels_takes_less_than_a_millisecond():
    pixels, taken = make_pixels(0, 224, 224), []
    for _ in range(50):
        started = time.perf_counter()
        input_statistics(pixels)
        taken.append(time.perf_counter() - started)
    assert min(taken) < 1e-3


@pytest.mark.parametrize("side", [3, 4, 31])
def test_the_smallest_pictures_have_figures_too(side):
    assert np.isfinite(list(input_statistics(make_pixels(0, side, side)).values())).all()
