"""A training's parameters by REST: the texts of every refusal, and that the worker accepts what the API accepts."""

import json
from typing import Annotated, Any, Literal

import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator

from api.http.pipelines.schemas import schema_of
from api.resources.jobs.train import TrainRequest
from jobs.db import Sessions
from jobs.queue import processes
from jobs.tables import Job, ModelVersion
from ml.runtime.config import parse_params
from ml.runtime.errors import BadParams
from ml.spec.image import NETWORKS, Params
from tests.api.test_errors import assert_problem
from tests.depth import depth

SOURCE = {"source_url": "https://example.org/ct.zip"}
ACCEPTED: list[dict[str, Any]] = [
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

NULL, UNKNOWN = "Field may not be null.", "Unknown field."
TEXT, WHOLE, NUMBER, FLAG = (f"Not a valid {kind}." for kind in ("string", "integer", "number", "boolean"))
NETWORK = "Must be one of: vgg16, resnet18, resnet50, inception_v3, efficientnet_b0, vit_b_16."
SIDE = "Must be greater than or equal to 3 and less than or equal to 1024."
SIZE = "Must be [height, width, 3], with 32 to 1024 pixels each way."
WEIGHTS = "Must be imagenet, none, version:N, or file:NAME with a plain name: no slash, no .., no dot in front."
POSITIVE = "Must be the name of a class, a list of such names, or null."
SHARE = "Must be greater than or equal to 0 and less than 1."
RATE = "Must be greater than 0 and less than or equal to 10."
NO_TOP = "Only ImageNet's network has a classifier to keep; set weights: imagenet."
NO_HEAD = "Only vgg16 with head: vgg has hidden layers to keep; leave it false."
WINDOW = "A CT window has a centre and a width; give both or neither."
REFUSED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # Words.
    ({"network": "alexnet"}, {"network": [NETWORK]}),
    ({"network": "VGG16"}, {"network": [NETWORK]}),
    ({"network": None}, {"network": [NULL]}),
    ({"head": "none"}, {"head": ["Must be one of: auto, vgg, gap."]}),
    ({"balance": True}, {"balance": [TEXT]}),
    ({"optimizer": "adam"}, {"optimizer": ["Must be one of: sgd, adamw."]}),
    ({"monitor": "f1"}, {"monitor": ["Must be one of: val_loss, val_accuracy, val_f1."]}),
    ({"precision": "fp16"}, {"precision": ["Must be one of: auto, fp32, bf16."]}),
    # Whole numbers.
    ({"epochs": 0}, {"epochs": ["Must be greater than or equal to 1 and less than or equal to 1000."]}),
    ({"epochs": 2.0}, {"epochs": [WHOLE]}),
    ({"epochs": "2"}, {"epochs": [WHOLE]}),
    ({"epochs": True}, {"epochs": [WHOLE]}),
    ({"epochs": None}, {"epochs": [NULL]}),
    ({"classes": 1}, {"classes": ["Must be greater than or equal to 2 and less than or equal to 1000."]}),
    ({"devices": 0}, {"devices": ["Must be greater than or equal to 1 and less than or equal to 64."]}),
    ({"folds": 21}, {"folds": ["Must be greater than or equal to 0 and less than or equal to 20."]}),
    ({"seed": 2**31}, {"seed": ["Must be greater than or equal to 0 and less than or equal to 2147483647."]}),
    # Numbers, with bounds that are allowed themselves and bounds that are not.
    ({"dropout": 1}, {"dropout": [SHARE]}),
    ({"dropout": -0.1}, {"dropout": [SHARE]}),
    ({"learning_rate": 0}, {"learning_rate": [RATE]}),
    ({"learning_rate": 10.1}, {"learning_rate": [RATE]}),
    ({"learning_rate": "0.1"}, {"learning_rate": [NUMBER]}),
    ({"learning_rate": True}, {"learning_rate": [NUMBER]}),
    ({"gamma": 1.0}, {"gamma": ["Must be greater than 0 and less than 1."]}),
    ({"clip_norm": 0}, {"clip_norm": ["Must be greater than 0."]}),
    ({"fine_tune_learning_rate": 0}, {"fine_tune_learning_rate": [RATE]}),
    ({"test_size": 0.51}, {"test_size": ["Must be greater than or equal to 0.05 and less than or equal to 0.5."]}),
    ({"test_size": None}, {"test_size": [NULL]}),
    ({"window_width": 0.5}, {"window_width": ["Must be greater than or equal to 1 and less than or equal to 10000."]}),
    # True and false, also beside a word.
    ({"include_top": 1}, {"include_top": [FLAG]}),
    ({"horizontal_flip": "yes"}, {"horizontal_flip": [FLAG]}),
    ({"augmentation": "RandAugment"}, {"augmentation": ["Must be `randaugment`, true or false."]}),
    ({"augmentation": 1}, {"augmentation": ["Must be `randaugment`, true or false."]}),
    ({"standardize": "yes"}, {"standardize": ["Must be `auto`, true or false."]}),
    # The size of the input.
    ({"image_size": [16, 16, 3]}, {"image_size": [SIZE]}),
    ({"image_size": [224, 224, 4]}, {"image_size": [SIZE]}),
    ({"image_size": [224, 224]}, {"image_size": [SIZE]}),
    ({"image_size": []}, {"image_size": [SIZE]}),
    ({"image_size": "224"}, {"image_size": ["Not a valid list."]}),
    ({"image_size": [1025, 224.0, 1]}, {"image_size": {0: [SIDE], 1: [WHOLE], 2: [SIDE]}}),
    # What the network begins with.
    *(
        ({"weights": text}, {"weights": [WEIGHTS]})
        for text in ("imagenet21k", "imagenet\n", "version:0", "version:1 ", "file:", f"file:{'a' * 401}", "file:a\nb")
    ),
    ({"weights": 3}, {"weights": [TEXT]}),
    # Several at once, also beside what the parameters' model alone tells apart.
    ({"positive": -1, "test_size": None}, {"positive": [POSITIVE], "test_size": [NULL]}),
    # Names.
    ({"colour": "red"}, {"colour": [UNKNOWN]}),
    ({"held_out": 0.2}, {"held_out": ["It is called test_size now."]}),
    # Fields that are each right, but not together.
    ({"include_top": True, "weights": "none"}, {"include_top": [NO_TOP]}),
    ({"include_top": True, "head": "gap"}, {"include_top": [NO_HEAD]}),
    ({"include_top": True, "network": "resnet18", "weights": "version:3"}, {"include_top": [NO_TOP, NO_HEAD]}),
    ({"window_center": 40}, {"window_width": [WINDOW]}),
    ({"window_width": 400, "window_center": None}, {"window_center": [WINDOW]}),
    ({"fine_tune_blocks": 6}, {"fine_tune_blocks": ["vgg16 has 5 blocks."]}),
    ({"fine_tune_blocks": 10, "network": "efficientnet_b0"}, {"fine_tune_blocks": ["efficientnet_b0 has 9 blocks."]}),
    ({"folds": 1}, {"folds": ["Cross-validation needs 2 or more; 0 turns it off."]}),
    (
        {"test_size": 0.5, "validation_size": 0.3, "network": "inception_v3", "image_size": [64, 224, 3]},
        {
            "validation_size": ["With test_size it leaves less than 0.3 of the scans to learn from; make one smaller."],
            "image_size": ["inception_v3 needs at least 75 pixels a side."],
        },
    ),
    ({"network": "vit_b_16", "image_size": [256, 256, 3]}, {"image_size": ["vit_b_16 takes [224, 224, 3] only."]}),
    # Several at once; rules between fields are checked only when each field is right.
    ({"epochs": "2", "folds": 1, "colour": 1}, {"epochs": [WHOLE], "colour": [UNKNOWN]}),
]
REFUSED_BY_THE_API_ALONE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(
        ({"weights": f"file:{name}"}, {"weights": [WEIGHTS]})
        for name in ("../a.pth", "a/b.pth", "..", "a..b", ".hidden", "a\\b", "/etc/passwd", "a\0b", "a" * 256)
    ),
    ({"EPOCHS": 2}, {"EPOCHS": [UNKNOWN]}),
]


