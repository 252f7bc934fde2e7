"""A training's parameters by REST are those of the worker: what one side takes or refuses, the other does too."""

import json
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st

from api.resources import training_params
from api.resources.training_params import ParamsSchema
from jobs.db import Sessions
from jobs.tables import Job, ModelVersion
from tests.api.test_errors import assert_problem

pytest.importorskip("pydantic")
from ml.runtime.config import parse_params
from ml.runtime.errors import BadParams
from ml.spec import image as theirs
from ml.spec.image import NETWORKS, Params

SOURCE = {"source_url": "https://example.org/ct.zip"}
TAKEN: list[dict[str, Any]] = [
    {},
    {"network": "resnet18", "head": "gap", "weights": "none", "image_size": [64, 96, 3]},
    {"network": "vit_b_16", "image_size": [224, 224, 3]},
    {"network": "inception_v3", "image_size": [75, 75, 3]},
    {"include_top": True, "head": "vgg"},
    {"window_center": 40, "window_width": 400.5},
    {"augmentation": "randaugment", "standardize": True, "classes": None, "clip_norm": 1},
    {"weights": "file:kidney v2.safetensors"},
    {"weights": "version:12", "fine_tune_epochs": 3, "fine_tune_learning_rate": 1e-5},
    {"fine_tune_blocks": 13, "network": "vit_b_16"},
    {"folds": 5, "test_size": 0.3, "validation_size": 0.4},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"network": "alexnet"}, "network"),
    ({"network": "VGG16"}, "network"),
    ({"head": "none"}, "head"),
    ({"dropout": 1}, "dropout"),
    ({"image_size": [16, 16, 3]}, "image_size"),
    ({"image_size": [224, 224, 1]}, "image_size"),
    ({"image_size": [224, 224]}, "image_size"),
    ({"image_size": "224"}, "image_size"),
    ({"network": "vit_b_16", "image_size": [256, 256, 3]}, "image_size"),
    ({"network": "inception_v3", "image_size": [64, 224, 3]}, "image_size"),
    ({"weights": "imagenet21k"}, "weights"),
    ({"weights": "imagenet\n"}, "weights"),
    ({"weights": "version:0"}, "weights"),
    ({"weights": "version:1 "}, "weights"),
    ({"weights": "file:"}, "weights"),
    ({"include_top": 1}, "include_top"),
    ({"include_top": True, "weights": "none"}, "include_top"),
    ({"include_top": True, "weights": "version:3"}, "include_top"),
    ({"include_top": True, "network": "resnet18"}, "include_top"),
    ({"include_top": True, "head": "gap"}, "include_top"),
    ({"classes": 1}, "classes"),
    ({"window_center": 40}, "window_width"),
    ({"window_width": 400}, "window_center"),
    ({"window_center": 40, "window_width": 0.5}, "window_width"),
    ({"test_size": 0.51}, "test_size"),
    ({"test_size": 0.5, "validation_size": 0.3}, "validation_size"),
    ({"held_out": 0.2}, "held_out"),
    ({"folds": 1}, "folds"),
    ({"folds": 21}, "folds"),
    ({"balance": True}, "balance"),
    ({"augmentation": "RandAugment"}, "augmentation"),
    ({"augmentation": 1}, "augmentation"),
    ({"epochs": 0}, "epochs"),
    ({"epochs": 2.0}, "epochs"),
    ({"epochs": True}, "epochs"),
    ({"epochs": None}, "epochs"),
    ({"optimizer": "adam"}, "optimizer"),
    ({"learning_rate": -0.1}, "learning_rate"),
    ({"learning_rate": 0}, "learning_rate"),
    ({"learning_rate": "0.1"}, "learning_rate"),
    ({"gamma": 1.0}, "gamma"),
    ({"clip_norm": 0}, "clip_norm"),
    ({"fine_tune_learning_rate": 0}, "fine_tune_learning_rate"),
    ({"fine_tune_blocks": 6}, "fine_tune_blocks"),
    ({"fine_tune_blocks": 10, "network": "efficientnet_b0"}, "fine_tune_blocks"),
    ({"monitor": "f1"}, "monitor"),
    ({"precision": "fp16"}, "precision"),
    ({"devices": 0}, "devices"),
    ({"seed": 2**31}, "seed"),
    ({"standardize": "yes"}, "standardize"),
    ({"colour": "red"}, "colour"),
]


