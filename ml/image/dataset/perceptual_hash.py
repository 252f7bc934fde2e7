"""How alike two scans look: a descriptor of 255 bits, so that copies are found that share no byte.

A scan is averaged to 32 × 32 cells, turned into frequencies (DCT-II), and of the 16 × 16 lowest ones but the mean only
the signs are kept: the perceptual hash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions"
(2010), with four times its bits, since slices of one organ all look alike to 64. Two scans are near-duplicates when at
most `NEAR` bits differ.

`NEAR` was found on the 429 distinct pictures of shared/data/mri-465.zip and on 300 slices of 60 phantom patients. Bits
that the worst, the worst 1 % and the middle picture lose:

    JPEG of quality 90, 50, 30        2 1 0     8 6 1     11 7 1
    to half, 0.7, double, 224 × 224   8 5 0     7 4 0     2 2 0     3 2 0
    contrast ± 10 %                   8 6 1
    10 % brighter, darker             10 7 0    36 21 9   (what was dark is cut off at black)
    noise of 4 grey levels            10 5 1
    gamma 0.8, 1.2                    14 13 6   14 11 5
    half the size, then JPEG of quality 60, brighter by 5 % with 10 % more contrast    13 9 2
    1 %, 2 % of each side cut off     39 37 23  73 66 46

Of 91,806 pairs of distinct pictures 23 differ by 18 bits or fewer: copies up to 17, then (18) neighbouring slices of
one head. From 21 on such neighbours come in numbers, and the first two phantoms of different patients. So what lost
more than about 1 % by cropping is not found, and slices of one patient are kept together by the patient's name only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from PIL import Image

CELLS, FREQUENCIES = 32, 16
BITS = FREQUENCIES**2 - 1
NEAR = 18
BLANK = 2.0  # grey levels between the darkest and the brightest cell, below which there is nothing to compare
_BLOCK = 256  # rows of the comparison at once: 10,000 scans × 256 × 4 bytes = 10 MB


def describe(pixels: np.ndarray) -> str:
    """The descriptor of uint8 [height, width, 3] as 64 hex digits; "" for a blank scan, which resembles nothing."""
    cells = np.round(_averaged(pixels), 4)  # so that the last bits of a sum, which differ by machine, decide nothing
    if np.ptp(cells) < BLANK:
        return ""
    waves = _cosines()
    signs = (waves @ cells @ waves.T).ravel()[1:] > 1e-6
    return np.packbits(signs).tobytes().hex()


def _averaged(pixels: np.ndarray) -> np.ndarray:
    """Mean grey of exact cells, [32, 32]: whole-pixel cells would shift with the size, and the hash with them."""
    grey = np.asarray(Image.fromarray(pixels).convert("L"))  # ITU-R BT.601
    # Vector by vector: for whole matrices BLAS would start threads, which stand in each other's way in our threads.
    bands = np.stack([share @ grey[first : first + len(share)] for first, share in _shares(grey.shape[0])])
    return np.stack([bands[:, first : first + len(share)] @ share for first, share in _shares(grey.shape[1])], axis=1)


@lru_cache(maxsize=512)
def _shares(length: int) -> tuple[tuple[int, np.ndarray], ...]:
    """For each of the 32 cells along a side: its first pixel, and which share each pixel from there has in it."""
    edges = np.arange(CELLS + 1) * length / CELLS
    cells = []
    for low, high in pairwise(edges):
        pixel = np.arange(int(low), min(int(np.ceil(high)), length))
        share = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
        cells.append((int(low), share / share.sum()))
    return tuple(cells)


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    frequency, cell = np.arange(FREQUENCIES)[:, None], np.arange(CELLS)[None]
    return np.cos(np.pi * frequency * (2 * cell + 1) / (2 * CELLS))


def near_duplicates(descriptors: Sequence[str | None]) -> np.ndarray:
    """A group number for each descriptor, int64 [n]: the same where they are near-duplicates, also through others.

    What has no descriptor is alone. All pairs are compared, in bounded memory: 10,000 take about 1 s on one core.
    """
    groups = np.arange(len(descriptors))
    told = [index for index, one in enumerate(descriptors) if one]
    if told:
        distinct, place = np.unique(np.array([descriptors[index] for index in told]), return_inverse=True)
        first = np.full(len(distinct), len(groups))
        np.minimum.at(first, place, told)
        groups[told] = first[_linked(_signs(distinct))[place]]
    return groups


def resembling(some: Sequence[str | None], others: Sequence[str | None]) -> np.ndarray:
    """Whether each of `some` is a near-duplicate of any of `others`: bool [len(some)]."""
    found = np.zeros(len(some), dtype=bool)
    told = [index for index, one in enumerate(some) if one]
    pool = sorted({one for one in others if one})
    if told and pool:
        signs = _signs([some[index] or "" for index in told])
        for _, hits in _compared(_signs(pool), signs):
            found[told] |= hits.any(axis=0)
    return found


def _signs(descriptors: Sequence[str] | np.ndarray) -> np.ndarray:
    """±1 for each bit, float32 [n, 256]: the product of two rows is 256 minus twice the bits that differ, exactly."""
    packed = np.frombuffer(bytes.fromhex("".join(descriptors)), dtype=np.uint8).reshape(len(descriptors), -1)
    return np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1


def _compared(some: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(some), _BLOCK):
        yield start, some[start : start + _BLOCK] @ others.T >= some.shape[1] - 2 * NEAR


def _linked(signs: np.ndarray) -> np.ndarray:
    """The first of its group for each row; groups are joined block by block, so that no list of all pairs is kept."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    roots = every = np.arange(len(signs))
    for start, hits in _compared(signs, signs):
        rows, columns = np.nonzero(hits & (roots[start : start + len(hits), None] != roots))  # not yet joined
        edges = (np.concatenate([rows + start, every]), np.concatenate([columns, roots]))
        graph = coo_array((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(len(signs), len(signs)))
        labels = connected_components(graph, directed=False)[1]
        roots = np.unique(labels, return_index=True)[1][labels]
    return roots
