"""Our side of bench.train: all four stages of `ml.image.stages.runner` on a zip: `python -m bench.peers.ours ZIP PARAMS
FOLDER`."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from ml.image.stages import runner
from ml.runtime.config import PipelineConfig, load_params
from ml.runtime.events import Epoch, Evaluated, Event


def main(archive: str, params_path: str, folder: str) -> None:
    """Run; the last line of output is the scores."""
    events: list[Event] = []
    config = PipelineConfig.below(Path(folder)).reading(archive)
    runner.run_all(config, load_params(Path(params_path)), events.append)
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