def refused_here(params: dict[str, Any]) -> set[str]:
    """The fields that the API complains about."""
    return set(ParamsSchema().validate(params))


def refused_there(params: dict[str, Any]) -> str | None:
    """The field that the worker complains about."""
    try:
        parse_params(params)
    except BadParams as error:
        return str(error).partition(":")[0].partition(".")[0]
    return None


def test_both_sides_have_the_same_fields_with_the_same_words_and_defaults() -> None:
    there = Params.model_json_schema()["properties"]
    here = {name: field.metadata for name, field in ParamsSchema().fields.items()}
    assert list(here) == list(there), "in the same order too"
    for name, told in there.items():
        assert (here[name]["description"], here[name]["default"]) == (told["description"], told["default"]), name


def test_both_sides_draw_the_same_line_at_every_bound() -> None:
    lines = 0
    for name, told in Params.model_json_schema()["properties"].items():
        for one in (told, *told.get("anyOf", ())):
            for bound in (one[key] for key in one if "inimum" in key or "aximum" in key):
                lines += 1
                for value in (bound, bound - 1, bound + 1, bound - 1e-6, bound + 1e-6):
                    _agree({name: value})
    assert lines > 40


def test_both_sides_know_the_same_networks_and_their_sizes() -> None:
    assert set(ParamsSchema().fields["network"].validators[0].choices) == set(NETWORKS)  # type: ignore[attr-defined]
    for network in NETWORKS:
        for side in (32, 74, 75, 224, 256):
            params = {"network": network, "image_size": [side, side, 3]}
            assert bool(refused_here(params)) == bool(refused_there(params)), params
    for name in ("BLOCKS", "LEAST_SIDE", "FIXED_SIDE"):
        assert getattr(training_params, name) == getattr(theirs, name), name


@pytest.mark.parametrize("params", TAKEN, ids=str)
def test_both_sides_take_what_is_right(params: dict[str, Any]) -> None:
    assert (refused_here(params), refused_there(params)) == (set(), None)


@pytest.mark.parametrize(("params", "field"), REFUSED, ids=str)
def test_both_sides_refuse_what_is_wrong_and_name_the_same_field(params: dict[str, Any], field: str) -> None:
    assert (refused_here(params), refused_there(params)) == ({field}, field)


# --- whatever one may think of ---

EDGES = sorted({edge + step for edge in (0, 1, 2, 10, 12, 20, 64, 100, 256, 1000, 1024, 2**31) for step in (-1, 0, 1)})
NUMBERS = st.sampled_from(EDGES) | st.sampled_from([-2000, -2001, 5000, 5001, 10000, 10001, 1e-9, 0.05, 0.2, 0.5, 0.7])
WORDS = st.sampled_from([*NETWORKS, "auto", "vgg", "gap", "none", "cosine", "val_f1", "best", "bf16", "", "true", "1"])
WEIGHTS = st.sampled_from(
    ["file:a.pth", "file:", "version:1", "version:01", "version:", "imagenet", "imagenet ", "none"]
)
SIZES = st.lists(st.sampled_from([3, 16, 31, 32, 75, 224, 1024, 1025, 3.0, "3", True]), max_size=4)
ANYTHING = (
    NUMBERS
    | WORDS
    | WEIGHTS
    | SIZES
    | st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers()
    | st.text(st.characters(exclude_characters="/\\.:"), max_size=5)
    | st.just({})
)
RIGHT = {
    "network": st.sampled_from(NETWORKS),
    "image_size": st.sampled_from([[32, 32, 3], [75, 75, 3], [224, 224, 3], [224, 225, 3]]),
    "head": st.sampled_from(["auto", "vgg", "gap"]),
    "weights": st.sampled_from(["imagenet", "none", "file:a.pth", "version:2"]),
    "include_top": st.booleans(),
    "window_center": st.none() | st.just(40.0),
    "window_width": st.none() | st.just(400.0),
    "test_size": st.sampled_from([0.05, 0.2, 0.3, 0.5]),
    "validation_size": st.sampled_from([0.05, 0.1, 0.2, 0.4]),
    "folds": st.sampled_from([0, 1, 2]),
    "fine_tune_blocks": st.sampled_from([1, 5, 6, 9, 10, 13]),
}


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from([*Params.model_fields, "held_out", "colour"]), ANYTHING, max_size=2))
def test_what_one_side_takes_the_other_takes(params: dict[str, Any]) -> None:
    _agree(json.loads(json.dumps(params)))


