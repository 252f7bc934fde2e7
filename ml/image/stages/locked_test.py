"""A locked test set: a second dataset that a training is tested on, and that decides nothing else.

Its scans are added to the manifest and the pixels behind those of the dataset to learn from, on the side `locked`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256

import numpy as np

from ml.image.dataset.scans import DatasetReport, check_dataset, count_images, save_manifest
from ml.image.dataset.splits import LOCKED
from ml.image.pixels.picture import Picture
from ml.image.stages.run import Run
from ml.runtime.archives import extract_zip
from ml.runtime.errors import BadDataset, BadParams

FOLDER = "test_images"
"""Beside the folder of the other scans."""


def add_locked_test(run: Run, learnt: DatasetReport, on_progress: Callable[[float], None]) -> DatasetReport:
    """Add the run's locked test set to the manifest and the pixels of the dataset to learn from.

    BadDataset if it has problems or other classes; BadParams together with `folds` or `split: folders`.
    """
    assert run.environment.locked_test is not None
    if run.params.folds or run.params.split == "folders":
        raise BadParams("test_dataset_id: leave out folds and split, for the named dataset is all that is tested.")
    folder = run.config.data_ingestion.unzip_dir.parent / FOLDER
    extract_zip(run.environment.locked_test, folder)
    path, transform = run.config.data_ingestion.pixels_path, run.transform
    earlier = np.load(path, mmap_mode="r")
    partial = path.with_name(f".{path.name}.partial")
    pixels = np.lib.format.open_memmap(
        partial, "w+", np.uint8, (len(earlier) + count_images(folder), *earlier.shape[1:])
    )
    pixels[: len(earlier)] = earlier

    def keep(index: int, picture: Picture) -> None:
        pixels[len(earlier) + index] = transform.resize(picture.pixels, picture.spacing_mm)

    try:
        found = check_dataset(folder, None, keep, on_progress, transform.window)
        report = _joined(learnt, found)
        pixels.flush()
        partial.replace(path)  # the file may be the cache's own, under a second name
    finally:
        partial.unlink(missing_ok=True)
    save_manifest(report, run.config.data_ingestion.manifest_path)
    return report


def _joined(learnt: DatasetReport, tested: DatasetReport) -> DatasetReport:
    if tested.problems:
        raise BadDataset(f"test_dataset_id: {' '.join(tested.problems)}")
    if tested.names != learnt.names:
        names = (", ".join(each.names) for each in (tested, learnt))
        raise BadDataset("test_dataset_id: its classes are {}, not {}.".format(*names))
    locked = tuple(replace(scan, path=f"../{FOLDER}/{scan.path}", side=LOCKED) for scan in tested.scans)
    return replace(
        learnt,
        classes={name: count + tested.classes[name] for name, count in learnt.classes.items()},
        images=learnt.images + tested.images,
        digest=sha256(f"{learnt.digest} {tested.digest}".encode()).hexdigest(),
        scans=(*(replace(scan, side=None) for scan in learnt.scans), *locked),
        warnings=(*learnt.warnings, *(f"The dataset to test on: {text}" for text in tested.warnings)),
    )
