"""A whole stack in which everything that a canary was written into is deleted: it is found in no file afterwards."""

import io
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image, PngImagePlugin
from sqlalchemy import text

from cli.stack.embedded import embedded_postgres
from jobs.db import make_engine
from ml.synthetic import phantom_files
from tests.e2e.conftest import PARAMS, Client
from tests.whole_stack import RunningStack

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

CANARY = "zaunkoenig"
"""In names, ids, labels, pixels' files and metadata of what is deleted, and in nothing else."""
HASTY = {"RENALQ_DELETION_GRACE_SECONDS": "2", "RENALQ_TRACK_AGAIN_SECONDS": "3"}
SIZE = 64


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    """A Postgres of its own, whose files lie beside the stack's."""
    with embedded_postgres(tmp_path / "postgres", fsync=False) as url:
        yield url


@pytest.fixture
def stack(tmp_path: Path, database: str) -> Iterator[RunningStack]:
    """A whole stack on that Postgres."""
    stack = RunningStack(tmp_path / "home", RENALQ_DATABASE_URL=database, **HASTY)
    try:
        yield stack.ready()
    finally:
        stack.end()


def scan() -> bytes:
    """A picture whose file says whose it is."""
    told, file = PngImagePlugin.PngInfo(), io.BytesIO()
    told.add_text("Patient", CANARY)
    Image.new("L", (SIZE, SIZE), 90).save(file, "PNG", pnginfo=told)
    return file.getvalue()


def dataset(folder: Path) -> bytes:
    """A zip with a file of that name."""
    made, packed = folder / "ct.zip", io.BytesIO()
    phantom_files.write_zip(made, patients=24, slices=1, seed=3, size=SIZE)
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(packed, "w") as target:
        for name in source.namelist():
            target.writestr(f"{Path(name).parent}/{CANARY}-{Path(name).name}", source.read(name))
    return packed.getvalue()


def train(client: Client, folder: Path) -> dict[str, Any]:
    """A training that is no champion, on a dataset of that name."""
    form = {"name": f"{CANARY}-dataset"}
    made = client.post("/datasets", files={"file": (f"{CANARY}.zip", dataset(folder))}, data=form).json()
    client.ended(client.get(f"/jobs/{made['job_id']}").json())
    params = {**PARAMS, "network": "resnet18", "image_size": [SIZE, SIZE, 3], "epochs": 1}
    wanted = {"dataset_id": made["id"], "params": params, "promote": "never", "name": f"{CANARY}-job"}
    job = client.ended(client.post("/jobs/train", json={**wanted, "metadata": {"of": CANARY}}).json())
    assert job["state"] == "succeeded", job["error"]
    return job


def predict(client: Client, model: str) -> tuple[str, str]:
    """An explained prediction with feedback; its id, and the scan's."""
    form = {"model": model, "precision": "fp32", "explain": "true", "custom_id": f"{CANARY}-order"}
    sent = {"files": {"file": (f"{CANARY}.png", scan())}, "headers": {"Idempotency-Key": f"{CANARY}-key"}}
    job = client.ended(client.post("/jobs/predict", data=form, **sent).json())
    assert job["state"] == "succeeded", job["error"]
    scan_id = client.get(f"/jobs/{job['id']}/results").json()["data"][0]["scan_id"]
    label = client.get(f"/jobs/{job['id']}/results").json()["data"][0]["label"]
    assert client.post(f"/jobs/{job['id']}/results/{scan_id}/truth", json={"label": label}).status_code == 201
    return job["id"], scan_id


def delete(client: Client, path: str) -> dict[str, Any]:
    """The receipt once everything has gone, but for MLflow."""
    headers = {"Authorization": f"Bearer {client.key}"}
    began = time.monotonic()
    answer = requests.delete(client.url + path, headers=headers, timeout=10)
    assert answer.status_code == 202, answer.text
    receipt = answer.json()
    while (receipt["state"], receipt["left"]["mlflow_runs"]) == ("deleting", 0) or not receipt["counts"].get("jobs", 1):
        assert time.monotonic() < began + 120, receipt
        time.sleep(0.5)
        receipt = client.get(receipt["links"]["self"].removeprefix("/v1")).json()
    return receipt


def found(folder: Path) -> list[str]:
    """The files with the canary."""
    word = re.compile(CANARY.encode(), re.IGNORECASE)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in files if word.search(path.read_bytes()))


def rows_with_it(url: str) -> list[str]:
    """The tables with the canary in a row; then all of them are written anew, and what they were is removed."""
    engine = make_engine(url).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).all()
        asked = {name: text(f"SELECT count(*) FROM {name} AS t WHERE t::text ILIKE '%{CANARY}%'") for name in tables}  # noqa: S608
        seen = [name for name, question in asked.items() if connection.scalar(question)]
        for statement in ("VACUUM FULL", "CHECKPOINT", "SELECT pg_switch_wal()", "CHECKPOINT"):
            connection.execute(text(statement))
    engine.dispose()
    return seen


def test_nothing_of_what_was_deleted_is_found_on_disk(tmp_path: Path, database: str, stack: RunningStack) -> None:
    home = stack.home
    client = Client(stack.url, stack.key(), home)
    trained = train(client, tmp_path)
    job_id, scan_id = predict(client, trained["model_version"])
    (tmp_path / "ct.zip").unlink()
    print("before:", found(home))
    assert len(found(home)) > 2, "the canary sings"
    assert rows_with_it(database) != []

    of_scan = delete(client, f"/scans/{scan_id}")
    assert of_scan["counts"]["results"] == of_scan["counts"]["scans"] == of_scan["counts"]["feedback"] == 1
    of_job = delete(client, f"/jobs/{job_id}")
    of_model = delete(client, f"/models/{trained['model_version']}")
    of_dataset = delete(client, f"/datasets/{trained['dataset_id']}")
    assert (of_scan["state"], of_job["state"], of_dataset["state"]) == ("deleted",) * 3
    assert of_model["left"]["mlflow_runs"] == 1, "it waits until no worker can write to it"
    with make_engine(database).begin() as connection:
        connection.execute(text("UPDATE released_runs SET due_at = now()"))
    deadline = time.monotonic() + 120
    while of_model["state"] != "deleted" and time.monotonic() < deadline:
        time.sleep(1)
        of_model = client.get(f"/deletions/{of_model['id']}").json()
    assert of_model["state"] == "deleted", of_model
    assert of_model["counts"]["mlflow_runs"] == 1

    assert [each["kind"] for each in client.get("/deletions").json()["data"]] == ["dataset", "model", "job", "scan"]
    assert rows_with_it(database) == []
    assert found(home) == []
    print("receipts:", of_scan["counts"], of_job["counts"], of_model["counts"], of_dataset["counts"])
    left = [name for name in found(tmp_path / "postgres") if "pg_wal" not in name]
    assert left == [], "in Postgres' files, beside the WAL, which is written over in time"
    assert list((home / "cache").iterdir()) == [], "neither pixels nor features"
    assert list((home / "artifacts").rglob("*.safetensors")) == []
