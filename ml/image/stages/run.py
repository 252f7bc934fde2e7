"""The state of one pipeline run: where its stages read and write, where events go, and what they share in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ml.evaluation.out_of_fold import OutOfFold
from ml.evaluation.positive import resolve
from ml.image.dataset.scans import DatasetReport, load_manifest
from ml.image.dataset.splits import LOCKED, Split, split_by_folders, split_locked, split_scans
from ml.image.engines.backends import open_engine, training_precision
from ml.image.engines.features import Features
from ml.image.learning.checkpoints import checksum
from ml.image.learning.train import TrainData
from ml.image.networks import network
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.network import Model
from ml.image.pixels.transforms import Transform
from ml.image.stages.outlook import Outlook
from ml.runtime.cache import Cache, Cached, key_of
from ml.runtime.config import CheckpointPlan, PipelineConfig
from ml.runtime.errors import BadDataset, BadParams
from ml.runtime.events import Emit, Epoch
from ml.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from ml.spec.image import Params


@dataclass(frozen=True)
class RunEnvironment:
    """What a run needs besides its configuration and parameters.

    `weights_dir`: folder with ImageNet weights and other weights files. `base_weights`: the file that the parameter
    `weights: file:…` or `version:…` stands for. `revision`: of the code, for the report. `champion`: a model file that
    is scored on the same test scans as the new network. `champion_threshold`, `champion_pooling`: those that it
    predicts with, where they are other ones than its file's. `locked_test`: a zip of the scans to test on, if these are
    not to be drawn from the dataset (`ml.image.stages.locked_test`). `titles`: name → value of what the report's head
    names.
    """

    weights_dir: Path | None = None
    base_weights: Path | None = None
    cache: Cache | None = None
    checkpoints: CheckpointPlan = field(default_factory=CheckpointPlan)
    revision: str | None = None
    champion: Path | None = None
    champion_threshold: float | None = None
    champion_pooling: Mapping[str, Any] | None = None
    locked_test: Path | None = None
    titles: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """One run. Stages fill in `model`, `epochs` and so on; a stage that runs alone reads what is missing from disk."""

    config: PipelineConfig
    params: Params
    emit: Emit
    environment: RunEnvironment = field(default_factory=RunEnvironment)
    in_one_process: bool = False
    """All four stages run in this process."""
    model: Model | None = None
    epochs: list[Epoch] = field(default_factory=list)
    device_seconds: float = 0.0
    features_by_top: dict[int, Features] = field(default_factory=dict)
    """By number of unfrozen blocks."""
    out_of_fold: OutOfFold | None = None
    outlook: Outlook = field(init=False)

    def __post_init__(self) -> None:
        self.outlook = Outlook(self.emit)

    @property
    def transform(self) -> Transform:
        """The transform that the parameters ask for."""
        architecture, (height, width, _) = ARCHITECTURES[self.params.network], self.params.image_size
        return Transform(height, width, architecture.mean, architecture.std, self.params.window, self.params.spacing_mm)

    @cached_property
    def report(self) -> DatasetReport:
        """The result of data_ingestion."""
        return load_manifest(self.config.data_ingestion.manifest_path)

    @cached_property
    def pixels(self) -> np.ndarray:
        """All scans as data_ingestion decoded them: uint8 [scans, height, width, 3], memory-mapped."""
        try:
            pixels: np.ndarray = np.load(self.config.data_ingestion.pixels_path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise BadDataset("There is no dataset yet: run the stage data_ingestion first.") from error
        if pixels.shape[1:] != self.params.image_size:
            raise BadParams("image_size: the dataset was decoded in another size; run the stage data_ingestion again.")
        return pixels

    @cached_property
    def split(self) -> Split:
        """The training, validation and test scans."""
        params = self.params
        if any(scan.side == LOCKED for scan in self.report.scans):
            return split_locked(self.report, params.seed, params.validation_size)
        if params.split == "folders":
            return split_by_folders(self.report, params.seed, params.validation_size)
        return split_scans(self.report, params.seed, params.test_size, params.validation_size)

    @cached_property
    def positive(self) -> tuple[str, ...]:
        """The positive classes of the dataset, by the parameters or the names. BadParams if neither tells."""
        return resolve(self.report.names, self.params.asked_positive)

    def require_fitting_params(self) -> None:
        """BadParams if a parameter does not fit the dataset's classes."""
        for name, message in self.params.misfits(self.report.names):
            raise BadParams(f"{name}: {message}")

    def load_model(self, path: Path) -> Model:
        """The model of the previous stage, from memory or from `path`."""
        self.report  # noqa: B018 - if there is no dataset either, that is the error to report
        return self.model or network.load(path)

    def features(self, model: Model, top: int, group: ProcessGroup = SINGLE_PROCESS) -> Features:
        """The features below the `top` uppermost blocks of this model's network; opened once."""
        if top not in self.features_by_top:
            below, _ = model.cut(top)
            engine = open_engine(below, model.transform, training_precision(self.params))
            cached = None
            if self.environment.cache is not None:
                scans = [scan.sha256 for scan in self.report.scans]
                weights = [checksum(value) for value in below.state_dict().values()]
                key = key_of(
                    scans=scans, network=model.architecture, head=model.head, top=top, weights=weights,
                    transform=model.transform.as_dict(), engine=engine.name, batch=engine.batch,
                )  # fmt: skip
                cached = Cached(self.environment.cache, key)
            self.features_by_top[top] = Features(engine, self.pixels, group, cached)
        return self.features_by_top[top]


def train_data(run: Run, model: Model, split: Split, group: ProcessGroup) -> TrainData:
    """The features, labels and split that this model is trained with."""
    return TrainData(lambda top: run.features(model, top, group), run.report.labels, split, tuple(model.findings))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)
