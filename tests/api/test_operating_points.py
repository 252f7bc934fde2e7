"""By REST: the positive class of a training, and the operating point of a version, set anew by PATCH."""

import io
from typing import Any

import pytest
from flask.testing import FlaskClient
from sqlalchemy import select

from jobs.db import Sessions
from jobs.tables import Dataset, OperatingPointChange
from tests import builders
from tests.api.conftest import Door, png
from tests.api.test_errors import assert_problem
from tests.jobs.test_operating_points import trained

WHY = {"reason": "Screening: a missed cancer weighs more."}


def dataset_of(sessions: Sessions, *classes: str) -> str:
    with sessions.begin() as session:
        made = builders.make_dataset(session)
        session.get_one(Dataset, made.id).classes = dict.fromkeys(classes, 50)
    return str(made.id)


# --- trainings ---


@pytest.mark.parametrize(
    ("classes", "params", "field", "said"),
    [
        (("Cyst", "Tumor"), {}, "positive", "Cyst, Tumor"),
        (("Cancer", "Healthy"), {"positive": "Mass"}, "positive", "There is no class Mass; the classes are Cancer"),
        (("Cancer", "Healthy"), {"positive": ["Healthy", "Cancer"]}, "positive", "one at least must not be"),
        (("Cyst", "Normal", "Tumor"), {"operate_at": {"sensitivity": 0.9}}, "operate_at", "Cyst, Normal, Tumor"),
        (("Cancer", "Healthy"), {"positive": 3}, "positive", "Must be the name of a class"),
        (("Cancer", "Healthy"), {"positive": []}, "positive", "Must be the name of a class"),
        (("Cancer", "Healthy"), {"operate_at": {"recall": 0.9}}, "operate_at", "Must be f1, or one of"),
        (("Cancer", "Healthy"), {"operate_at": {"sensitivity": 2}}, "operate_at", "Must be f1, or one of"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_classes_is_refused_at_submission(
    client: FlaskClient, sessions: Sessions, classes: tuple[str, ...], params: Any, field: str, said: str
) -> None:
    body = {"dataset_id": dataset_of(sessions, *classes), "params": {"weights": "none", **params}}
    for path in ("/jobs/train", "/train"):
        problem = assert_problem(client.post(path, json=body), 422)
        assert said in str(problem)
        assert field in str(problem)


@pytest.mark.parametrize(
    ("classes", "params"),
    [
        (("Cancer", "Healthy"), {}),
        (("Cyst", "Tumor"), {"positive": "Cyst"}),
        (("Cyst", "Normal", "Tumor"), {}),
        (("Cyst", "Normal", "Tumor"), {"positive": ["Cyst", "Tumor"], "operate_at": {"specificity": 0.9}}),
        (("Cancer", "Healthy"), {"positive": None, "operate_at": "f1"}),
    ],
)
def test_what_fits_is_accepted_and_kept_as_it_was_sent(
    client: FlaskClient, sessions: Sessions, classes: tuple[str, ...], params: Any
) -> None:
    body = {"dataset_id": dataset_of(sessions, *classes), "params": {"weights": "none", **params}}
    answer = client.post("/jobs/train", json=body)
    assert answer.status_code == 202
    assert answer.get_json()["params"] == {"weights": "none", **params}


# --- versions ---


def test_a_point_is_set_shown_and_explained_on_the_card(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        trained(session)
    before = client.get("/models/1").get_json()
    assert (before["operating_point"]["rule"], before["operating_point"]["changes"]) == ("f1", 0)
    assert (before["calibration"]["positive"], before["calibration"]["positives"]) == ("Cancer", ["Cancer"])

    answer = client.patch("/models/1", json={"operate_at": {"sensitivity": 0.97}, **WHY})
    assert answer.status_code == 200
    found = answer.get_json()
    assert found == client.get("/models/1").get_json()
    point = found["operating_point"]
    assert (point["rule"], point["wanted"], point["changes"]) == ("sensitivity", 0.97, 1)
    assert point["sensitivity"]["low"] < 0.97 <= point["sensitivity"]["value"]
    assert found["calibration"]["threshold"] == point["threshold"] == found["metrics"]["threshold"]
    card = client.get("/models/1/card", headers={"Accept": "application/json"}).get_json()
    assert card["evaluation"]["figures"]["recall"]["value"] == found["metrics"]["recall"]
    assert [each["reason"] for each in card["operating_point"]["history"]] == [WHY["reason"]]
    page = client.get("/models/1/card").get_data(as_text=True)
    assert "the highest with a sensitivity of 0.97" in page
    assert "a missed cancer weighs more" in page


def test_who_set_it_is_kept(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        trained(session)
    client.patch("/models/1", json={"operate_at": {"threshold": 0.2}, **WHY})
    with sessions.begin() as session:
        assert session.scalars(select(OperatingPointChange)).one().by_key is not None


@pytest.mark.parametrize(
    "body",
    [
        {"operate_at": "f1"}, {"operate_at": "f1", "reason": " "}, WHY, {**WHY, "operate_at": 3},
        {"operate_at": {"threshold": 0.2}, "reason": None}, {**WHY, "operate_at": {}}, {**WHY, "operate_at": None},
    ],
)  # fmt: skip
def test_a_rule_and_a_reason_are_needed(client: FlaskClient, sessions: Sessions, body: Any) -> None:
    with sessions.begin() as session:
        trained(session)
    assert_problem(client.patch("/models/1", json=body), 422)
    assert client.get("/models/1").get_json()["operating_point"]["changes"] == 0


def test_a_stranger_and_a_key_without_the_scope_set_nothing(
    client: FlaskClient, stranger: FlaskClient, door: Door, sessions: Sessions
) -> None:
    with sessions.begin() as session:
        trained(session)
    body = {"operate_at": {"threshold": 0.2}, **WHY}
    assert_problem(stranger.patch("/models/1", json=body), 404)
    assert door.client("jobs:read", "jobs:write").patch("/models/1", json=body).status_code == 403
    assert_problem(client.patch("/models/7", json=body), 404)


def test_a_version_of_an_earlier_release_says_why_not(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        builders.make_model(session, {"positive": "Tumor", "threshold": 0.5})
    problem = assert_problem(client.patch("/models/1", json={"operate_at": "f1", **WHY}), 409, "WRONG_STATE")
    assert "train it again" in problem["detail"]


def test_a_job_keeps_the_point_that_it_was_submitted_with(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        old = trained(session).metrics["threshold"]

    def submitted(shade: int) -> Any:
        answer = client.post("/jobs/predict", data={"file": (io.BytesIO(png(shade=shade)), "a.png"), "model": "1"})
        return client.get(f"/jobs/{answer.get_json()['id']}").get_json()["operating_point"]

    assert submitted(1) == {"positive": ["Cancer"], "threshold": old}
    client.patch("/models/1", json={"operate_at": {"threshold": 0.2}, **WHY})
    assert submitted(2) == {"positive": ["Cancer"], "threshold": 0.2}
