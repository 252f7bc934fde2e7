"""Stands in for `python -m ml run` in trainings under test: the same protocol (ml.runtime.events), four stages, no
network.

What the act sets: `seconds` an epoch takes, `model_bytes`, `stubborn` (ignores SIGTERM), `refuses` (says of every
checkpoint that it is of another training).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ml.pipelines import TrainingJob
from ml.runtime import events
from ml.spec.image_pipeline import STAGES

ACT: dict[str, Any] = next(act for act in json.loads(os.environ["SABOTAGE"]) if act["do"] == "stub_training")
SCORES = {
    **{"accuracy": 0.9, "precision": 0.9, "recall": 0.9, "f1": 0.9, "ece": 0.05, "ece_chance": 0.03},
    **{"classes": ["Normal", "Tumor"], "test_digest": "e" * 64, "held_out": 93, "positive": "Tumor"},
    **{"independent_per_class": {"Normal": 48, "Tumor": 45}, "intervals": {"recall": [0.78, 0.96]}},
}
REFERENCE = {"scans": 93, "statistics": {}, "classes": {"Normal": 48, "Tumor": 45}, "rejected": 1}
FILES = ("scores.json", "history.json", "confusion_matrix.png", "learning_curves.png", "manifest.json", "report.html")


def main() -> None:
    """Run the four stages."""
    command, file = sys.argv[1:]
    assert command == "run"
    job = TrainingJob.of(json.loads(Path(file).read_text()))
    if ACT.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if job.resume is not None and ACT.get("refuses"):
        _say(events.Failed("BAD_CHECKPOINT", "The checkpoint is of a training on another dataset."))
        sys.exit(1)
    for stage in STAGES:
        _say(events.StageStarted(stage))
        if stage == "training":
            _train(int(job.params["epochs"]), job.checkpoints, job.resume)
        _say(events.StageFinished(stage, 0.1))
    _say(events.Evaluated(SCORES, REFERENCE, _beside(job.champion)))
    _say(_finished(job.folder))


def _beside(champion: Path | None) -> dict[str, Any] | None:
    """What the champion's first word is worth, on 40 test scans where this network has an F1 of 0.8."""
    if champion is None:
        return None
    word = champion.read_bytes().split()[0]
    if word == b"torn":
        told = {"comparable": False, "why": "its file cannot be read"}
        return {**told, **dict.fromkeys(("test_digest", "candidate", "champion")), "scans": 0}
    ours, theirs = 0.8, 0.85 if word == b"better" else 0.75
    gap = ours - theirs
    f1 = {"ours": ours, "theirs": theirs, "difference": gap, "low": gap - 0.03, "high": gap + 0.03}
    tests = {"groups": 40, "differences": {"f1": f1}, "mcnemar": {"statistic": 0.0, "p": 1.0}, "delong": None}
    shared = {"comparable": True, "why": "", "test_digest": "f" * 64, "scans": 40, "paired": tests}
    return {**shared, "candidate": {**SCORES, "f1": ours}, "champion": {**SCORES, "f1": theirs}}


def _train(epochs: int, folder: Path | None, resume: Path | None) -> None:
    done = int(resume.read_text()) if resume else 0
    if resume:
        _say(events.Resumed(done))
    for epoch in range(done + 1, epochs + 1):
        time.sleep(ACT["seconds"])
        _say(events.Steps(epoch, 2 * epoch - 1, [0.6, 0.4], 0.01))
        _say(events.Epoch(epoch, epochs, 0.5, 0.8, 0.5, 0.8, 0.01, ACT["seconds"], 0.8))
        if folder is not None and epoch < epochs:
            _keep(epoch, folder)


def _keep(epoch: int, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / f"epoch-{epoch}.safetensors"
    path.write_text(str(epoch))
    _say(events.Checkpointed(epoch, str(path), 0.001))


def _finished(folder: Path) -> events.Finished:
    model = folder / "model.safetensors"
    model.write_bytes(os.urandom(ACT.get("model_bytes", 1000)))
    for name in FILES:
        (folder / name).write_text('{"digest": "%s"}' % ("d" * 64))
    return events.Finished(
        str(model), {name: str(folder / name) for name in FILES}, device_seconds=0.1, dataset_digest="d" * 64
    )


def _say(event: events.Event) -> None:
    print(events.to_json(event), flush=True)


if __name__ == "__main__":
    main()
