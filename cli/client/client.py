"""The REST API as Python: one method per call, frozen dataclasses as results, every refusal an `ApiError`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cli.client import uploads
from cli.client.transport import ApiError, Json, Transport
from cli.client.uploads import MultipartUpload, ProgressListener

SILENT = ProgressListener()
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """A job as the API shows it (docs/api.md); `raw` is the whole document."""

    id: str
    kind: str
    state: str
    terminal: bool
    stage: str | None
    progress: float
    eta_seconds: float | None
    raw: Json

    @classmethod
    def of(cls, raw: Json) -> Self:
        """From the API's JSON."""
        names = ("id", "kind", "state", "terminal", "stage", "progress", "eta_seconds")
        return cls(**{name: raw[name] for name in names}, raw=raw)

    @property
    def failure(self) -> str | None:
        """The error in one line, if there is one."""
        error = self.raw.get("error")
        return f"{error['code']}: {error['detail']}" if error else None

    @property
    def warnings(self) -> list[str]:
        """What went wrong without failing the job, a line each."""
        return [f"{each['code']}: {each['detail']}" for each in self.raw.get("warnings", [])]


@dataclass(frozen=True)
class Epoch:
    """One epoch of a training; accuracies 0 to 1."""

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    seconds: float

    @classmethod
    def of(cls, raw: Json) -> Self:
        """From the API's JSON."""
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Prediction:
    """One scan's result; `label` and `confidence` (0 to 1) are None where it failed.

    `disposition` says what may be done with it, `reason` why it is not accepted.
    """

    name: str
    state: str
    label: str | None
    confidence: float | None
    failure: str | None
    disposition: str | None = None
    reason: str | None = None

    @classmethod
    def of(cls, raw: Json) -> Self:
        """From the API's JSON."""
        error = raw.get("error")
        failure = f"{error['code']}: {error['detail']}" if isinstance(error, dict) else error
        name = raw["name"] or raw.get("custom_id") or raw["scan_id"]
        return cls(
            name,
            raw["state"],
            raw.get("label"),
            raw.get("confidence"),
            failure,
            raw.get("disposition"),
            raw.get("reason"),
        )


class Client(Transport):
    """The calls of the API."""

    def post_files(self, path: str, upload: MultipartUpload, **headers: str) -> Json:
        """POST a multipart body."""
        return self.call("POST", path, data=upload, headers={"Content-Type": upload.content_type, **headers})

    # Jobs

    def job(self, job_id: str) -> Job:
        """The job now."""
        return Job.of(self.call("GET", f"/jobs/{job_id}"))

    def train(self, source: Json, params: Json, **more: Any) -> Job:
        """Submit a training of `{"dataset_id": …}` or `{"source_url": …}`."""
        body = {**source, "params": params, **{key: value for key, value in more.items() if value is not None}}
        return Job.of(self.call("POST", "/jobs/train", json=body))

    def predict(self, scan: Path, wait_seconds: int = 0, model: str | None = None) -> Job:
        """Submit one scan; with `wait_seconds` the returned job may have finished."""
        upload = MultipartUpload("file", [scan], {"model": model} if model else None)
        headers = {"Prefer": f"wait={wait_seconds}"} if wait_seconds else {}
        return Job.of(self.post_files("/jobs/predict", upload, **headers))

    def predict_batch(
        self, files: Sequence[Path], model: str | None = None, listener: ProgressListener = SILENT
    ) -> Job:
        """Submit many scans, or one zip of them. Of a large batch, only what the server does not have yet is sent."""
        form: Json = {"model": model} if model else {}
        if uploads.fits_one_request(files):
            return Job.of(self.post_files("/jobs/predict/batch", MultipartUpload("files", files, form)))
        if len(files) == 1:
            form["upload_id"] = uploads.upload_file(self, files[0], listener)
        else:
            scans = uploads.store_scans(self, files, listener)
            form["scan_ids"] = [scan_id for _, scan_id in scans]
            form["custom_ids"] = [file.name[-200:] for file, _ in scans]
        return Job.of(self._post_reliably("/jobs/predict/batch", form))

    def _post_reliably(self, path: str, body: Json) -> Json:
        """POST with one Idempotency-Key, repeated while the API cannot be reached: nothing is created twice."""
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        return uploads.retry_while_unreachable(lambda: self.call("POST", path, json=body, headers=headers))

    def retry(self, job_id: str) -> Job:
        """Submit a failed or cancelled job's unfinished work again; the new job."""
        return Job.of(self.call("POST", f"/jobs/{job_id}/retry"))

    def reproduce(self, job_id: str) -> Job:
        """Repeat a succeeded training; the new job."""
        return Job.of(self.call("POST", f"/jobs/{job_id}/reproduce"))

    def epochs(self, job_id: str) -> list[Epoch]:
        """The epochs so far."""
        return [Epoch.of(raw) for raw in self.call("GET", f"/jobs/{job_id}/metrics")["epochs"]]

    def results(self, job_id: str) -> list[Prediction]:
        """The predictions so far."""
        return [Prediction.of(raw) for raw in self.pages(f"/jobs/{job_id}/results", limit=100)]

    def wait(self, job_id: str, each: Callable[[Job], None] = lambda job: None) -> Job:
        """Poll until the job has ended; `each` is called with every poll's job."""
        while True:
            job = self.job(job_id)
            each(job)
            if job.terminal:
                return job
            time.sleep(POLL_SECONDS)

    # Datasets

    def dataset(self, dataset_id: str) -> Json:
        """The dataset now, with the findings of its check."""
        return self.call("GET", f"/datasets/{dataset_id}")

    def add_dataset(self, archive: Path, name: str | None = None, listener: ProgressListener = SILENT) -> Json:
        """Upload a zip with one folder per class; its ingest job is in `job_id`."""
        form = {"name": name} if name else {}
        if uploads.fits_one_request([archive]):
            return self.post_files("/datasets", MultipartUpload("file", [archive], form))
        return self._post_reliably("/datasets", {**form, "upload_id": uploads.upload_file(self, archive, listener)})

    def ready_dataset(self, archive: Path, name: str | None = None, listener: ProgressListener = SILENT) -> Json:
        """Upload a zip and wait until it is checked.

        Raises:
            ApiError: it is invalid, with the reasons.
        """
        dataset = self.add_dataset(archive, name, listener)
        if dataset.get("state") == "checking":
            self.wait(dataset["job_id"])
            dataset = self.dataset(dataset["id"])
        if dataset["state"] != "ready":
            problems = "; ".join(_text(problem) for problem in dataset.get("problems") or ["no reason given"])
            raise ApiError(f"Dataset {dataset['id']} is {dataset['state']}: {problems}")
        return dataset


def _text(problem: Any) -> str:
    return problem if isinstance(problem, str) else json.dumps(problem, ensure_ascii=False)
