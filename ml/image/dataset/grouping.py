"""Which scans belong together: those of one patient or study, copies, and near-duplicates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ml.image.dataset.perceptual_hash import group_near_duplicates
from ml.image.dataset.scan import ScanFile


def is_blank(scan: ScanFile) -> bool:
    """Whether the scan shows nothing but one grey level."""
    return scan.perceptual_hash == ""


def group_scans(scans: Sequence[ScanFile]) -> np.ndarray:
    """A group number for each scan, int64 [scans]. Scans that belong together, also transitively, have the same.

    Scans belong together if they share a patient, a study or a link (`ScanFile.links`), are the same file, or are
    near-duplicates. Blank scans have no content in common: an identical black picture does not connect two patients.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    near = group_near_duplicates([scan.perceptual_hash for scan in scans])
    tokens: dict[str, int] = {}
    edges = [(index, int(group)) for index, group in enumerate(near)]
    for index, scan in enumerate(scans):
        edges += [(index, len(scans) + tokens.setdefault(token, len(tokens))) for token in _tokens(scan)]
    size = len(scans) + len(tokens)
    rows, columns = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1][: len(scans)], dtype=np.int64)


def _tokens(scan: ScanFile) -> Iterator[str]:
    """What all scans have in common that belong together with this one."""
    if not is_blank(scan):
        yield f"content {scan.sha256}"
    if scan.patient:
        yield f"patient {scan.patient}"
    yield from (f"link {link}" for link in (*([scan.study] if scan.study else []), *scan.links))
