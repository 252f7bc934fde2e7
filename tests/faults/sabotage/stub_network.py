"""Stands in for `ml.image.serving.predictor` in workers under test: answers by the first word of a scan's bytes,
without torch.

    normal | tumor  that label           broken   cannot be read
    poison          kills the process    hang     never comes back
    pause           waits for the file that the act names under `until`, having made the one under `reached`
    anything else   a label by its hash

Each scan that is looked at adds a line to the act's `seen`: process, id, first word. With `memory_for` the scans go
first through the real `ml.image.engines.oom_fallback`, on a device that refuses larger batches.
"""

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ml.pipelines import Item, Prediction

ACT: dict[str, Any] = next(act for act in json.loads(os.environ["SABOTAGE"]) if act["do"] == "stub_network")
BATCH = 32


ScanInput = CachedScan = Item


class Predictor:
    """As ml.image.serving.predictor.Predictor, to those who call `load` and `predict`."""

    engine = SimpleNamespace(name="stub")

    @classmethod
    def load(cls, path: Path, *_: Any, **__: Any) -> "Predictor":
        Path(path).read_bytes()  # a model that is not there is missed here as well
        return cls()

    def predict(self, scans: Iterable[ScanInput], *_: Any, **__: Any) -> Iterator[Prediction]:
        if ACT["memory_for"] is not None:
            scans = _through_device(list(scans))
        yield from map(_look, scans)


class _SmallDevice:
    """As ml.image.engines.backends.Engine, with memory for so many images at once."""

    name, batch, streams = "small", BATCH, 1

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            if len(batch) > ACT["memory_for"]:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            yield batch


def _through_device(scans: list[ScanInput]) -> list[ScanInput]:
    import numpy as np

    from ml.image.engines.oom_fallback import OomFallbackEngine

    assert sum(map(len, OomFallbackEngine(_SmallDevice()).stream([np.zeros((len(scans), 1))]))) == len(scans)
    return scans


def _look(scan: ScanInput) -> Prediction:
    source = scan.source() if callable(scan.source) else scan.source
    content = source if isinstance(source, bytes) else source.read_bytes()
    word = (content.split() or [b""])[0][:16].decode(errors="replace")
    _note(scan.id, word)
    if word == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    while word == "hang":
        time.sleep(3600)
    if word == "pause":
        _pause()
    time.sleep(ACT["seconds"])
    if word == "broken":
        return Prediction(scan.id, error_code="BAD_IMAGE", error_detail="This is no image.")
    tumor = word == "tumor" or (word != "normal" and hashlib.sha256(content).digest()[0] % 2 == 0)
    probabilities = {"Normal": 0.1, "Tumor": 0.9} if tumor else {"Normal": 0.9, "Tumor": 0.1}
    return Prediction(scan.id, "Tumor" if tumor else "Normal", 0.9, probabilities)


def _note(scan_id: str, word: str) -> None:
    with Path(ACT["seen"]).open("a") as seen:  # O_APPEND: lines of several processes do not mix
        seen.write(f"{os.getpid()} {scan_id} {word}\n")


def _pause() -> None:
    Path(ACT["reached"]).touch()
    while not Path(ACT["until"]).exists():
        time.sleep(0.02)
