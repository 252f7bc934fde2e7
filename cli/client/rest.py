"""The REST API as Python: one method a call, frozen dataclasses out, every refusal as one clear line."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from cli.client import uploads
from cli.client.errors import ApiError
from cli.client.uploads import Onlooker, Upload
from jobs.settings import Settings

Json = dict[str, Any]
UNSEEN = Onlooker()
POLL_SECONDS = 0.5
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 120.0
# Busy, or an answer that was lost: again, when Retry-After says so. Nobody there at all: no use in waiting.
AGAIN = Retry(
    total=None,
    connect=0,
    read=3,
    status=12,
    other=0,
    status_forcelist={429, 503},
    allowed_methods=None,
    backoff_factor=0.5,
    raise_on_status=False,
)


@dataclass(frozen=True)
class Job:
    """A job as the API shows it (`design/API.md`); `raw` is all of it."""

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
    """One scan's answer; `label` and `confidence` (0 to 1) are None where it failed. `disposition`: what may be done
    with it, and `reason` why that is no class."""

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
        said = raw.get("label"), raw.get("confidence"), failure, raw.get("disposition"), raw.get("reason")
        return cls(name, raw["state"], *said)


def default_url() -> str:
    """RENALQ_URL, else the local stack's."""
    settings = Settings()
    return os.environ.get("RENALQ_URL") or f"http://127.0.0.1:{settings.port}"


def default_key() -> str:
    """RENALQ_KEY, else the local stack's admin key. Raises `ApiError` where neither is there."""
    given = os.environ.get("RENALQ_KEY")
    if given:
        return given
    file = Settings().home / "admin.key"
    try:
        return file.read_text().strip()
    except OSError as error:
        raise ApiError(f"No key: set RENALQ_KEY, or start `renalq up`, which writes {file}.") from error


