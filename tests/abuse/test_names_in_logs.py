"""No name, header value or address of a client is in a log of any process, whatever it is hidden in."""

import base64
import errno
import json
import logging
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
import structlog
from sqlalchemy import func, select

from jobs import keys
from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import Job
from ml.pipelines import TrainingJob
from ml.spec.private_logs import places
from tests.abuse.named_files import CANARY, DATASETS, LONG_NAME, MANIFESTS, SCANS
from tests.api.conftest import Server
from tests.builders import TENANT
from tests.private_logs import service_logs
from tests.processes import ROOT, eventually, stack
from tests.worker.test_studies import LEARNT, version_of
from worker.execution.resources import open_resources

MODEL = {"model": "1"}

log = structlog.get_logger()


# --- what may be logged ---


def broken() -> None:
    """A library's errors, one from the other, that quote a client's texts."""
    try:
        bytes([0xFF]).decode()
    except UnicodeDecodeError as error:
        try:
            raise KeyError(CANARY) from error
        except KeyError:
            raise OSError(errno.ENAMETOOLONG, "File name too long", f"/work/{CANARY}.png") from None


def caught() -> Exception:
    """One of these errors."""
    with pytest.raises(OSError, match=CANARY) as found:
        broken()
    return found.value


def in_a_thread() -> None:
    """The error ends a thread."""
    thread = threading.Thread(target=broken)
    thread.start()
    thread.join()


class Unraisable:
    """Its end cannot raise."""

    def __del__(self) -> None:
        broken()


def quoting_handler() -> None:
    """A library that has a handler of its own, which fails."""
    logger = logging.getLogger("nibabel.global")
    logger.addHandler(logging.StreamHandler())
    logger.error("bad value %d in the header", CANARY)


def celery_task() -> None:
    """As celery.app.trace logs a task that has raised."""
    found = {"id": "7", "name": "renalq.predict", "exc": CANARY, "traceback": CANARY}
    logging.getLogger("celery.app.trace").error("Task %(name)s[%(id)s] raised: %(exc)s", found, exc_info=caught())


SAYINGS: dict[str, Callable[[], object]] = {
    "an event of ours": lambda: log.error("unit_failed", exc_info=caught()),
    "an event of ours in an except block": lambda: log.exception("unit_failed", exc_info=caught()),
    "a pipeline's logger": lambda: logging.getLogger("ml").error("the run failed", exc_info=caught()),
    "an uncaught error": lambda: sys.excepthook(OSError, caught(), caught().__traceback__),
    "a thread": in_a_thread,
    "a destructor": lambda: Unraisable() and None,
    "pydicom": lambda: logging.getLogger("pydicom").warning(f"Invalid value for VR UI: '{CANARY}'"),
    "a warning": lambda: warnings.warn(f"Invalid value for VR UI: '{CANARY}'", stacklevel=1),
    "a handler of its own": quoting_handler,
    "Flask": lambda: logging.getLogger("api").error(f"Exception on /{CANARY} [GET]", exc_info=caught()),
    "gunicorn": lambda: logging.getLogger("gunicorn.error").error("Error handling request %s", f"/{CANARY}"),
    "celery": celery_task,
}  # fmt: skip


