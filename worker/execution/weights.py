"""Which weights this worker can read, as the pipelines say: a training whose weights nobody has is refused at once."""

from pathlib import Path

import structlog

from jobs.tables import Json
from ml.pipelines import pipeline_of
from ml.spec.registry import installed


def readable(folder: Path) -> Json:
    """Lists of names by pipeline; without those that do not say, or that fail to."""
    said = {name: _readable(name, folder) for name in installed()}
    return {name: names for name, names in said.items() if names is not None}


def _readable(pipeline: str, folder: Path) -> list[str] | None:
    try:
        names = pipeline_of(pipeline).readable_weights(folder)
    except Exception as error:  # a plug-in's, or a disk's
        structlog.get_logger().warning("weights_not_read", pipeline=pipeline, error=type(error).__name__)
        return None
    return None if names is None else list(names)
