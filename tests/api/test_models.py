"""Models as people see them: lists, promotions, rollback, comparison, weights, and cards."""

import io
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from api.http.context import EXTENSION
from api.views.model_card_markdown import escaped
from jobs.db import Sessions, listening
from jobs.models import promotion
from jobs.models.cards import REGISTRY_SYNC
from jobs.models.gate import GatePolicy
from jobs.settings import Settings
from jobs.tables import Dataset, ModelVersion
from tests import builders
from tests.api.conftest import Door
from tests.api.test_errors import assert_problem
from tests.api.test_idempotency import left_unanswered
from tests.builders import store_weights

FULL: dict[str, Any] = {
    **builders.SCORES,
    "accuracy": 0.95, "precision": 0.96, "specificity": 0.97, "roc_auc": 0.99, "pr_auc": None, "threshold": 0.4,
    "temperature": 1.3, "calibration": "Temperature 1.3.", "ece_before": 0.09, "positive": "Tumor",
    "classes": ["Normal", "Tumor"], "held_out": 93, "independent": 80, "patients_known": False,
    "counts": {"train": 300, "validation": 40, "test": 93}, "test_digest": "e" * 64,
    "intervals": {"f1": [0.91, 0.99], "pr_auc": None, "recall": [0.86, 0.99]}, "interval_methods": {"f1": "jackknife"},
    "per_class": {"Normal": {"precision": 0.9, "recall": 0.95, "f1": 0.93, "roc_auc": None, "support": 48}},
    "confusion_matrix": [[45, 3], [2, 43]], "sensitivity_at_specificity": {"0.90": 0.98},
    "leaks": {"patients": 0, "duplicates": 2, "near_duplicates": 0},
    "cross_validation": {"folds": [{"f1": 0.9}, {"f1": 0.94}], "mean": {"f1": 0.92}, "std": {"f1": 0.02}},
    "engines": {"openvino-int8": {"admitted": False, "reason": "F1 fell by 0.100, more than 0.005"}},
}  # fmt: skip
SEEN = {"image_size": [224, 192, 3], "window_center": 40.0, "window_width": 400.0, "spacing_mm": 1.5}
PARAMS = {"network": "resnet18", **SEEN, "seed": 7}


def make_model(sessions: Sessions, scores: dict[str, Any] | None = None, **new: Any) -> ModelVersion:
    """A version as its training's end leaves it."""
    with sessions.begin() as session:
        return builders.make_model(session, scores, **{"params": PARAMS, **new})


# --- lists ---


def test_versions_come_in_pages_newest_first(client: FlaskClient, sessions: Sessions) -> None:
    for _ in range(3):
        make_model(sessions)
    first = client.get("/models?limit=2").get_json()
    assert ([each["version"] for each in first["data"]], first["has_more"]) == (["3", "2"], True)
    last = client.get(f"/models?limit=2&after={first['next']}").get_json()
    assert ([each["version"] for each in last["data"]], last["has_more"], last["next"]) == (["1"], False, None)
    assert_problem(client.get("/models?limit=0"), 422)


def test_a_version_says_how_it_sees_decides_and_was_split(client: FlaskClient, sessions: Sessions) -> None:
    make_model(sessions, FULL | {"leaks": {}})
    found = client.get("/models/champion").get_json()
    assert found == client.get("/models/1").get_json()
    assert (found["network"], found["head"]) == ("resnet18", "gap")
    assert found["transform"] == {"height": 224, "width": 192, "window": [40.0, 400.0], "spacing_mm": 1.5}
    assert found["split"] == {"train": 300, "validation": 40, "test": 93}
    calibration = {"temperature": 1.3, "threshold": 0.4, "positive": "Tumor", "positives": ["Tumor"], "ece": 0.04}
    calibration["ece_chance"] = 0.03
    assert found["calibration"] == calibration
    parts = {name: f"/models/1/{name}" for name in ("card", "weights", "drift")}
    assert found["links"] == {"self": "/models/1", "job": f"/jobs/{found['job_id']}", **parts}


def test_a_version_of_an_earlier_renalq_is_shown_as_far_as_it_is_known(client: FlaskClient, sessions: Sessions) -> None:
    make_model(sessions, params={"epochs": 2})
    found = client.get("/models/1").get_json()
    assert (found["network"], found["head"], found["split"]) == ("vgg16", "vgg", None)
    assert found["transform"] == {"height": None, "width": None, "window": None, "spacing_mm": None}


