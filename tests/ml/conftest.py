"""A VGG16 and a complete small run, created once for all tests that only read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from ml.image.networks import network
from ml.image.stages import runner
from ml.image.stages.run import RunEnvironment
from ml.runtime.cache import Cache
from ml.runtime.config import load_config, parse_params
from ml.runtime.events import Event
from tests.depth import depth
from tests.ml.builders import make_files, write_zip

SIDE = 64
SMALL = {"image_size": [SIDE, SIDE, 3], "weights": "none", "learning_rate": 0.01, "epochs": 3, "batch_size": 8}
# VGG16's own head is nine tenths of its 540 MB, and of the time to write and read them.
SMALL |= depth({"head": "gap"}, {})


def write_config(folder: Path, archive: Path | None = None, source_url: str | None = None) -> Path:
    """A config.yaml whose stages all write below `folder`."""
    content: dict[str, Any] = {
        "artifacts_root": str(folder),
        "data_ingestion": {
            "root_dir": str(folder / "data"),
            "source_URL": source_url,
            "local_data_file": str(archive or folder / "data" / "data.zip"),
            "unzip_dir": str(folder / "data" / "images"),
        },
        "prepare_base_model": {
            "root_dir": str(folder / "base"),
            "base_model_path": str(folder / "base" / "base.safetensors"),
            "updated_base_model_path": str(folder / "base" / "updated.safetensors"),
        },
        "training": {
            "root_dir": str(folder / "training"),
            "trained_model_path": str(folder / "training" / "model.safetensors"),
        },
        "evaluation": {
            "root_dir": str(folder / "evaluation"),
            "scores_path": str(folder / "evaluation" / "scores.json"),
        },
    }
    path = folder / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


@dataclass(frozen=True)
class SmallRun:
    """A finished run on 40 small scans."""

    folder: Path
    archive: Path
    environment: RunEnvironment
    events: list[Event]

    @property
    def model_path(self) -> Path:
        return self.folder / "training" / "model.safetensors"


@pytest.fixture(scope="module")  # half a gigabyte: no longer than it is used
def vgg() -> nn.Module:
    """An untrained VGG16 for two classes. Do not change it."""
    return network.build(2, seed=0).eval()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """All four stages in this process."""
    folder = tmp_path_factory.mktemp("small-run")
    archive = write_zip(make_files(20, side=SIDE), folder / "data.zip")
    environment, events = RunEnvironment(cache=Cache(tmp_path_factory.mktemp("cache"), 10**9)), list[Event]()
    params = parse_params(SMALL | {"augmentation": False})
    runner.run_all(load_config(write_config(folder, archive)), params, events.append, environment)
    return SmallRun(folder, archive, environment, events)
