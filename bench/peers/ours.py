"""Our side of bench.train: all four stages of `ml.image.stages.runner` on a zip: `python -m bench.peers.ours ZIP PARAMS
FOLDER`."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from ml.runtime.config import PipelineConfig, load_params
from ml.runtime.events import Epoch, Evaluated, Event
from ml.runtime.threads import sleep_while_waiting


def main(archive: str, params_path: str, folder: str) -> None:
    """Run; the last line of output is the scores."""
    sleep_while_waiting()  # as `python -m ml train` does
    from ml.image.stages import runner

    events: list[Event] = []
    config = PipelineConfig.below(Path(folder)).reading(archive)
    runner.run_all(config, load_params(Path(params_path)), events.append)
    scores = next(event.metrics for event in events if isinstance(event, Evaluated))
    seconds = [round(event.seconds, 2) for event in events if isinstance(event, Epoch)]
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {"accuracy": scores["accuracy"], "f1": scores["f1"], "peak_mb": round(used.ru_maxrss / 1024)}
    print(json.dumps({**figures, "train_seconds": seconds, "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