def test_links_lead_to_mlflow_where_its_public_address_is_known(
    app: Flask, client: FlaskClient, sessions: Sessions
) -> None:
    services = app.extensions[EXTENSION]
    shown = services.settings.model_copy(update={"mlflow_public_url": "https://mlflow.example/"})
    object.__setattr__(services, "settings", shown)
    made = make_model(sessions, mlflow_run_id="r1")
    assert client.get("/models/1").get_json()["links"]["mlflow"] == "https://mlflow.example/#/runs/r1"
    with sessions.begin() as session:
        session.get_one(ModelVersion, made.id).mlflow_version = "4"
    expected = "https://mlflow.example/#/models/renalq-default/versions/4"
    assert client.get("/models/1").get_json()["links"]["mlflow"] == expected


# --- the champion ---


def test_a_version_that_the_gate_refuses_is_promoted_by_force_alone(client: FlaskClient, sessions: Sessions) -> None:
    make_model(sessions)
    make_model(sessions, {"f1": 0.90})
    refused = client.post("/models/2/promote", json={})
    problem = assert_problem(refused, 409, "PROMOTION_REFUSED")
    assert any("F1 0.9000, the champion's 0.9700" in reason for reason in problem["reasons"])
    assert "force" in problem["detail"]
    assert client.get("/models/champion").get_json()["version"] == "1"

    forced = client.post("/models/2/promote", json={"force": True, "reason": "The other scanner."})
    assert (forced.status_code, forced.get_json()["version"], forced.get_json()["champion"]) == (200, "2", True)
    assert client.get("/models/champion").get_json()["version"] == "2"
    assert client.get("/models/1").get_json()["links"]["compare"] == "/models/compare?a=champion&b=1"


@pytest.mark.parametrize("reason", [{}, {"reason": None}, {"reason": "  "}, {"reason": ""}])
def test_force_without_a_reason_points_at_what_is_missing(
    client: FlaskClient, champion: object, reason: dict[str, Any]
) -> None:
    problem = assert_problem(client.post("/models/1/promote", json={"force": True, **reason}), 422)
    assert [error["pointer"] for error in problem["errors"]] == ["/reason"]


def test_a_rollback_brings_the_champion_before_back(client: FlaskClient, sessions: Sessions) -> None:
    make_model(sessions)
    assert_problem(client.post("/models/rollback"), 409, "NOTHING_BEFORE")
    make_model(sessions, {"f1": 0.99})
    back = client.post("/models/rollback", json={"reason": "Too many alarms."})
    assert (back.status_code, back.get_json()["version"], back.get_json()["champion"]) == (200, "1", True)
    assert_problem(client.post("/models/rollback"), 409, "NOTHING_BEFORE")


def test_one_key_rolls_back_once(client: FlaskClient, sessions: Sessions) -> None:
    for f1 in (0.97, 0.98, 0.99):
        make_model(sessions, {"f1": f1})
    answers = [client.post("/models/rollback", headers={"Idempotency-Key": "once"}) for _ in range(2)]
    assert [answer.get_json()["version"] for answer in answers] == ["2", "2"]
    assert client.get("/models/champion").get_json()["version"] == "2"


def test_a_rollback_whose_answer_was_lost_is_done_once(client: FlaskClient, sessions: Sessions) -> None:
    for f1 in (0.97, 0.98, 0.99):
        make_model(sessions, {"f1": f1})
    once = {"Idempotency-Key": "once"}
    client.post("/models/rollback", headers=once)
    left_unanswered(sessions)
    again = client.post("/models/rollback", headers=once)
    assert (again.status_code, again.get_json()["version"]) == (200, "2")
    assert again.headers["Idempotency-Replayed"] == "true"
    assert client.get("/models/champion").get_json()["version"] == "2"


