"""Stage 1, data_ingestion: a folder of scans, or a zip (local, or downloaded) → manifest.json, dataset_report.json, and
pixels.npy with every scan decoded once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ml.image.dataset.scans import DatasetReport, check_dataset, count_images, load_manifest, save_manifest
from ml.image.networks import weights
from ml.image.stages.run import Run, write_json
from ml.runtime.archives import extract_zip
from ml.runtime.cache import key_of
from ml.runtime.download import fetch
from ml.runtime.errors import BadDataset, BadParams
from ml.runtime.events import reporter
from ml.runtime.tensorfile import reserve

DOWNLOAD_SHARE = 0.4  # of the stage's progress, when there is something to download


def data_ingestion(state: Run) -> None:
    """See the module."""
    paths, tell = state.config.data_ingestion, reporter(state.emit, "data_ingestion")
    paths.root_dir.mkdir(parents=True, exist_ok=True)
    begin = 0.0
    if not paths.local_data_file.exists():
        if not paths.source_url:
            raise BadParams(
                "data_ingestion: local_data_file does not exist, and source_URL is not set: put a zip there, or name "
                "the scans with --data."
            )
        fetch(paths.source_url, paths.local_data_file, report=lambda fraction: tell(DOWNLOAD_SHARE * fraction))
        begin = DOWNLOAD_SHARE
    # A folder has no hash of its own; and reading it to hash it would take as long as most of what a cache saves.
    key = None if state.around.cache is None or paths.local_data_file.is_dir() else _key(state)
    # A stage alone always unpacks: whoever runs it wants to see the scans.
    if key is None or not state.whole or not _recalled(state, key):
        _unpack(state)
        report = _decode_all(state, lambda fraction: tell(begin + (1 - begin) * fraction))
        report.raise_for_problems()
        save_manifest(report, paths.manifest_path)
        if key is not None:
            _remember(state, key)
    state.__dict__.pop("report", None)
    found = {"warnings": list(state.report.warnings), "inspection": asdict(state.report.inspection)}
    write_json(paths.report_path, {"classes": state.report.classes, "images": state.report.images, **found})


def unpacked(state: Run) -> Path:
    """The folder of the scans. Where their pixels came out of the cache they were not unpacked: then they are here."""
    folder = state.config.data_ingestion.scans_dir
    if not folder.exists():
        _unpack(state)
    return folder


def _unpack(state: Run) -> None:
    """The zip's scans into `unzip_dir`; a folder is read where it lies."""
    paths, config = state.config.data_ingestion, state.config
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


def _decode_all(state: Run, tell: Callable[[float], None]) -> DatasetReport:
    paths, transform = state.config.data_ingestion, state.transform
    partial = paths.pixels_path.with_name(f".{paths.pixels_path.name}.partial")
    shape = (count_images(paths.scans_dir), transform.height, transform.width, 3)
    try:
        pixels = _pixels_file(partial, shape) if shape[0] else np.empty(shape, np.uint8)

        def keep(index: int, image: np.ndarray) -> None:
            pixels[index] = transform.resize(image)

        report = check_dataset(paths.scans_dir, state.params.classes, keep, tell, transform.window)
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


def _key(state: Run) -> str:
    archive = weights.sha256(state.config.data_ingestion.local_data_file)
    return key_of(archive=archive, size=state.params.image_size, window=state.params.window, version=1)


def _recalled(state: Run, key: str) -> bool:
    """Whether this zip was decoded for an earlier training, which left manifest and pixels in the cache."""
    assert state.around.cache is not None
    entry, paths = state.around.cache.find(key), state.config.data_ingestion
    try:
        if entry is None or _has_other_classes(state, entry):
            return False
        for name, target in (("pixels.npy", paths.pixels_path), ("manifest.json", paths.manifest_path)):
            _link(entry / name, target)
    except (OSError, BadDataset):  # removed just now, or left by another version
        return False
    return True


def _has_other_classes(state: Run, entry: Path) -> bool:
    wanted = state.params.classes
    return wanted is not None and len(load_manifest(entry / "manifest.json").classes) != wanted


def _link(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:  # another file system
        shutil.copyfile(source, partial)
    partial.replace(target)


def _remember(state: Run, key: str) -> None:
    assert state.around.cache is not None
    paths = state.config.data_ingestion
    pixels = np.load(paths.pixels_path, mmap_mode="r")
    state.around.cache.store(key, {"pixels.npy": pixels, "manifest.json": paths.manifest_path.read_bytes()})
