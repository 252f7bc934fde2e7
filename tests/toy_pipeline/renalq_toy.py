"""The most frequent class of the training set, as a pipeline: what another distribution brings to RenalQ."""

import json
import time
import zipfile
from collections import Counter
from hashlib import sha256
from types import SimpleNamespace as Namespace

from pydantic import BaseModel, Field

from ml.pipelines import DatasetCheck, Pipeline, Prediction, one_at_a_time
from ml.runtime.events import Checkpointed, Evaluated, Finished, Resumed, Round, StageFinished, StageStarted
from ml.spec.pipeline import Bound, Card, Gate, Inputs, PipelineSpec, Stage


class Params(BaseModel, extra="forbid", strict=True):
    epochs: int = Field(2, ge=1, le=100, description="passes over the data")
    seconds: float = Field(0.0, ge=0, le=60, description="time of a pass (s)")


SPEC = PipelineSpec(
    name="majority", title="The most frequent class", runtime="renalq_toy:Majority", params=Params,
    stages=(Stage(name="counting", weight=1.0),), inputs=Inputs(item="text", media_types=("text/plain",)),
    gate=Gate(leads=Bound(figure="accuracy", title="Accuracy", least=0.5)), card=Card(title="Majority"), model_file="m",
)  # fmt: skip


class Majority(Pipeline):
    def check(self, archive, folder, report):
        names = sorted(name for name in zipfile.ZipFile(archive).namelist() if not name.endswith("/"))
        classes = Counter(name.split("/")[0] for name in names)
        problems = () if len(classes) > 1 else ("Make two folders with texts: one a class.",)
        return DatasetCheck(dict(classes), sha256("".join(names).encode()).hexdigest(), problems)

    def train(self, job, emit):
        done = int(job.resume.read_text()) if job.resume else 0
        emit(StageStarted("counting"))
        if done:
            emit(Resumed(done))
        for epoch in range(done + 1, (epochs := job.params["epochs"]) + 1):
            time.sleep(job.params["seconds"])
            emit(Round(epoch, epochs, {"share": epoch / epochs}))
            (path := job.checkpoints / str(epoch)).write_text(str(epoch))
            emit(Checkpointed(epoch, str(path), 0.0))
        found, model = self.check(job.archive, job.folder, None), job.folder / "m"
        model.write_text(json.dumps(shares := {name: n / found.items for name, n in found.classes.items()}))
        emit(StageFinished("counting", 0.0))
        emit(Evaluated({"classes": list(shares), "accuracy": max(shares.values())}))
        emit(Finished(str(model), dataset_digest=found.digest))

    def open(self, model, options):
        shares = json.loads(model.read_text())
        label = max(shares, key=shares.get)

        def answer(item):
            return Prediction(item.id, label, shares[label], shares, output={"length": len(item.bytes())})

        return Namespace(engine=Namespace(name="count"), predict=lambda items: one_at_a_time(items, answer))