def complaints(params: dict[str, Any]) -> dict[str, Any]:
    """What the API says of these parameters."""
    found = TrainRequest().validate({**SOURCE, "params": params})
    return dict(found.get("params", {}))


def refused_by_the_worker(params: dict[str, Any]) -> str | None:
    """The field that the worker complains about."""
    try:
        parse_params(params)
    except BadParams as error:
        return str(error).partition(":")[0].partition(".")[0]
    return None


@pytest.mark.parametrize("params", ACCEPTED, ids=str)
def test_valid_parameters_are_accepted_here_and_by_the_worker(params: dict[str, Any]) -> None:
    assert (complaints(params), refused_by_the_worker(params)) == ({}, None)


@pytest.mark.parametrize(("params", "texts"), REFUSED, ids=str)
def test_each_refusal_has_its_text_and_the_worker_refuses_too(params: dict[str, Any], texts: dict[str, Any]) -> None:
    assert complaints(params) == texts
    assert refused_by_the_worker(params) in texts


@pytest.mark.parametrize(("params", "texts"), REFUSED_BY_THE_API_ALONE, ids=str)
def test_a_client_may_not_name_paths_or_write_capitals(params: dict[str, Any], texts: dict[str, Any]) -> None:
    assert complaints(params) == texts
    assert refused_by_the_worker(params) is None