@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries({}, optional=RIGHT))
def test_both_sides_find_the_same_contradictions_between_fields(params: dict[str, Any]) -> None:
    _agree(params)


def _agree(params: dict[str, Any]) -> None:
    here, there = refused_here(params), refused_there(params)
    assert (there in here) if there else not here, (params, here, there)


# --- by REST ---


def refusal(client: FlaskClient, params: dict[str, Any]) -> dict[str, str]:
    """The one complaint about a training with these parameters."""
    problem = assert_problem(client.post("/jobs/train", json={**SOURCE, "params": params}), 422, "INVALID")
    (only,) = problem["errors"]
    return dict(only)


def test_a_contradiction_is_422_that_points_at_the_field_and_says_what_to_do(client: FlaskClient) -> None:
    found = refusal(client, {"network": "vit_b_16", "image_size": [256, 256, 3]})
    assert found == {"pointer": "/params/image_size", "detail": "vit_b_16 takes [224, 224, 3] only."}
    assert refusal(client, {"window_center": 40})["pointer"] == "/params/window_width"


def test_the_old_name_of_a_parameter_leads_to_the_new_one(client: FlaskClient) -> None:
    found = refusal(client, {"held_out": 0.2})
    assert found["pointer"] == "/params/held_out"
    assert "test_size" in found["detail"]


@pytest.mark.parametrize("name", ["../a.pth", "a/b.pth", "..", "a..b", ".hidden", "a\\b", "/etc/passwd", "a\0b"])
def test_a_weights_file_is_named_without_a_path(client: FlaskClient, name: str) -> None:
    assert refusal(client, {"weights": f"file:{name}"})["pointer"] == "/params/weights"


def test_the_document_tells_every_parameter_with_its_default(client: FlaskClient) -> None:
    told = client.get("/openapi.json").get_json()["components"]["schemas"]["Params"]["properties"]
    for name, field in Params.model_json_schema()["properties"].items():
        assert (told[name]["description"], told[name]["default"]) == (field["description"], field["default"]), name
    assert (told["gamma"]["exclusiveMinimum"], told["gamma"]["exclusiveMaximum"]) == (0, 1)


def test_the_guide_lists_every_parameter_with_its_default() -> None:
    lines = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text().splitlines()
    start = lines.index("| name | default | range | what it is |")
    rows = [line.split(" | ") for line in lines[start + 2 : lines.index("", start)]]
    told = {row[0].strip("| `"): json.loads(row[1].strip("`")) for row in rows}
    assert told == {name: field["default"] for name, field in Params.model_json_schema()["properties"].items()}


# --- from a version ---


def test_a_training_from_a_version_is_pinned_to_it(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    body = {**SOURCE, "params": {"weights": f"version:{champion.version}"}}
    answer = client.post("/jobs/train", json=body)
    assert answer.status_code == 202
    with sessions.begin() as session:
        assert session.get_one(Job, answer.get_json()["id"]).base_model_id == champion.id


def test_an_unknown_version_is_422_with_the_remedy(
    client: FlaskClient, stranger: FlaskClient, champion: ModelVersion
) -> None:
    for asker, version in ((client, 99), (stranger, champion.version)):
        found = refusal(asker, {"weights": f"version:{version}"})
        assert found["pointer"] == "/params/weights"
        assert "GET /models" in found["detail"]
    assert client.get("/jobs?state=queued").get_json()["data"] == []


def test_a_version_of_another_network_is_422_that_names_both(client: FlaskClient, champion: ModelVersion) -> None:
    found = refusal(client, {"weights": f"version:{champion.version}", "network": "resnet18"})
    assert found["pointer"] == "/params/network"
    assert "vgg16" in found["detail"]
    assert "resnet18" in found["detail"]
