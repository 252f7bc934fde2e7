"""The scans of the few-shot curve: a zip of real ones, or phantoms whose masses are small."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ml.image.dataset.scans import DatasetReport, check_dataset
from ml.image.dataset.splits import group_scans, split_scans
from ml.image.pixels.transforms import Transform
from ml.runtime.archives import extract_zip
from ml.synthetic.phantom import make_phantom, paint
from ml.synthetic.phantom_files import png_bytes

MASS_MM = (6.0, 20.0)
"""Diameter of a phantom's mass. Those of the demo, of 56 to 70 mm, are seen by random features too."""
TEST_SHARE = 0.3


@dataclass(frozen=True)
class Scans:
    """`pixels`: uint8 [scans, height, width, 3]; `groups`: scans of one patient, copies and near-duplicates share a
    number; `pool` may be learned from, `test` is held out, and no group is on both sides."""

    report: DatasetReport
    pixels: np.ndarray
    groups: np.ndarray
    pool: np.ndarray
    test: np.ndarray

    @classmethod
    def read(cls, folder: Path, transform: Transform) -> Scans:
        """The scans of a folder with one subfolder a class."""
        found: dict[int, np.ndarray] = {}
        report = check_dataset(folder, on_pixels=lambda at, image: found.update({at: transform.resize(image)}))
        report.raise_for_problems()
        split = split_scans(report, 0, TEST_SHARE, 0)
        pixels = np.stack([found[at] for at in range(report.images)])
        return cls(report, pixels, group_scans(report.scans), split.train, split.test)

    def draw(self, count: int, seed: int) -> np.ndarray | None:
        """`count` scans a class of the pool, from as many groups as it has; None where the pool is too small."""
        random, labels, drawn = np.random.default_rng([seed, count]), self.report.labels, []
        for label in range(len(self.report.names)):
            scans = random.permutation(self.pool[labels[self.pool] == label])
            if len(scans) < count:
                return None
            rank = np.argsort([(self.groups[scans[:at]] == self.groups[scan]).sum() for at, scan in enumerate(scans)])
            drawn.append(scans[rank[:count]])
        return np.sort(np.concatenate(drawn))


def unpack(archive: Path, folder: Path) -> Path:
    """A zip's scans."""
    extract_zip(archive, folder / "scans")
    return folder / "scans"


def write_phantoms(folder: Path, patients: int, seed: int = 0, size: int = 256) -> Path:
    """One slice a patient; every other one has a mass of 6 to 20 mm. Returns the folder."""
    for patient in range(patients):
        made = make_phantom(patient, patient % 2 == 1, seed)
        if made.tumour is not None:
            diameter = np.random.default_rng([seed, patient, 99]).uniform(*MASS_MM)
            made = replace(made, tumour=replace(made.tumour, radius=diameter / 2))
        image = paint(made, 0, 1, size)
        path = folder / image.label / f"{image.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(image))
    return folder
