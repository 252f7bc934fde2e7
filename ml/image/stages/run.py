"""One run of the pipeline: where its stages read and write, whom they tell, and what they hand on in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ml.image.dataset.scans import DatasetReport, load_manifest
from ml.image.dataset.splits import Split, split_scans
from ml.image.engines.engines import open_engine
from ml.image.engines.features import Features
from ml.image.learning.checkpoints import checksum
from ml.image.networks import network
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.network import Model
from ml.image.pixels.transforms import Transform
from ml.runtime.cache import Cache, Cached, key_of
from ml.runtime.config import CheckpointPlan, PipelineConfig
from ml.runtime.errors import BadDataset, BadParams
from ml.runtime.events import Emit, Epoch
from ml.runtime.process_group import ALONE, Team
from ml.spec.image import Params


@dataclass(frozen=True)
class Surroundings:
    """What a run finds where it runs: folders of weights, the file that `weights: file:` or `version:` stands for, the
    cache, checkpoints, the code's revision, and the champion's file, which is scored beside the new network."""

    weights_dir: Path | None = None
    base_weights: Path | None = None
    cache: Cache | None = None
    checkpoints: CheckpointPlan = field(default_factory=CheckpointPlan)
    revision: str | None = None
    champion: Path | None = None


@dataclass
class Run:
    """One run. A stage that runs alone reads from disk what is None here."""

    config: PipelineConfig
    params: Params
    emit: Emit
    around: Surroundings = field(default_factory=Surroundings)
    whole: bool = False  # all four stages in this process
    model: Model | None = None
    epochs: list[Epoch] = field(default_factory=list)
    device_seconds: float = 0.0
    opened: dict[int, Features] = field(default_factory=dict)

    @property
    def transform(self) -> Transform:
        """The transform that the parameters ask for."""
        of, (height, width, _) = ARCHITECTURES[self.params.network], self.params.image_size
        return Transform(height, width, of.mean, of.std, self.params.window)

    @cached_property
    def report(self) -> DatasetReport:
        """What data_ingestion found."""
        return load_manifest(self.config.data_ingestion.manifest_path)

    @cached_property
    def pixels(self) -> np.ndarray:
        """Every scan's pixels as data_ingestion left them: uint8 [scans, height, width, 3], mapped from the file."""
        try:
            pixels: np.ndarray = np.load(self.config.data_ingestion.pixels_path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise BadDataset("There is no dataset yet: run the stage data_ingestion first.") from error
        if pixels.shape[1:] != self.params.image_size:
            raise BadParams("image_size: the dataset was decoded in another size; run the stage data_ingestion again.")
        return pixels

    @cached_property
    def split(self) -> Split:
        """Who is learned from, who chooses, and who is only evaluated."""
        return split_scans(self.report, self.params.seed, self.params.test_size, self.params.validation_size)

    def model_of(self, path: Path) -> Model:
        """The model that the stage before left, in memory or at `path`."""
        self.report  # noqa: B018 - without a dataset that is what is wrong, not the missing file
        return self.model or network.load(path)

    def features(self, model: Model, top: int, team: Team = ALONE) -> Features:
        """The features below `top` unfrozen blocks of this model's network; opened once."""
        if top not in self.opened:
            below, _ = model.cut(top)
            engine = open_engine(below, model.transform, precision_of(self.params))
            cached = None
            if self.around.cache is not None:
                scans = [scan.sha256 for scan in self.report.scans]
                weights = [checksum(value) for value in below.state_dict().values()]
                key = key_of(
                    scans=scans, network=model.architecture, head=model.head, top=top, weights=weights,
                    transform=model.transform.as_dict(), engine=engine.name, batch=engine.batch,
                )  # fmt: skip
                cached = Cached(self.around.cache, key)
            self.opened[top] = Features(engine, self.pixels, team, cached)
        return self.opened[top]


def precision_of(params: Params) -> Any:
    """What the engines are asked for. bf16 rounds each layer's output by 0.4 %. A trained network hardly notices, nor
    do VGG16 and the transformer; the deeper ones of random weights make up to 16 % of it: fp32 for these."""
    if params.precision == "auto" and params.weights == "none" and params.network not in ("vgg16", "vit_b_16"):
        return "fp32"
    return params.precision


def write_json(path: Path, content: object) -> None:
    """Write a JSON file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)