def test_a_rollback_of_one_who_was_taken_for_dead_changes_nothing(
    client: FlaskClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for f1 in (0.97, 0.98, 0.99):
        make_model(sessions, {"f1": f1})
    once, rollback, answers = {"Idempotency-Key": "once"}, promotion.rollback, []

    def slow(*args: Any, **kwargs: Any) -> ModelVersion:
        monkeypatch.setattr(promotion, "rollback", rollback)
        left_unanswered(sessions)
        answers.append(client.post("/models/rollback", headers=once))
        return rollback(*args, **kwargs)

    monkeypatch.setattr(promotion, "rollback", slow)
    assert_problem(client.post("/models/rollback", headers=once), 409, "IDEMPOTENCY_IN_FLIGHT")
    assert [answer.get_json()["version"] for answer in answers] == ["2"]
    assert client.get("/models/champion").get_json()["version"] == "2"


def test_each_change_of_the_champion_is_in_the_audit(client: FlaskClient, sessions: Sessions) -> None:
    make_model(sessions)
    make_model(sessions, {"f1": 0.5})
    client.post("/models/2/promote", json={"force": True, "reason": "To see."})
    client.post("/models/rollback")
    keys = client.get("/keys").get_json()["data"]

    first = client.get("/models/promotions?limit=2").get_json()
    last = client.get(f"/models/promotions?after={first['next']}").get_json()
    told = [*first["data"], *last["data"]]
    assert [(row["how"], row["version"], row["replaced"], row["reason"]) for row in told] == [
        ("rollback", "1", "2", None),
        ("force", "2", "1", "To see."),
        ("gate", "1", None, None),
    ]
    assert [row["key_id"] for row in told] == [keys[0]["id"], keys[0]["id"], None]
    assert [row["verdict"] and row["verdict"]["promoted"] for row in told] == [None, False, True]
    assert (first["has_more"], last["has_more"]) == (True, False)


def test_only_a_key_for_models_changes_the_champion(door: Door, champion: object) -> None:
    reader = door.client("jobs:read", "jobs:write")
    for path in ("/models/1/promote", "/models/rollback"):
        assert_problem(reader.post(path, json={}), 403)
    assert reader.get("/models/promotions").status_code == 200


def test_another_tenant_sees_and_changes_nothing(stranger: FlaskClient, sessions: Sessions, champion: object) -> None:
    make_model(sessions, {"f1": 0.5})
    for path in ("/models/1", "/models/2/card", "/models/1/weights", "/models/compare?a=1&b=2"):
        assert_problem(stranger.get(path), 404)
    assert_problem(stranger.post("/models/2/promote", json={"force": True, "reason": "Mine."}), 404)
    assert_problem(stranger.post("/models/rollback"), 409, "NO_CHAMPION")
    assert stranger.get("/models/promotions").get_json()["data"] == []


def test_a_change_of_the_champion_rings_for_the_mirror(
    client: FlaskClient, sessions: Sessions, champion: object
) -> None:
    make_model(sessions, {"f1": 0.5})
    with listening(sessions.kw["bind"], "renalq_units") as bell:
        client.post("/models/2/promote", json={"force": True, "reason": "To hear."})
        assert REGISTRY_SYNC in bell.wait(5)


# --- two versions ---


def test_two_versions_compare_on_the_same_scans(client: FlaskClient, sessions: Sessions) -> None:
    make_model(sessions)
    make_model(sessions, {"f1": 0.90}, params=PARAMS | {"seed": 8}, code_revision="abd")
    found = client.get("/models/compare?a=champion&b=2").get_json()
    assert (found["a"]["version"], found["b"]["version"], found["scans"]) == ("1", "2", 93)
    assert found["metrics"]["f1"] == [0.97, 0.90]
    assert found["differences"]["params"] == {"seed": [7, 8]}
    assert found["differences"]["code_revision"] == ["abc", "abd"]
    assert "metrics" not in found["a"], "a comparison is short"
    assert (found["paired"]["scans"], found["paired"]["groups"], found["paired"]["delong"]) == (93, 60, None)
    f1 = {"a": 0.97, "b": 0.90, "difference": 0.07, "low": 0.04, "high": 0.10}
    assert found["paired"]["differences"]["f1"] == pytest.approx(f1)


@pytest.mark.parametrize("query", ["", "?a=1", "?a=1&b=x", "?a=1&b=0", "?a=1&b=2&c=3"])
def test_a_comparison_names_two_versions(client: FlaskClient, champion: object, query: str) -> None:
    assert_problem(client.get(f"/models/compare{query}"), 422)


# --- what is downloaded ---


def test_weights_are_downloaded_once_and_known_by_their_hash(
    app: Flask, client: FlaskClient, sessions: Sessions
) -> None:
    blob = app.extensions[EXTENSION].blobs.put(io.BytesIO(b"weights"))
    make_model(sessions, weights_sha256=blob.sha256)
    answer = client.get("/models/champion/weights")
    assert (answer.data, answer.mimetype) == (b"weights", "application/octet-stream")
    assert answer.headers["Content-Disposition"] == "attachment; filename=renalq-v1.safetensors"
    assert answer.headers["Content-Length"] == "7"
    assert answer.headers["ETag"] == f'"{blob.sha256}"'
    again = client.get("/models/1/weights", headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_weights_that_are_gone_are_said_to_be_gone(client: FlaskClient, champion: object, settings: Settings) -> None:
    store_weights(settings).unlink()
    assert "no longer stored" in assert_problem(client.get("/models/1/weights"), 404)["detail"]


def test_what_is_no_version_is_not_found(client: FlaskClient, champion: object) -> None:
    for version in ("0", "7", "x", "1%0a", "01", "99999999999999999999", "champion "):
        for path in ("", "/card", "/weights"):
            assert_problem(client.get(f"/models/{version}{path}"), 404)
    for path in ("/models/rollback", "/models/1/promote"):
        assert_problem(client.get(path), 405)


def test_where_nobody_is_champion_none_is_found(client: FlaskClient) -> None:
    for path in ("", "/card", "/weights"):
        assert "champion" in assert_problem(client.get(f"/models/champion{path}"), 404)["detail"]


# --- cards ---


@pytest.fixture
def dataset(sessions: Sessions) -> Dataset:
    """A dataset whose name is a patient's; of warnings that name no file (see ml.image.dataset.inspection)."""
    with sessions.begin() as session:
        made = builders.make_dataset(session)
        made.name = "Erika Mustermann"
        made.report = {"warnings": ["Colour modes are mixed.", "Name files like patient-0012_slice-3.png."]}
    return made


def test_a_card_tells_all_in_markdown(client: FlaskClient, sessions: Sessions, dataset: Dataset) -> None:
    make_model(sessions, FULL, dataset=dataset, reference={"scans": 93, "rejected": 2})
    answer = client.get("/models/1/card")
    text = answer.get_data(as_text=True)
    assert answer.headers["Content-Type"] == "text/markdown; charset=utf-8"
    for part in (
        "# Kidney-CT classifier, version 1\n",
        "**Not for diagnosis without a radiologist.**",
        "| Network | resnet18, head gap |",
        "224 × 192 pixels",
        "centre 40, width 400",
        "a" * 64,
        "| Tumor | 225 |",
        "| train | 300 |",
        "Colour modes are mixed.",
        "-3.png",
        "e" * 64,
        "80 independent groups",
        "| F1 | 0.9700 | 0.9100 | 0.9900 |",
        "| **Normal** | 45 | 3 |",
        "F1 0.9200, standard deviation 0.0200",
        "| Threshold | 0.4000 |",
        "2 test scans are copies",
        "**WARNING: the figures may be too good.**",
        "patients are not all known",
        "Of its own 93 test scans, 2 would be rejected",
        "| openvino-int8 | no |",
        "the gate did not promote it",
        "## Ethical considerations",
        "$RENALQ/models/1/weights",
    ):
        assert part in text, part
    assert "Erika" not in text


def test_a_card_comes_as_json_too(client: FlaskClient, sessions: Sessions, dataset: Dataset) -> None:
    make_model(sessions, FULL | {"leaks": {}}, dataset=dataset)
    make_model(sessions, {"f1": 0.5})
    client.post("/models/2/promote", json={"force": True, "reason": "To see."})
    client.post("/models/rollback", json={"reason": "Seen."})
    card = client.get("/models/champion/card", headers={"Accept": "application/json"}).get_json()
    assert card["details"]["version"] == "1"
    assert card["evaluation"]["figures"]["f1"] == {"value": 0.97, "low": 0.91, "high": 0.99, "method": "jackknife"}
    assert "pr_auc" not in card["evaluation"]["figures"], "what is not defined is no figure"
    (elsewhere,) = card["evaluation"]["other_test_sets"]
    assert (elsewhere["test_digest"], elsewhere["scans"], elsewhere["f1"]) == ("c" * 64, 93, 0.97)
    assert [(each["how"], each["reason"]) for each in card["promotions"]] == [("gate", None), ("rollback", "Seen.")]
    assert "Erika" not in str(card)
    text = client.get("/models/1/card").get_data(as_text=True)
    assert "by a rollback, in place of version 2: Seen." in text
    assert f"| {'c' * 12} | 93 | 0.9700 |" in text


def test_a_card_tells_subgroups_and_which_of_them_differ(client: FlaskClient, sessions: Sessions) -> None:
    figures = {"accuracy": [0.9, 0.8, 0.95], "recall": [0.5, 0.3, 0.7], "specificity": None}
    found = [
        {"trait": "scanner", "value": "A|B", "scans": 40, "groups": 20, "figures": figures, "warning": "It differs."}
    ]
    with sessions.begin() as session:
        builders.make_model(session, {"subgroups": found})
    card = client.get("/models/1/card", headers={"Accept": "application/json"}).get_json()
    assert (card["evaluation"]["subgroups"], card["limits"]["subgroups"]) == (found, ["scanner A|B: It differs."])
    text = client.get("/models/1/card").get_data(as_text=True)
    row = r"| scanner: A\|B | 20 | 40 | 0.90 (0.80 to 0.95) | 0.50 (0.30 to 0.70) | too few to say |"
    assert row in text
    assert r"- scanner A\|B: It differs." in text


def test_a_card_tells_the_figures_of_all_folds_together(client: FlaskClient, sessions: Sessions) -> None:
    pooled = {
        "f1": 0.8125, "recall": 0.75, "pr_auc": None, "intervals": {"f1": [0.7, 0.9]}, "held_out": 372,
        "independent": 186,
    }  # fmt: skip
    make_model(sessions, FULL | {"cross_validation": {**FULL["cross_validation"], "pooled": pooled}})
    card = client.get("/models/1/card", headers={"Accept": "application/json"}).get_json()
    found = card["evaluation"]["cross_validation"]
    assert (found["folds"], found["pooled"]["scans"], found["pooled"]["independent_groups"]) == (2, 372, 186)
    assert found["pooled"]["figures"]["f1"] == {"value": 0.8125, "low": 0.7, "high": 0.9, "method": None}
    assert sorted(found["pooled"]["figures"]) == ["f1", "recall"]
    text = client.get("/models/1/card").get_data(as_text=True)
    assert "All folds together: 372 scans in 186 independent groups" in text
    assert "| F1 | 0.8125 | 0.7000 | 0.9000 |" in text
    assert "| Recall (sensitivity) | 0.7500 | – | – |" in text


def test_a_card_of_a_version_of_which_little_is_known_says_so(client: FlaskClient, champion: object) -> None:
    text = client.get("/models/1/card").get_data(as_text=True)
    assert "| Input | not known |" in text
    assert "On not known" not in text
    assert "it answers to any picture" in text


def test_a_card_promises_to_reject_only_what_the_version_can(client: FlaskClient, sessions: Sessions) -> None:
    make_model(sessions, reference={"scans": 93, "classes": {}})
    text = client.get("/models/1/card").get_data(as_text=True)
    assert "it answers to any picture" in text
    assert "would be rejected" not in text


@pytest.mark.parametrize(
    ("modalities", "told"),
    [
        (["CT", None, "MR", "CT"], "It has learnt from CT, MR: DICOM of other modalities is rejected."),
        ([None], "DICOM of any modality is answered to."),
    ],
)
def test_a_card_tells_which_modalities_the_version_has_learnt_from(
    client: FlaskClient, sessions: Sessions, modalities: list[str | None], told: str
) -> None:
    origins = [{"modality": each, "body_part": "KIDNEY", "kind": "grey"} for each in modalities]
    make_model(sessions, FULL | {"origins": origins})
    text = client.get("/models/1/card").get_data(as_text=True)
    assert told in text
    assert "| Spacing | pixels of 1.5 mm, where files say theirs |" in text


def test_a_card_tells_the_newest_of_a_long_history(client: FlaskClient, sessions: Sessions) -> None:
    make_model(sessions)
    make_model(sessions, {"f1": 0.5})
    with sessions.begin() as session:
        for number in range(30):
            for version in ("2", "1"):
                reason = f"Turn {number}."
                promotion.promote(session, builders.TENANT, version, GatePolicy(), force=True, reason=reason)
    card = client.get("/models/1/card", headers={"Accept": "application/json"}).get_json()
    assert [each["reason"] for each in card["promotions"]] == [f"Turn {number}." for number in range(10, 30)]


def test_what_people_wrote_cannot_change_a_card(client: FlaskClient, sessions: Sessions) -> None:
    evil = "Tumor | <script>\n# [x](http://evil)"
    scores = {"classes": ["Normal", evil], "confusion_matrix": [[1, 0], [0, 1]], "positive": evil}
    make_model(sessions)
    worse = scores | {"f1": 0.5}
    make_model(sessions, worse, classes=["Normal", evil], params=PARAMS | {"weights": "file:```\n# x"})
    client.post("/models/2/promote", json={"force": True, "reason": "# Not *this*"})
    text = client.get("/models/2/card").get_data(as_text=True)
    assert r"\# Not \*this\*" in text
    assert r"Tumor \| \<script\> \# \[x\](http://evil)" in text
    assert "<script>" not in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert all(line.startswith(("# Kidney-CT", "## ")) for line in headings)


def test_markdown_shows_a_text_as_it_is() -> None:
    assert escaped("plain (x), 2.5 %") == "plain (x), 2.5 %"
    assert [escaped(text) for text in ("1. one", "- no", "`x`", "a\n\nb")] == [r"1\. one", r"\- no", r"\`x\`", "a b"]
