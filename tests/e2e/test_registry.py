"""The registry as its users meet it: the better network serves, the worse is blocked with reasons, force is written
down, and a rollback is there for the very next prediction while a batch ends with the network that it began with."""

import io
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.depth import depth
from tests.e2e.conftest import PARAMS, Client

pytestmark = [pytest.mark.slow, pytest.mark.scaled, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def worse(client: Client, trained: dict[str, Any]) -> dict[str, Any]:
    """A training on the same scans that learns next to nothing."""
    params = {**PARAMS, "epochs": 1, "learning_rate": 1e-6} | depth({"network": "resnet18"}, {})
    answer = client.post("/jobs/train", json={"dataset_id": trained["dataset_id"], "params": params})
    assert answer.status_code == 202, answer.text
    return client.ended(answer.json())


def leading(version: dict[str, Any]) -> str:
    """What the gate calls the leading figure of a version."""
    return "F1 by patient" if version["metrics"]["patients_known"] else "F1 by group of scans"


@pytest.fixture
def restored(client: Client, trained: dict[str, Any]) -> Iterator[None]:
    """Whatever a test does, the good network is champion after it."""
    yield
    if client.get("/models/champion").json()["version"] != trained["model_version"]:
        version = trained["model_version"]
        client.post(f"/models/{version}/promote", json={"force": True, "reason": "the test is over"})


def test_the_gate_blocks_the_worse_and_says_why(client: Client, trained: dict[str, Any], worse: dict[str, Any]) -> None:
    good, bad = (client.get(f"/models/{job['model_version']}").json() for job in (trained, worse))
    assert good["champion"], "the first one reached what a first one must"
    assert good["gate"]["promoted"]
    assert not bad["champion"]
    compared = client.get("/models/compare", params={"a": good["version"], "b": bad["version"]}).json()
    theirs, ours = compared["metrics"]["f1"]
    assert theirs > ours
    figures = compared["paired"]["differences"]["f1"]
    where = f"(version {good['version']}) on the same {compared['scans']} test scans"
    sentence = f"{leading(good)} {figures['b']:.4f}, the champion's {figures['a']:.4f} {where}"
    assert any(reason.startswith(sentence) for reason in bad["gate"]["reasons"]), bad["gate"]
    refused = client.post(f"/models/{bad['version']}/promote", json={"reason": "let us see"})
    assert refused.status_code == 409
    assert refused.json()["code"] == "PROMOTION_REFUSED"
    assert refused.json()["reasons"]


@pytest.mark.usefixtures("restored")
def test_the_gate_promotes_the_better_over_a_champion(
    client: Client, trained: dict[str, Any], worse: dict[str, Any]
) -> None:
    good, bad = trained["model_version"], worse["model_version"]
    client.post(f"/models/{bad}/promote", json={"force": True, "reason": "a trial"})
    compared = client.get("/models/compare", params={"a": good, "b": bad}).json()
    figures = compared["paired"]["differences"]["f1"]
    promoted = client.post(f"/models/{good}/promote", json={})
    assert promoted.status_code == 200, promoted.text
    latest = client.get("/models/promotions?limit=1").json()["data"][0]
    assert (latest["how"], latest["version"], latest["replaced"]) == ("request", good, bad)
    where = f"(version {bad}) on the same {compared['scans']} test scans"
    sentence = (
        f"{leading(client.get(f'/models/{good}').json())} {figures['a']:.4f}, the champion's {figures['b']:.4f} {where}"
    )
    assert any(reason.startswith(sentence) for reason in latest["verdict"]["reasons"]), latest["verdict"]


@pytest.mark.usefixtures("restored")
def test_a_rollback_is_there_for_the_next_prediction_and_a_running_batch_ends_as_it_began(
    client: Client, trained: dict[str, Any], worse: dict[str, Any], archive: Path
) -> None:
    good, bad = trained["model_version"], worse["model_version"]
    unreasoned = client.post(f"/models/{bad}/promote", json={"force": True})
    assert unreasoned.status_code == 422, "force asks for a reason"
    forced = client.post(f"/models/{bad}/promote", json={"force": True, "reason": "a trial on the night shift"})
    assert forced.status_code == 200, forced.text
    with archive.open("rb") as file:
        batch = client.post("/jobs/predict/batch", files={"files": (archive.name, file)}).json()
    assert batch["model_version"] == bad
    _wait_until_some_are_done(client, batch)

    name, scan = _one_scan(archive)
    began = time.monotonic()
    back = client.post("/models/rollback", json={"reason": "the trial is over"})
    assert back.status_code == 200, back.text
    answer = client.post("/jobs/predict", files={"file": ("scan", scan)})
    seconds = time.monotonic() - began
    assert answer.json()["model_version"] == good, "the very next one"
    assert seconds < 1
    assert client.ended(answer.json())["state"] == "succeeded"

    ended = client.ended(batch, 400)
    assert ended["state"] == "succeeded", ended["error"]
    found = _probabilities(client, batch, name)
    assert found == pytest.approx(_predicted(client, scan, bad), abs=0.01), "computed by the network of its start"
    assert found != pytest.approx(_predicted(client, scan, good), abs=0.01)

    history = client.get("/models/promotions").json()["data"]
    assert [(entry["how"], entry["version"], entry["replaced"]) for entry in history[:2]] == [
        ("rollback", good, bad),
        ("force", bad, good),
    ]
    assert [entry["reason"] for entry in history[:2]] == ["the trial is over", "a trial on the night shift"]
    assert all(entry["key_id"] for entry in history[:2])
    assert not history[1]["verdict"]["promoted"], "what the gate had to say stands beside the force"


def _wait_until_some_are_done(client: Client, batch: dict[str, Any]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        seen = client.get(batch["links"]["self"]).json()
        if seen["counts"]["succeeded"]:
            assert not seen["terminal"], "the batch is to be in flight"
            return
        time.sleep(0.1)
    raise AssertionError("The batch does not begin.")


def _one_scan(archive: Path) -> tuple[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        name = next(name for name in opened.namelist() if not name.endswith("/"))
        return name, opened.read(name)


def _probabilities(client: Client, job: dict[str, Any], name: str | None = None) -> dict[str, float]:
    """Of the job's only scan, or of that with this name."""
    page: dict[str, Any] = {"next": None, "has_more": True}
    while page["has_more"]:
        asked = {"limit": 100} | ({"after": page["next"]} if page["next"] else {})
        page = client.get(job["links"]["results"], params=asked).json()
        for row in page["data"]:
            if name is None or row["name"] == name:
                assert not row["cached"]
                found: dict[str, float] = row["probabilities"]
                return found
    raise AssertionError(f"There is no result of {name}.")


def _predicted(client: Client, scan: bytes, version: str) -> dict[str, float]:
    """What a version says of the same picture in other bytes: of the same ones the result would be taken over."""
    sink = io.BytesIO()
    with Image.open(io.BytesIO(scan)) as picture:
        other = PngInfo()
        other.add_text("copy", "of the same pixels")
        picture.save(sink, "PNG", pnginfo=other)
    answer = client.post("/jobs/predict", files={"file": ("scan", sink.getvalue())}, data={"model": version})
    return _probabilities(client, client.ended(answer.json()))
