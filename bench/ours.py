"""Our side of bench.train: all four stages of `python -m ml run` on a zip: `python -m bench.ours ZIP PARAMS FOLDER`."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from ml import stages
from ml.config import PipelineConfig
from ml.events import Epoch, Evaluated, Event
from ml.params import load_params


def config_for(archive: Path, folder: Path) -> PipelineConfig:
    """Everything below `folder`."""
    return PipelineConfig.model_validate(
        {
            "artifacts_root": folder,
            "data_ingestion": {"root_dir": folder / "data", "local_data_file": archive, "unzip_dir": folder / "images"},
            "prepare_base_model": {
                "root_dir": folder,
                "base_model_path": folder / "base.safetensors",
                "updated_base_model_path": folder / "updated.safetensors",
            },
            "training": {"root_dir": folder, "trained_model_path": folder / "model.safetensors"},
            "evaluation": {"root_dir": folder, "scores_path": folder / "scores.json"},
        }
    )


def main(archive: str, params_path: str, folder: str) -> None:
    """Run; the last line of output is the scores."""
    events: list[Event] = []
    stages.run(config_for(Path(archive), Path(folder)), load_params(Path(params_path)), events.append)
    scores = next(event.metrics for event in events if isinstance(event, Evaluated))
    seconds = [round(event.seconds, 2) for event in events if isinstance(event, Epoch)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {"peak_mb": round(peak), "accuracy": scores["accuracy"], "f1": scores["f1"], "train_seconds": seconds}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