def test_loading_keeps_what_was_given_and_adds_nothing() -> None:
    given = {"image_size": [64, 96, 3], "learning_rate": 1, "classes": None, "augmentation": False}
    loaded = TrainRequest().load({**SOURCE, "params": given})["params"]
    assert loaded == given
    assert isinstance(loaded["learning_rate"], float)


# --- any input ---

EDGES = sorted({edge + step for edge in (0, 1, 2, 10, 12, 20, 64, 100, 256, 1000, 1024, 2**31) for step in (-1, 0, 1)})
ANYTHING = (
    st.sampled_from([*EDGES, -2000, -2001, 5000, 5001, 10000, 10001, 1e-9, 0.05, 0.2, 0.5, 0.7])
    | st.sampled_from([*NETWORKS, "auto", "vgg", "gap", "none", "cosine", "val_f1", "best", "bf16", "", "true", "1"])
    | st.sampled_from(["file:a.pth", "file:", "version:1", "version:01", "version:", "imagenet", "imagenet "])
    | st.lists(st.sampled_from([3, 16, 31, 32, 75, 224, 1024, 1025, 3.0, "3", True]), max_size=4)
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
NAMES = st.sampled_from([*Params.model_fields, "held_out", "colour"])


@settings(max_examples=depth(40, 1000), deadline=None)
@given(st.dictionaries(NAMES, ANYTHING, max_size=2) | st.fixed_dictionaries({}, optional=RIGHT))
def test_the_api_and_the_worker_accept_the_same(params: dict[str, Any]) -> None:
    params = json.loads(json.dumps(params))
    here, there = set(complaints(params)), refused_by_the_worker(params)
    assert (there in here) if there else not here, (params, here, there)


def test_the_api_and_the_worker_agree_at_every_bound() -> None:
    bounds = 0
    for name, schema in Params.model_json_schema()["properties"].items():
        for one in (schema, *schema.get("anyOf", ())):
            for bound in (one[key] for key in one if "inimum" in key or "aximum" in key):
                bounds += 1
                for value in (bound, bound - 1, bound + 1, bound - 1e-6, bound + 1e-6):
                    assert bool(complaints({name: value})) == bool(refused_by_the_worker({name: value})), (name, value)
    assert bounds > 40


# --- a schema of any model ---


class Other(BaseModel):
    """Parameters of another pipeline."""

    model_config = ConfigDict(extra="forbid", strict=True)

    target: str = Field(pattern="^[a-z]+$", min_length=2, description="the column to predict")
    depth: Literal[2, 4] = 2
    columns: list[str] = Field(["age"], min_length=1)
    split: Annotated[list[float] | None, Field(max_length=2)] = None
    span: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=5)]] | None = None
    even: int = Field(2, multiple_of=2)
    missing: bool | Literal["drop", "mean"] = "mean"

    @field_validator("columns")
    @classmethod
    def _unique(cls, columns: list[str]) -> list[str]:
        if len(set(columns)) < len(columns):
            raise ValueError("twice the same")
        return columns


@pytest.mark.parametrize(
    ("params", "texts"),
    [
        ({}, {"target": ["Missing data for required field."]}),
        ({"target": "x"}, {"target": ["Shorter than minimum length 2."]}),
        ({"target": "ab", "depth": 3}, {"depth": ["Must be one of: 2, 4."]}),
        ({"target": "ab", "columns": ["a", 1]}, {"columns": {1: [TEXT]}}),
        ({"target": "ab", "columns": []}, {"columns": ["Shorter than minimum length 1."]}),
        ({"target": "ab", "split": [0.1, 0.2, 0.3]}, {"split": ["Longer than maximum length 2."]}),
        ({"target": "ab", "span": [1, 4]}, {"span": ["Must be [from 1, from 5]."]}),
        ({"target": "ab", "missing": 0}, {"missing": ["Must be `drop`, `mean`, true or false."]}),
        ({"target": "ab", "colour": 1}, {"colour": [UNKNOWN]}),
        # What only the model itself can say.
        ({"target": "AB"}, {"target": ["String should match pattern '^[a-z]+$'."]}),
        ({"target": "ab", "even": 3}, {"even": ["Input should be a multiple of 2."]}),
        ({"target": "ab", "columns": ["a", "a"]}, {"columns": ["Value error, twice the same."]}),
    ],
    ids=str,
)
def test_a_schema_of_another_model_refuses_what_the_model_refuses(params: dict[str, Any], texts: Any) -> None:
    assert schema_of(Other)().validate(params) == texts


