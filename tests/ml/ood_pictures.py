"""Pictures that are out of distribution for a network of abdominal CT: uint8 [side, side, 3], drawn by a seed."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ml.synthetic.phantom import generate
from ml.synthetic.phantom_files import windowed

SIDE = 192
WINDOWS = {"bone": (400, 1800), "lung": (-600, 1500)}
_HU = (-1000, -150, -90, -20, 0, 15, 40, 60, 110, 160, 200, 250, 400, 900)
_T2 = (0, 10, 190, 120, 235, 220, 90, 110, 85, 40, 130, 60, 30, 5)
"""Intensity in T2-weighted MR by Hounsfield units: water and fat bright, muscle and bone dark."""


def phantoms(patients: int, slices: int, seed: int) -> list[np.ndarray]:
    """In-distribution scans: abdominal CT in the soft-tissue window."""
    return [_grey(windowed(one.hu)) for one in generate(patients, slices, seed, SIDE)]


def ood_pictures(count: int = 20) -> dict[str, list[np.ndarray]]:
    """`count` pictures of each kind."""
    hounsfield = [one.hu.astype(np.float32) for one in generate(count, 1, 99, SIDE)]
    windows = list(WINDOWS.values())
    return {
        "photographs": [photograph(seed) for seed in range(count)],
        "noise": [noise(seed) for seed in range(count)],
        "MR": [_magnetic(hu, seed) for seed, hu in enumerate(hounsfield)],
        "another window": [_in_window(hu, *windows[seed % len(windows)]) for seed, hu in enumerate(hounsfield)],
    }


def photograph(seed: int) -> np.ndarray:
    """A scene: a sky over a ground, shaded objects before them, and texture as in natural pictures (1/f); every
    second one nearly without colour."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : SIDE * 1j, 0 : 1 : SIDE * 1j]
    scene = random.uniform(40, 255, 3) * (1 - y[..., None]) + random.uniform(20, 220, 3) * y[..., None]
    for _ in range(random.integers(4, 12)):
        (left, top), (width, height) = random.uniform(0, 1, 2), random.uniform(0.05, 0.35, 2)
        turn = random.uniform(0, np.pi)
        u = ((x - left) * np.cos(turn) + (y - top) * np.sin(turn)) / width
        v = ((y - top) * np.cos(turn) - (x - left) * np.sin(turn)) / height
        inside = (np.maximum(abs(u), abs(v)) if random.random() < 0.4 else np.hypot(u, v)) < 1
        shaded = random.uniform(0, 255, 3) * np.clip(1 + 0.3 * u[..., None], 0.4, 1.6)
        scene = np.where(inside[..., None], shaded, scene)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(random.normal(size=(SIDE, SIDE))) / frequency ** random.uniform(0.8, 1.4)
    texture = np.fft.irfft2(spectrum, s=(SIDE, SIDE))
    picture = np.clip(scene + texture[..., None] / texture.std() * random.uniform(8, 28), 0, 255)
    if seed % 2:
        picture = picture.mean(axis=2, keepdims=True) * random.uniform(0.95, 1, 3)
    return picture.astype(np.uint8)


def noise(seed: int) -> np.ndarray:
    """Noise: grey or coloured, uniform or normal, fine or in blocks."""
    random = np.random.default_rng(seed)
    kinds = (
        lambda: random.integers(0, 256, (SIDE, SIDE, 3)),
        lambda: _grey(random.integers(0, 256, (SIDE, SIDE))),
        lambda: _grey(random.normal(random.uniform(60, 190), random.uniform(15, 60), (SIDE, SIDE))),
        lambda: _grey(np.kron(random.integers(0, 256, (SIDE // 4, SIDE // 4)), np.ones((4, 4)))),
    )
    return np.clip(kinds[seed % len(kinds)](), 0, 255).astype(np.uint8)


def _magnetic(hu: np.ndarray, seed: int) -> np.ndarray:
    """The same anatomy as T2-weighted MR would show it: another contrast, a bias field, and Rician noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : len(hu) * 1j, -1 : 1 : len(hu) * 1j]
    bend = random.uniform(-0.35, 0.35, 5)
    bias = np.exp(bend[0] * x + bend[1] * y + bend[2] * x * y + bend[3] * x * x + bend[4] * y * y)
    signal = np.interp(hu, _HU, _T2) * bias
    found = np.hypot(signal + random.normal(0, 6, hu.shape), random.normal(0, 6, hu.shape))
    return _grey(np.clip(found, 0, 255).astype(np.uint8))


def _in_window(hu: np.ndarray, centre: float, width: float) -> np.ndarray:
    return _grey(np.clip((hu - centre + width / 2) * (255 / width), 0, 255).astype(np.uint8))


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def resaved(pixels: np.ndarray, quality: int, side: int) -> np.ndarray:
    """The same scan after a resizing and JPEG, as another system may export it: uint8 [side, side, 3]."""
    import io

    sink = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR).save(sink, "JPEG", quality=quality)
    return np.asarray(Image.open(io.BytesIO(sink.getvalue())).convert("RGB"))
