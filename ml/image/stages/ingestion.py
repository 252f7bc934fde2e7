"""Stage 1, data_ingestion: a folder of scans, or a zip (local or downloaded), is checked and decoded.

Writes manifest.json, dataset_report.json, and pixels.npy with all scans in the network's input size.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ml.image.dataset.scans import DatasetReport, check_dataset, count_images, load_manifest, save_manifest
from ml.image.networks import weights
from ml.image.pixels.picture import Picture
from ml.image.stages.locked_test import add_locked_test
from ml.image.stages.run import Run, write_json
from ml.runtime.archives import extract_zip
from ml.runtime.cache import key_of
from ml.runtime.download import fetch
from ml.runtime.errors import BadDataset, BadParams
from ml.runtime.tensorfile import reserve

DOWNLOAD_SHARE = 0.4  # of the stage's progress, if the zip is downloaded


def data_ingestion(run: Run) -> None:
    """Run the stage; see the module's docstring."""
    paths, on_progress = run.config.data_ingestion, run.outlook.begin("decode")
    paths.root_dir.mkdir(parents=True, exist_ok=True)
    begin = 0.0
    if not paths.local_data_file.exists():
        if not paths.source_url:
            raise BadParams(
                "data_ingestion: local_data_file does not exist, and source_URL is not set: put a zip there, or name "
                "the scans with --data."
            )
        fetch(
            paths.source_url, paths.local_data_file, on_progress=lambda fraction: on_progress(DOWNLOAD_SHARE * fraction)
        )
        begin = DOWNLOAD_SHARE
    # A folder is not cached: reading all of it for its hash would take almost as long as decoding it.
    key = None if run.environment.cache is None or paths.local_data_file.is_dir() else _key(run)
    # A stage that runs alone always unpacks, so that its user can look at the scans.
    if key is None or not run.in_one_process or not _restore(run, key):
        _unpack(run)
        report = _decode_all(run, lambda fraction: on_progress(begin + (1 - begin) * fraction))
        report.raise_for_problems()
        save_manifest(report, paths.manifest_path)
        if key is not None:
            _store(run, key)
    run.__dict__.pop("report", None)
    if run.environment.locked_test is not None:
        add_locked_test(run, load_manifest(paths.manifest_path), on_progress)
    run.require_fitting_params()
    found = {"warnings": list(run.report.warnings), "inspection": asdict(run.report.inspection)}
    write_json(paths.report_path, {"classes": run.report.classes, "images": run.report.images, **found})


def scans_folder(run: Run) -> Path:
    """The folder of the scans; unpacked now if their pixels came from the cache. A locked test set lies beside it."""
    folder = run.config.data_ingestion.scans_dir
    if not folder.exists():
        _unpack(run)
    return folder


def _unpack(run: Run) -> None:
    """Unpack the zip into `unzip_dir`; a folder is read in place."""
    paths, config = run.config.data_ingestion, run.config
    if not paths.local_data_file.is_dir():
        extract_zip(paths.local_data_file, paths.unzip_dir)
        return
    scans = paths.local_data_file.resolve()
    for stage in (paths, config.prepare_base_model, config.training, config.evaluation):
        if stage.root_dir.resolve().is_relative_to(scans):
            raise BadParams(
                f"data_ingestion: {stage.root_dir} lies in the folder of the scans, {paths.local_data_file}: the plots "
                "would be taken for scans. Write elsewhere, with --out."
            )


def _decode_all(run: Run, on_progress: Callable[[float], None]) -> DatasetReport:
    paths, transform = run.config.data_ingestion, run.transform
    partial = paths.pixels_path.with_name(f".{paths.pixels_path.name}.partial")
    shape = (count_images(paths.scans_dir), transform.height, transform.width, 3)
    try:
        pixels = _pixels_file(partial, shape) if shape[0] else np.empty(shape, np.uint8)

        def keep(index: int, picture: Picture) -> None:
            pixels[index] = transform.resize(picture.pixels, picture.spacing_mm)

        report = check_dataset(paths.scans_dir, run.params.classes, keep, on_progress, transform.window)
        if not report.problems:
            partial.replace(paths.pixels_path)
    finally:
        partial.unlink(missing_ok=True)
    return report


def _pixels_file(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    pixels: np.ndarray = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    with path.open("r+b") as file:
        reserve(file.fileno(), path.stat().st_size)
    return pixels


# --- the cache -------------------------------------------------------------------------------------------------------


def _key(run: Run) -> str:
    archive = weights.sha256(run.config.data_ingestion.local_data_file)
    return key_of(archive=archive, pixels=run.transform.of_pixels, version=3)


def _restore(run: Run, key: str) -> bool:
    """Take manifest and pixels from the cache; False if no earlier training has decoded this zip."""
    assert run.environment.cache is not None
    entry, paths = run.environment.cache.find(key), run.config.data_ingestion
    try:
        if entry is None or _has_other_classes(run, entry):
            return False
        for name, target in (("pixels.npy", paths.pixels_path), ("manifest.json", paths.manifest_path)):
            _link(entry / name, target)
    except (OSError, BadDataset):  # removed just now, or written by another version
        return False
    return True


def _has_other_classes(run: Run, entry: Path) -> bool:
    wanted = run.params.classes
    return wanted is not None and len(load_manifest(entry / "manifest.json").classes) != wanted


def _link(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:  # another file system
        shutil.copyfile(source, partial)
    partial.replace(target)


def _store(run: Run, key: str) -> None:
    assert run.environment.cache is not None
    paths = run.config.data_ingestion
    pixels = np.load(paths.pixels_path, mmap_mode="r")
    run.environment.cache.store(key, {"pixels.npy": pixels, "manifest.json": paths.manifest_path.read_bytes()})