def test_a_schema_of_another_model_accepts_what_the_model_accepts() -> None:
    given = {"target": "ab", "depth": 4, "columns": ["a", "b"], "split": [0.5], "span": None, "missing": "drop"}
    assert schema_of(Other)().load(given) == given


def test_a_schema_of_a_model_with_another_kind_of_field_names_the_field() -> None:
    for kind in (dict[str, float], int | str, int | Literal["auto"], tuple[int, str], Other):
        odd = create_model("Odd", epochs=(int, 1), shares=(kind, ...))
        with pytest.raises(TypeError, match="shares: there is no field for"):
            schema_of(odd)


# --- by REST ---

DESCRIBED: dict[str, dict[str, Any]] = {
    "head": {"type": "string", "enum": ["auto", "vgg", "gap"], "default": "auto"},
    "epochs": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 2},
    "classes": {"type": ["integer", "null"], "minimum": 2, "maximum": 1000, "default": None},
    "dropout": {"type": "number", "minimum": 0, "maximum": 1, "exclusiveMaximum": 1, "default": 0.5},
    "clip_norm": {"type": ["number", "null"], "minimum": 0, "exclusiveMinimum": 0, "default": None},
    "include_top": {"type": "boolean", "default": False},
    "augmentation": {"enum": ["randaugment", True, False], "default": True},
    "image_size": {
        "type": "array", "items": {"type": "integer", "minimum": 3, "maximum": 1024},
        "minItems": 3, "maxItems": 3, "default": [224, 224, 3],
    },
    "weights": {
        "type": "string", "default": "imagenet",
        "pattern": r"^(imagenet|none|version:[1-9][0-9]{0,8}|file:[^./\\][^/\\]{0,254})$",
    },
}  # fmt: skip


def refusal(client: FlaskClient, params: dict[str, Any]) -> dict[str, str]:
    """The one complaint about a training with these parameters."""
    problem = assert_problem(client.post("/jobs/train", json={**SOURCE, "params": params}), 422, "INVALID")
    (only,) = problem["errors"]
    assert only.pop("in") == "body"
    return dict(only)


def test_a_contradiction_is_422_that_points_at_the_field_and_says_what_to_do(client: FlaskClient) -> None:
    found = refusal(client, {"network": "vit_b_16", "image_size": [256, 256, 3]})
    assert found == {"pointer": "/params/image_size", "detail": "vit_b_16 takes [224, 224, 3] only."}
    assert refusal(client, {"window_center": 40})["pointer"] == "/params/window_width"


def test_the_old_name_of_a_parameter_leads_to_the_new_one(client: FlaskClient) -> None:
    found = refusal(client, {"held_out": 0.2})
    assert found["pointer"] == "/params/held_out"
    assert "test_size" in found["detail"]


def test_a_weights_file_is_named_without_a_path(client: FlaskClient) -> None:
    assert refusal(client, {"weights": "file:../a.pth"}) == {"pointer": "/params/weights", "detail": WEIGHTS}


def test_weights_that_no_live_worker_has_are_422_with_what_to_do(client: FlaskClient, sessions: Sessions) -> None:
    asked = {**SOURCE, "params": {"network": "resnet50"}}
    assert client.post("/jobs/train", json=asked).status_code == 202, "no worker lives that could say"
    with sessions.begin() as session:
        processes.register(session, processes.Heartbeat("train@one/1", processes.WORKER, ["train"]))
        processes.report_weights(session, "train@one/1", {"image": ["imagenet:vgg16"]})
    problem = assert_problem(client.post("/jobs/train", json=asked), 422, "WEIGHTS_MISSING")
    (found,) = problem["errors"]
    assert found["pointer"] == "/params/weights"
    for part in ("imagenet:resnet50", "can read: imagenet:vgg16", "renalq weights fetch resnet50"):
        assert part in problem["detail"]
    assert client.post("/jobs/train", json=SOURCE).status_code == 202


def test_openapi_describes_a_parameter_of_each_kind(client: FlaskClient) -> None:
    found = client.get("/openapi.json").get_json()["components"]["schemas"]["Params"]
    assert list(found["properties"]) == list(Params.model_fields)
    assert (found["type"], found.get("required")) == ("object", None)
    for name, expected in DESCRIBED.items():
        described = found["properties"][name]
        assert described.pop("description") == Params.model_fields[name].description
        assert described == expected, name


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