@pytest.mark.parametrize("who", SAYINGS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_has_types_and_places_and_no_text_of_others(who: str, capfd: pytest.CaptureFixture[str]) -> None:
    with service_logs("worker", "DEBUG"), warnings.catch_warnings():
        warnings.simplefilter("always")
        SAYINGS[who]()
    found = capfd.readouterr()
    assert CANARY not in found.out + found.err
    lines = [json.loads(line) for line in found.err.splitlines()]
    assert len(lines) == 1, "told once, as a line of ours"
    assert "test_names_in_logs.py:" in found.err or "library" in lines[0]["event"]


def test_the_places_of_a_chain_are_told_without_its_texts() -> None:
    told = places(caught())
    assert [line for line in told if not line.startswith(" ")] == ["OSError", "KeyError", "UnicodeDecodeError"]
    assert any("test_names_in_logs.py:" in line and "broken" in line for line in told)
    assert CANARY not in str(told)


def test_a_trainings_child_tells_no_path(tmp_path: Path) -> None:
    job = TrainingJob("image", {}, tmp_path, archive=tmp_path / LONG_NAME)
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job.as_json()))
    done = subprocess.run([sys.executable, "-m", "ml", "run", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["code"] == "INTERNAL", done.stdout + done.stderr
    assert "ml/__main__.py:" in done.stderr, "the places"
    assert CANARY not in done.stdout.splitlines()[-1] + done.stderr


# --- every way in, through real processes ---


class Client:
    """A client that names its patient wherever it can."""

    def __init__(self, server: Server, key: str) -> None:
        self._server, self._key = server, key
        self.statuses: list[int] = []

    def post(self, path: str, **options: Any) -> requests.Response:
        """POST; a server that hangs up is no failure of this test."""
        headers = {"Authorization": f"Bearer {self._key}", **options.pop("headers", {})}
        answer = requests.post(f"{self._server.url}{path}", headers=headers, timeout=60, **options)
        self.statuses.append(answer.status_code)
        return answer

    def upload(self, content: bytes) -> str:
        """By tus, under a patient's name."""
        tus = {"Tus-Resumable": "1.0.0", "Authorization": f"Bearer {self._key}"}
        name = base64.b64encode(f"{CANARY}.zip".encode()).decode()
        begun = {**tus, "Upload-Length": str(len(content)), "Upload-Metadata": f"filename {name}"}
        made = requests.post(f"{self._server.url}/v1/uploads", headers=begun, timeout=60)
        at = f"{self._server.url}{made.headers['Location']}"
        more = {**tus, "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
        requests.patch(at, content, headers=more, timeout=60)
        return made.headers["Location"].rpartition("/")[2]


def send_everything(client: Client, port: int) -> None:
    """By each way in."""
    labels = {"metadata": json.dumps({CANARY: CANARY})}
    for packed in DATASETS.values():
        client.post("/v1/datasets", files={"file": (f"{LONG_NAME}.zip", packed)}, data={"name": CANARY})
        client.post("/v1/jobs/predict/batch", files={"files": (f"{CANARY}.zip", packed)}, data={**labels, **MODEL})
    client.post("/v1/datasets", json={"upload_id": client.upload(DATASETS["all scans"]), "name": CANARY})
    client.post("/v1/jobs/predict/batch", json={"upload_id": client.upload(SCANS["volume.nii"]), **MODEL})
    for name, content in SCANS.items():
        sent = {"file": (f"{CANARY} {name}", content)}
        client.post("/v1/jobs/predict", files=sent, data={**labels, "custom_id": CANARY, **MODEL, "explain": "true"})
    files = [("files", (f"{CANARY}/{name}", content)) for name, content in SCANS.items()]
    client.post(
        "/v1/jobs/predict/batch", files=files, data={"custom_ids": [CANARY] * len(files), **MODEL, "explain": "all"}
    )
    for text in MANIFESTS.values():
        manifest = text.replace("{port}", str(port)).encode()
        client.post("/v1/jobs/predict/batch", files={"manifest": (f"{CANARY}.csv", manifest)}, data=MODEL)
        client.post(
            f"/v1/jobs/predict/batch?metadata[{CANARY}]={CANARY}", data=manifest, headers={"Content-Type": "text/csv"}
        )
    for host in (f"127.0.0.1:{port}", f"{CANARY}.invalid", f"{CANARY}:{CANARY}@127.0.0.1"):
        client.post("/v1/jobs/train", json={"source_url": f"http://{host}/{CANARY}.zip", "name": CANARY})
    for body in (f'{{"name": "{CANARY}', f'{{"{CANARY}": 1}}', f'{{"params": {{"{CANARY}": "{CANARY}"}}}}'):
        client.post("/v1/jobs/train", data=body, headers={"Content-Type": "application/json"})
    client.post(f"/v1/{CANARY}?{CANARY}={CANARY}", data=CANARY, headers={"X-Request-Id": f"{CANARY} x"})


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The server of addresses is a port that answers with junk."""
    settings.max_failures = 1
    return settings


@pytest.fixture
def junk() -> Iterator[int]:
    """A port on which something answers with a patient's name."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    peer, _ = listening.accept()
                    peer.sendall(f"{CANARY} is no HTTP\r\n\r\n".encode())
                    peer.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


@pytest.mark.full
@pytest.mark.timeout(600)
def test_no_way_in_leaves_a_name_in_a_log(settings: Settings, sessions: Sessions, tmp_path: Path, junk: int) -> None:
    settings.fetch_hosts, settings.log_level = f"127.0.0.1:{junk}", "DEBUG"
    resources = open_resources(settings)
    version = version_of(resources, tmp_path, LEARNT)
    with sessions.begin() as session:
        key = keys.create(session, "test", ["admin"], TENANT).secret
    server = Server(settings)
    server.start()
    try:
        with stack(settings, sessions, "dispatcher", "predict", "train"):
            client = Client(server, key)
            client.post(f"/v1/jobs/{version.job_id}/cancel")  # nobody runs it
            send_everything(client, junk)
            eventually(lambda: all_ended(sessions), 300)
            found = {path.name: path.read_text(errors="replace") for path in settings.home.rglob("*.log")}
            messages = everything_in(settings.redis_url)
    finally:
        server.kill()
    print(f"{len(client.statuses)} requests: {sorted(set(client.statuses))}; {sum(map(len, found.values()))} B of logs")
    assert 500 not in client.statuses
    assert {name: lines_with(text) for name, text in found.items() if lines_with(text)} == {}
    assert CANARY not in messages
    with sessions.begin() as session:
        codes = set(session.scalars(select(Job.error["code"].astext).where(Job.error.is_not(None))))
    assert "INTERNAL" not in codes, "each is foreseen"


def lines_with(text: str) -> list[str]:
    """The lines that name the patient."""
    return [line for line in text.splitlines() if CANARY in line]


def all_ended(sessions: Sessions) -> bool:
    """Whether no job runs."""
    with sessions.begin() as session:
        return session.scalar(select(func.count(Job.id)).where(Job.finished_at.is_(None))) == 0


def everything_in(url: str) -> str:
    """All keys and values of Redis."""
    with redis.Redis.from_url(url) as client:
        return str([(key, client.dump(key)) for key in client.scan_iter()])
