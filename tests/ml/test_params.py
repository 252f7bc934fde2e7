"""Parameters and configuration: what is accepted, and errors that name the field."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ml.runtime.config import load_config, load_params, parse_params
from ml.runtime.errors import BadParams
from ml.spec import describe, image_compat
from ml.spec.image import Params

ROOT = Path(__file__).resolve().parents[2]
ITS_DEPENDENCIES = {"annotated_types", "typing_extensions", "typing_inspection"}
"""Of pydantic."""


def test_the_defaults_are_those_of_the_original_pipeline():
    params = Params()
    assert params.image_size == (224, 224, 3)
    assert (params.batch_size, params.epochs, params.learning_rate, params.momentum) == (32, 2, 0.001, 0.9)
    assert (params.augmentation, params.include_top, params.weights) == (True, False, "imagenet")


def test_params_yaml_says_the_defaults():
    assert load_params(ROOT / "params.yaml") == Params()


def test_params_yaml_names_every_field():
    assert {key.lower() for key in yaml.safe_load((ROOT / "params.yaml").read_text())} == set(Params.model_fields)


def test_keys_in_either_case_are_the_same():
    assert parse_params({"EPOCHS": 7}) == parse_params({"epochs": 7})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"epoch": 3}, "epoch"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": "3"}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"image_size": [224, 224]}, "image_size"),
        ({"image_size": [224, 224, 1]}, "image_size"),
        ({"image_size": [16, 224, 3]}, "image_size"),
        ({"classes": 1}, "classes"),
        ({"augmentation": "yes"}, "augmentation"),
        ({"weights": "http://somewhere"}, "weights"),
        ({"held_out": 0.2}, "held_out"),
        ({"network": "alexnet"}, "network"),
        ({"head": "none"}, "head"),
        ({"network": "inception_v3", "image_size": [64, 224, 3]}, "image_size: inception_v3 needs at least 75"),
        ({"network": "vit_b_16", "image_size": [256, 256, 3]}, r"image_size: vit_b_16 takes \[224, 224, 3\] only"),
        ({"weights": "file:"}, "weights"),
        ({"weights": "version:0"}, "weights"),
        ({"network": "resnet18", "include_top": True}, "include_top"),
        ({"head": "gap", "include_top": True}, "include_top"),
        ({"window_center": 40.0}, "window_width"),
        ({"window_width": 400.0}, "window_center"),
        ({"window_center": 40.0, "window_width": 0.0}, "window_width"),
        ({"folds": 1}, "folds"),
        ({"folds": 21}, "folds"),
        ({"split": "random"}, "split"),
        ({"test_size": 0.5, "validation_size": 0.4}, "validation_size"),
        ({"test_size": 0.0}, "test_size"),
        ({"balance": "both"}, "balance"),
        ({"augmentation": "autoaugment"}, "augmentation"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"dropout": 1.0}, "dropout"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"schedule": "linear"}, "schedule"),
        ({"gamma": 1.0}, "gamma"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"fine_tune_blocks": 0}, "fine_tune_blocks"),
        ({"fine_tune_epochs": -1}, "fine_tune_epochs"),
        ({"monitor": "loss"}, "monitor"),
        ({"keep": "first"}, "keep"),
        ({"patience": -1}, "patience"),
        ({"precision": "fp16"}, "precision"),
        ({"devices": 0}, "devices"),
        ({"accumulate": 0}, "accumulate"),
        ({"standardize": "maybe"}, "standardize"),
        ({"include_top": True, "weights": "none"}, "include_top"),
    ],
)
def test_a_wrong_field_is_named(fields, name):
    with pytest.raises(BadParams, match=f"^{name}"):
        parse_params(fields)


def test_a_contradiction_is_written_behind_its_field_in_lower_case():
    with pytest.raises(BadParams) as refused:
        parse_params({"window_center": 40.0})
    assert str(refused.value) == "window_width: a CT window has a centre and a width; give both or neither."


def test_the_command_line_takes_a_path_of_weights():
    assert parse_params({"weights": "file:../runs/first/model.safetensors"}).weights.startswith("file:..")


@pytest.mark.parametrize(
    ("weights", "standardize", "expected"),
    [("none", "auto", True), ("imagenet", "auto", None), ("imagenet", True, True), ("none", False, False)],
)
def test_auto_standardizes_untrained_features_and_leaves_others_to_their_scale(weights, standardize, expected):
    assert parse_params({"weights": weights, "standardize": standardize}).standardizes is expected


@pytest.mark.parametrize(
    ("network", "head", "expected"),
    [("vgg16", "auto", "vgg"), ("vgg16", "gap", "gap"), ("resnet18", "auto", "gap"), ("vit_b_16", "vgg", "vgg")],
)
def test_auto_means_each_networks_own_head(network, head, expected):
    assert parse_params({"network": network, "head": head}).head_kind == expected


def test_the_rate_of_tuning_is_a_tenth_unless_it_is_given():
    assert parse_params({"learning_rate": 0.02}).tuning_rate == pytest.approx(0.002)
    assert parse_params({"fine_tune_learning_rate": 0.5}).tuning_rate == 0.5
    assert parse_params({"epochs": 3, "fine_tune_epochs": 4}).total_epochs == 7


def test_a_window_has_a_centre_and_a_width():
    assert parse_params({"window_center": 40.0, "window_width": 400.0}).window == (40.0, 400.0)
    assert parse_params({}).window is None


def test_the_config_in_the_repository_is_whole():
    config = load_config(ROOT / "config" / "config.yaml")
    assert config.training.trained_model_path == Path("artifacts/training/model.safetensors")


def test_a_wrong_field_of_the_config_is_named(tmp_path):
    content = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    del content["training"]["trained_model_path"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(BadParams, match=r"training\.trained_model_path"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("content", ["", "- 1", "{", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    (tmp_path / "params.yaml").write_text(content)
    with pytest.raises(BadParams, match=r"params\.yaml"):
        load_params(tmp_path / "params.yaml")


def test_a_rate_may_be_written_as_1e_3(tmp_path):
    (tmp_path / "params.yaml").write_text("LEARNING_RATE: 1e-3\nMOMENTUM: 5e-1\n")
    assert load_params(tmp_path / "params.yaml") == Params(learning_rate=0.001, momentum=0.5)


# --- the declaration ---


def test_the_declarations_import_pydantic_alone():
    """All but ml.spec.headers.image: it needs Pillow, and is loaded with the first picture that comes in."""
    files = [file for file in (ROOT / "ml" / "spec").rglob("*.py") if file.name != "__init__.py"]
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    modules.remove("ml.spec.headers.image")
    program = (
        f"import sys; before = set(sys.modules); import {', '.join(modules)}\n"
        "print(*set(sys.modules) - before - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    loaded = done.stdout.split()
    assert "ml.spec.image" in loaded, done.stderr
    assert {name for name in loaded if name.startswith("ml.")} <= {"ml.spec", "ml.spec.headers", *modules}
    top = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert {name for name in top if not name.startswith("_")} <= {"ml", "pydantic", "pydantic_core", *ITS_DEPENDENCIES}


def test_the_guide_has_the_table_of_all_parameters():
    guide = (ROOT / "docs" / "api.md").read_text()
    assert describe.table(Params) + "\n\n" in guide, "update it: python -m ml.spec.describe docs/api.md"
    assert describe.with_table(guide, Params) == guide


@pytest.mark.parametrize(
    ("name", "default", "range_", "description"),
    [
        ("network", '"vgg16"', "`vgg16`, `resnet18`, `resnet50`, `inception_v3`, `efficientnet_b0`, `vit_b_16`", None),
        ("weights", '"imagenet"', "`imagenet`, `none`, `file:NAME`, `version:N`", None),
        ("image_size", "[224, 224, 3]", "[32–1024, 32–1024, 3]", None),
        ("augmentation", "true", "`true`, `false`, `randaugment`", None),
        ("classes", "null", "2–1000", "if given, the dataset must have this many class folders"),
        ("learning_rate", "0.001", "above 0, up to 10", "of the optimizer, before the schedule"),
        ("momentum", "0.9", "from 0, below 1", "of SGD"),
    ],
)
def test_a_row_says_default_range_and_use(name, default, range_, description):
    row = next(row for row in describe.rows(Params) if row.name == name)
    assert (row.default, row.range) == (default, range_)
    assert row.description == (description or Params.model_fields[name].description)


# --- rows of earlier versions ---


def test_an_earlier_name_is_read_under_the_present_one():
    assert image_compat.current({"held_out": 0.3, "epochs": 2}) == {"test_size": 0.3, "epochs": 2}


@pytest.mark.parametrize(
    ("params", "network", "head"),
    [
        ({}, "vgg16", "vgg"),
        ({"network": "resnet18"}, "resnet18", "gap"),
        ({"head": "gap"}, "vgg16", "gap"),
        ({"network": "resnet18", "head": "auto"}, "resnet18", "gap"),
    ],
)
def test_network_and_head_have_the_values_of_their_day(params, network, head):
    assert (image_compat.network(params), image_compat.head(params)) == (network, head)


def test_a_transform_leaves_open_what_a_row_does_not_say():
    assert image_compat.transform({}) == {"height": None, "width": None, "window": None, "spacing_mm": None}
    params = {"image_size": [64, 96, 3], "window_center": 40, "window_width": 400, "spacing_mm": 1.5}
    assert image_compat.transform(params) == {"height": 64, "width": 96, "window": [40, 400], "spacing_mm": 1.5}


@pytest.mark.parametrize(
    ("weights", "version", "file"),
    [
        ("version:12", 12, None),
        ("version:0", None, None),
        ("file:a b.pth", None, "a b.pth"),
        ("file:", None, None),
        ("imagenet", None, None),
    ],
)
def test_weights_name_a_version_or_a_file(weights, version, file):
    params = {"weights": weights}
    assert (image_compat.base_version(params), image_compat.base_file(params)) == (version, file)
