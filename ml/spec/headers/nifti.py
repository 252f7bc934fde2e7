"""What a NIfTI volume declares in its header: its sides, and how they lie in the body (NIfTI-1.1 and NIfTI-2).

Only single files with their header (`n+1`, `n+2`), plain or gzipped. Of a gzipped one the header alone is inflated. The
worker reads the values with nibabel.
"""

from __future__ import annotations

import math
import struct
import zlib
from itertools import permutations
from typing import IO, NamedTuple

HEAD_BYTES = 540
"""So many bytes, inflated, hold either header."""
GZIP = b"\x1f\x8b"
_PACKED_BYTES = 4096  # a header that does not shrink, and gzip's own with a name
Affine = tuple[tuple[float, float, float, float], ...]
"""Three rows: from voxel numbers (i, j, k, 1) to mm towards Right, Anterior, Superior."""


class _Kind(NamedTuple):
    """A version of the format: the length of its header, its magic, and where which numbers are."""

    length: int
    magic_at: int
    magic: bytes
    sides: tuple[int, str]
    spacing: tuple[int, str]
    codes: tuple[int, str]
    quaternion: tuple[int, str]
    rows: tuple[int, str]


_KINDS = (
    _Kind(348, 344, b"n+1\0", (40, "8h"), (76, "8f"), (252, "2h"), (256, "6f"), (280, "12f")),
    _Kind(540, 4, b"n+2\0\r\n\x1a\n", (16, "8q"), (104, "8d"), (344, "2i"), (352, "6d"), (400, "12d")),
)


class Header(NamedTuple):
    """Voxels of the three axes as stored, how they lie in the body, and how many such volumes there are."""

    sides: tuple[int, int, int]
    affine: Affine
    volumes: int = 1

    @property
    def axes(self) -> tuple[int, int, int]:
        """Which stored axes are nearest to left–right, back–front and feet–head; each once."""
        along = [self._along(axis) for axis in range(3)]

        def likeness(axes: tuple[int, ...]) -> float:
            return sum(along[axis][world] for world, axis in enumerate(axes))

        x, y, z = max(permutations(range(3)), key=likeness)
        return x, y, z

    def _along(self, axis: int) -> list[float]:
        """How much of the stored axis goes along each axis of the body, 0 to 1."""
        steps = [row[axis] for row in self.affine]
        return [abs(step) / math.hypot(*steps) for step in steps]

    @property
    def slices(self) -> int:
        """How many axial slices it has."""
        return self.sides[self.axes[2]]


def is_nifti(stream: IO[bytes]) -> bool:
    """Whether the stream is a NIfTI volume, plain or gzipped. It is rewound."""
    stream.seek(0)
    head = stream.read(_PACKED_BYTES)
    stream.seek(0)
    return begins_nifti(head)


def begins_nifti(head: bytes) -> bool:
    """Whether a file with these first bytes (4096, or all of it) is a NIfTI volume."""
    return _kind(_unpacked(head[:_PACKED_BYTES])) is not None


def read(stream: IO[bytes]) -> Header:
    """What the header declares. The stream is rewound.

    Raises:
        ValueError: it is no NIfTI volume, or does not say how large it is and how it lies.
    """
    stream.seek(0)
    head = _unpacked(stream.read(_PACKED_BYTES))
    stream.seek(0)
    found = _kind(head)
    if found is None:
        raise ValueError("This is no NIfTI volume.")
    kind, order = found
    axes, *sides = struct.unpack_from(order + kind.sides[1], head, kind.sides[0])
    if not 1 <= axes <= 7 or min(sides[:axes]) < 1:
        raise ValueError("The NIfTI volume declares no sizes.")
    sides = [side if axis < axes else 1 for axis, side in enumerate(sides)]
    affine = _affine(kind, order, head, sides)
    if not all(math.isfinite(value) for row in affine for value in row) or _is_flat(affine):
        raise ValueError("The NIfTI volume does not say how it lies in the body: its orientation is broken.")
    return Header((sides[0], sides[1], sides[2]), affine, math.prod(sides[3:]))


def _unpacked(head: bytes) -> bytes:
    if not head.startswith(GZIP):
        return head[:HEAD_BYTES]
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""


def _kind(head: bytes) -> tuple[_Kind, str] | None:
    """The version and the byte order; None for anything else."""
    for kind in _KINDS:
        if len(head) >= kind.length and head[kind.magic_at : kind.magic_at + len(kind.magic)] == kind.magic:
            for order in "<>":
                if struct.unpack_from(order + "i", head)[0] == kind.length:
                    return kind, order
    return None


# --- how it lies -----------------------------------------------------------------------------------------------------


def _affine(kind: _Kind, order: str, head: bytes, sides: list[int]) -> Affine:
    """By the standard's method 3 where the file has it, else 2, else 1 with x from right to left, as nibabel reads
    it."""
    qform, sform = struct.unpack_from(order + kind.codes[1], head, kind.codes[0])
    if sform > 0:
        rows = struct.unpack_from(order + kind.rows[1], head, kind.rows[0])
        return rows[:4], rows[4:8], rows[8:]
    spacing = struct.unpack_from(order + kind.spacing[1], head, kind.spacing[0])
    if qform > 0:
        return _by_quaternion(struct.unpack_from(order + kind.quaternion[1], head, kind.quaternion[0]), spacing)
    steps = (-(spacing[1] or 1.0), spacing[2] or 1.0, spacing[3] or 1.0)
    x, y, z = steps
    corner = [-(side - 1) / 2 * step for side, step in zip(sides, steps, strict=False)]
    return (x, 0.0, 0.0, corner[0]), (0.0, y, 0.0, corner[1]), (0.0, 0.0, z, corner[2])


def _by_quaternion(given: tuple[float, ...], spacing: tuple[float, ...]) -> Affine:
    b, c, d, *offset = given
    a = math.sqrt(max(0.0, 1.0 - (b * b + c * c + d * d)))
    x, y, z = spacing[1], spacing[2], spacing[3] * (-1 if spacing[0] < 0 else 1)
    return (
        ((a * a + b * b - c * c - d * d) * x, 2 * (b * c - a * d) * y, 2 * (b * d + a * c) * z, offset[0]),
        (2 * (b * c + a * d) * x, (a * a + c * c - b * b - d * d) * y, 2 * (c * d - a * b) * z, offset[1]),
        (2 * (b * d - a * c) * x, 2 * (c * d + a * b) * y, (a * a + d * d - b * b - c * c) * z, offset[2]),
    )


def _is_flat(affine: Affine) -> bool:
    """Whether an axis has no length."""
    return any(math.hypot(*(row[axis] for row in affine)) == 0 for axis in range(3))