class Client:
    """Speaks to one RenalQ with one key."""

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        self.url = (url or default_url()).rstrip("/")
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {key or default_key()}"
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=AGAIN))
        # What goes in pieces is not sent again as it was: the server knows where it ended.
        self._session.mount(f"{self.url}/uploads/", HTTPAdapter())
        # A proxy of the environment is meant for the world outside, not for this machine.
        self._session.trust_env = urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1")

    def call(self, method: str, path: str, **options: Any) -> Json:
        """The JSON of `answer`."""
        answer = self.answer(method, path, **options)
        return dict(answer.json()) if answer.content else {}

    def answer(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request, repeated while the server asks for patience. A POST carries an Idempotency-Key: whatever answer
        is lost on its way, nothing is made twice.

        Raises:
            ApiError: for every answer that is not 2xx in the end, and where nobody answers.
        """
        if method == "POST":
            options["headers"] = {"Idempotency-Key": str(uuid.uuid4()), **options.get("headers", {})}
        answer = self._request(method, path, options)
        while _is_in_flight(answer):  # the first try's connection broke, and the server is still at it
            time.sleep(float(answer.headers.get("Retry-After", 1)))
            answer = self._request(method, path, options)
        if not answer.ok:
            raise ApiError(_refusal(answer), answer.status_code)
        return answer

    def _request(self, method: str, path: str, options: Json) -> requests.Response:
        try:
            return self._session.request(method, self.url + path, timeout=(CONNECT_SECONDS, ANSWER_SECONDS), **options)
        except requests.ConnectionError as error:
            raise ApiError(f"Nobody answers at {self.url}: start `renalq up`, or set RENALQ_URL.") from error
        except requests.RequestException as error:
            raise ApiError(f"{method} {path} at {self.url} failed: {error}") from error

    def send(self, path: str, upload: Upload, **headers: str) -> Json:
        """POST files."""
        return self.call("POST", path, data=upload, headers={"Content-Type": upload.content_type, **headers})

    def pages(self, path: str, **query: Any) -> Iterator[Json]:
        """Every entry of a list, page after page."""
        query = {name: value for name, value in query.items() if value is not None}
        while True:
            page = self.call("GET", path, params=query)
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:  # of a job that runs, more will come: not now
                return
            query["after"] = page["next"]

    # Jobs

    def job(self, job_id: str) -> Job:
        """One job now."""
        return Job.of(self.call("GET", f"/jobs/{job_id}"))

    def train(self, source: Json, params: Json, **more: Any) -> Job:
        """Submit a training of `{"dataset_id": …}` or `{"source_url": …}`."""
        body = {**source, "params": params, **{key: value for key, value in more.items() if value is not None}}
        return Job.of(self.call("POST", "/jobs/train", json=body))

    def predict(self, scan: Path, wait_seconds: int = 0, model: str | None = None) -> Job:
        """Submit one scan; with `wait_seconds` the answer may be the finished job."""
        upload = Upload("file", [scan], {"model": model} if model else None)
        headers = {"Prefer": f"wait={wait_seconds}"} if wait_seconds else {}
        return Job.of(self.send("/jobs/predict", upload, **headers))

    def predict_batch(self, files: Sequence[Path], model: str | None = None, onlooker: Onlooker = UNSEEN) -> Job:
        """Submit many scans, or one zip of them. Of what is much, only what is not there yet is sent."""
        form: Json = {"model": model} if model else {}
        if uploads.is_little(files):
            return Job.of(self.send("/jobs/predict/batch", Upload("files", files, form)))
        if len(files) == 1:
            form["upload_id"] = uploads.uploaded(self, files[0], onlooker)
        else:
            scans = uploads.stored_scans(self, files, onlooker)
            form["scan_ids"] = [scan_id for _, scan_id in scans]
            form["custom_ids"] = [file.name[-200:] for file, _ in scans]
        return Job.of(self._patiently("/jobs/predict/batch", form))

    def _patiently(self, path: str, body: Json) -> Json:
        """POST while the network is away, and with one key: nothing is made twice."""
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        return uploads.patiently(lambda: self.call("POST", path, json=body, headers=headers))

    def retry(self, job_id: str) -> Job:
        """Submit anew what a job did not bring to a good end; the new job."""
        return Job.of(self.call("POST", f"/jobs/{job_id}/retry"))

    def reproduce(self, job_id: str) -> Job:
        """Do a succeeded training again; the new job."""
        return Job.of(self.call("POST", f"/jobs/{job_id}/reproduce"))

    def dataset(self, dataset_id: str) -> Json:
        """One dataset now, with all that its check found."""
        return self.call("GET", f"/datasets/{dataset_id}")

    def epochs(self, job_id: str) -> list[Epoch]:
        """The epochs so far."""
        return [Epoch.of(raw) for raw in self.call("GET", f"/jobs/{job_id}/metrics")["epochs"]]

    def results(self, job_id: str) -> list[Prediction]:
        """The predictions so far."""
        return [Prediction.of(raw) for raw in self.pages(f"/jobs/{job_id}/results", limit=100)]

    def wait(self, job_id: str, each: Callable[[Job], None] = lambda job: None) -> Job:
        """Poll until the job has ended, showing it to `each` every time."""
        while True:
            job = self.job(job_id)
            each(job)
            if job.terminal:
                return job
            time.sleep(POLL_SECONDS)

    # Datasets

    def add_dataset(self, archive: Path, name: str | None = None, onlooker: Onlooker = UNSEEN) -> Json:
        """Upload a zip with one folder a class; its ingest job is in `job_id`."""
        form = {"name": name} if name else {}
        if uploads.is_little([archive]):
            return self.send("/datasets", Upload("file", [archive], form))
        return self._patiently("/datasets", {**form, "upload_id": uploads.uploaded(self, archive, onlooker)})

    def ready_dataset(self, archive: Path, name: str | None = None, onlooker: Onlooker = UNSEEN) -> Json:
        """Upload a zip and wait until it is checked. Raises `ApiError` with the reasons where it is invalid."""
        dataset = self.add_dataset(archive, name, onlooker)
        if dataset.get("state") == "checking":
            self.wait(dataset["job_id"])
            dataset = self.dataset(dataset["id"])
        if dataset["state"] != "ready":
            problems = "; ".join(_text(problem) for problem in dataset.get("problems") or ["no reason given"])
            raise ApiError(f"Dataset {dataset['id']} is {dataset['state']}: {problems}")
        return dataset


def _text(problem: Any) -> str:
    return problem if isinstance(problem, str) else json.dumps(problem, ensure_ascii=False)


def _is_in_flight(answer: requests.Response) -> bool:
    return answer.status_code == 409 and "IDEMPOTENCY_IN_FLIGHT" in answer.text


def _refusal(answer: requests.Response) -> str:
    """problem+json (RFC 9457) as one line."""
    try:
        problem = dict(answer.json())
    except ValueError:
        return f"{answer.status_code} {answer.reason}: {answer.text[:200]}"
    fields = [f"{error.get('pointer')}: {error.get('detail')}" for error in problem.get("errors") or []]
    fields += problem.get("reasons") or []
    line = f"{answer.status_code} {problem.get('title') or answer.reason}"
    line += f": {problem['detail']}" if problem.get("detail") else ""
    line += f" [{'; '.join(fields)}]" if fields else ""
    return f"{line} (request {problem['request_id']})" if problem.get("request_id") else line
