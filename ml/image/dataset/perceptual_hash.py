"""A 255-bit perceptual hash, to find copies of a scan that were resized, recompressed or brightened.

A scan is averaged to 32 × 32 cells and transformed by a DCT-II; of the 16 × 16 lowest frequencies without the mean, the
signs are kept. This is the hash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010),
with four times as many bits: with 64, slices of the same organ cannot be distinguished. Two scans are near-duplicates
if at most `MAX_DISTANCE` bits differ.

`MAX_DISTANCE` was chosen on the 429 distinct pictures of shared/data/mri-465.zip and on 300 slices of 60 phantom
patients. Number of bits that each change flips (worst picture, worst 1 %, median):

    JPEG of quality 90, 50, 30        2 1 0     8 6 1     11 7 1
    to half, 0.7, double, 224 × 224   8 5 0     7 4 0     2 2 0     3 2 0
    contrast ± 10 %                   8 6 1
    10 % brighter, darker             10 7 0    36 21 9   (dark pixels are clipped to black)
    noise of 4 grey levels            10 5 1
    gamma 0.8, 1.2                    14 13 6   14 11 5
    half the size, then JPEG of quality 60, brighter by 5 % with 10 % more contrast    13 9 2
    1 %, 2 % of each side cut off     39 37 23  73 66 46

Of 91,806 pairs of distinct pictures, 23 differ by 18 bits or fewer: up to 17 they are copies, at 18 neighbouring slices
of one head. From 21 bits on, neighbouring slices become frequent, and phantoms of different patients start to match. So
pictures that were cropped by more than about 1 % are not found, and slices of one patient are kept together only by the
patient id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from PIL import Image

from ml.image.pixels.picture import BLANK

CELLS, FREQUENCIES = 32, 16
MAX_DISTANCE = 18  # bits
_BLOCK = 256  # rows that are compared at once: 10,000 scans × 256 × 4 bytes = 10 MB


def hash_image(pixels: np.ndarray) -> str:
    """The hash of a picture, uint8 [height, width, 3], as 64 hex digits; "" for a blank one, which matches nothing."""
    cells = np.round(_cell_means(pixels), 4)  # the last digits of a sum differ between machines
    if np.ptp(cells) < BLANK:
        return ""
    basis = _dct_basis()
    signs = (basis @ cells @ basis.T).ravel()[1:] > 1e-6
    return np.packbits(signs).tobytes().hex()


def _cell_means(pixels: np.ndarray) -> np.ndarray:
    """Mean grey level of each cell, [32, 32]. Cells may split pixels, so that they do not shift with the image size."""
    grey = np.asarray(Image.fromarray(pixels).convert("L"))  # ITU-R BT.601
    # Vector by vector: for matrix products BLAS would start threads, which slow down our own thread pool.
    bands = np.stack([share @ grey[first : first + len(share)] for first, share in _cell_weights(grey.shape[0])])
    return np.stack(
        [bands[:, first : first + len(share)] @ share for first, share in _cell_weights(grey.shape[1])], axis=1
    )


@lru_cache(maxsize=512)
def _cell_weights(length: int) -> tuple[tuple[int, np.ndarray], ...]:
    """For each of the 32 cells along a side: its first pixel, and the weights of the pixels from there on."""
    edges = np.arange(CELLS + 1) * length / CELLS
    cells = []
    for low, high in pairwise(edges):
        pixel = np.arange(int(low), min(int(np.ceil(high)), length))
        share = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
        cells.append((int(low), share / share.sum()))
    return tuple(cells)


@lru_cache(maxsize=1)
def _dct_basis() -> np.ndarray:
    frequency, cell = np.arange(FREQUENCIES)[:, None], np.arange(CELLS)[None]
    return np.cos(np.pi * frequency * (2 * cell + 1) / (2 * CELLS))


def group_near_duplicates(hashes: Sequence[str | None]) -> np.ndarray:
    """Group near-duplicates transitively: a group number for each hash, int64 [n].

    A scan without a hash (None or "") is in a group of its own. All pairs are compared in bounded memory; 10,000 hashes
    take about 1 s on one core.
    """
    groups = np.arange(len(hashes))
    present = [index for index, one in enumerate(hashes) if one]
    if present:
        distinct, place = np.unique(np.array([hashes[index] for index in present]), return_inverse=True)
        first = np.full(len(distinct), len(groups))
        np.minimum.at(first, place, present)
        groups[present] = first[_connected(_signs(distinct))[place]]
    return groups


def match_any(hashes: Sequence[str | None], others: Sequence[str | None]) -> np.ndarray:
    """For each of `hashes`, whether it is a near-duplicate of any of `others`: bool [len(hashes)]."""
    found = np.zeros(len(hashes), dtype=bool)
    present = [index for index, one in enumerate(hashes) if one]
    pool = sorted({one for one in others if one})
    if present and pool:
        signs = _signs([hashes[index] or "" for index in present])
        for _, hits in _compare(_signs(pool), signs):
            found[present] |= hits.any(axis=0)
    return found


def _signs(hashes: Sequence[str] | np.ndarray) -> np.ndarray:
    """±1 for each bit, float32 [n, 256]: the dot product of two rows is exactly 256 - 2 · (differing bits)."""
    packed = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(len(hashes), -1)
    return np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1


def _compare(some: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(some), _BLOCK):
        yield start, some[start : start + _BLOCK] @ others.T >= some.shape[1] - 2 * MAX_DISTANCE


def _connected(signs: np.ndarray) -> np.ndarray:
    """The first member of each row's group. Groups are merged block by block, so that not all pairs are in memory."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    roots = every = np.arange(len(signs))
    for start, hits in _compare(signs, signs):
        rows, columns = np.nonzero(hits & (roots[start : start + len(hits), None] != roots))  # not yet in one group
        edges = (np.concatenate([rows + start, every]), np.concatenate([columns, roots]))
        graph = coo_array((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(len(signs), len(signs)))
        labels = connected_components(graph, directed=False)[1]
        roots = np.unique(labels, return_index=True)[1][labels]
    return roots
