"""What `python -m ml train` makes of its options: where, from what, and with which parameters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ml.command.options import config_of, params_of, training_help
from ml.runtime.config import PipelineConfig, load_config
from ml.runtime.errors import BadParams
from ml.spec.image import Params
from tests.ml.conftest import write_config

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "https://example.org/kidneys.zip"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """A folder without config.yaml and params.yaml."""
    monkeypatch.chdir(tmp_path)


# --- where -----------------------------------------------------------------------------------------------------------


def test_the_usual_places_are_those_of_the_config_in_the_repository():
    assert PipelineConfig.below(Path("artifacts")) == load_config(ROOT / "config" / "config.yaml")


def test_without_any_config_all_is_written_below_artifacts():
    assert config_of(None, None, None) == PipelineConfig.below(Path("artifacts"))


def test_the_usual_config_is_read_where_it_is(tmp_path):
    write_config(tmp_path / "config")
    assert config_of(None, None, None).artifacts_root == tmp_path / "config"


def test_out_takes_the_place_of_all_folders_but_not_of_the_scans(tmp_path):
    (tmp_path / "mine.zip").touch()
    config = config_of(write_config(tmp_path, tmp_path / "mine.zip"), None, Path("runs/first"))
    assert config == PipelineConfig.below(Path("runs/first")).reading(str(tmp_path / "mine.zip"))
    config = config_of(write_config(tmp_path, source_url=ADDRESS), None, Path("runs/first"))
    assert config == PipelineConfig.below(Path("runs/first")).reading(ADDRESS)


def test_data_takes_the_place_of_the_configs_scans_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    file = write_config(tmp_path, source_url=ADDRESS)
    config, before = config_of(file, "mine", None), load_config(file)
    assert config.data_ingestion.scans_dir == Path("mine")
    assert config.data_ingestion.source_url is None
    assert (config.training, config.data_ingestion.root_dir) == (before.training, before.data_ingestion.root_dir)


def test_scans_of_one_address_are_not_taken_for_those_of_another():
    one, other = (config_of(None, f"{ADDRESS}?v={number}", None).data_ingestion for number in (1, 2))
    assert one.source_url != other.source_url
    assert one.local_data_file != other.local_data_file
    assert one.local_data_file.parent == one.root_dir


def test_what_is_not_there_is_named():
    with pytest.raises(BadParams, match=r"--data: there is no file or folder nowhere\.zip\. Name a zip, a folder"):
        config_of(None, "nowhere.zip", None)
    with pytest.raises(BadParams, match=r"--config: there is no file mine\.yaml"):
        config_of(Path("mine.yaml"), None, None)
    with pytest.raises(BadParams, match=r"--params: there is no file mine\.yaml"):
        params_of(Path("mine.yaml"))


# --- parameters ------------------------------------------------------------------------------------------------------


def test_without_a_file_the_defaults_apply():
    assert params_of(None) == Params()


def test_settings_come_before_the_usual_file(tmp_path):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"EPOCHS": 7, "SEED": 3}))
    assert params_of(None, ["epochs=9"]) == Params(epochs=9, seed=3)


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [
        ("EPOCHS=9", "epochs", 9),
        ("Epochs = 9", "epochs", 9),
        ("learning_rate=1e-3", "learning_rate", 0.001),
        ("image_size=[64, 96, 3]", "image_size", (64, 96, 3)),
        ("weights=file:a=b.pth", "weights", "file:a=b.pth"),
        ("weights=none", "weights", "none"),
        ("augmentation=false", "augmentation", False),
        ("augmentation=randaugment", "augmentation", "randaugment"),
        ("clip_norm=null", "clip_norm", None),
    ],
)
def test_a_setting_is_a_name_in_either_case_and_a_value_in_yaml(setting, name, value):
    assert getattr(params_of(None, [setting]), name) == value


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("epoch=3", "--set epoch=3: there is no parameter epoch; do you mean epochs"),
        ("colour=3", "there is no parameter colour; python -m ml train --help lists all"),
        ("epochs", "--set epochs: a name and a value are expected, such as --set epochs=5"),
        ("image_size=[64", "--set image_size=.* cannot be read as YAML"),
        ("epochs=0", "^epochs: Input should be greater"),
        ("epochs=", "^epochs: "),
    ],
)
def test_a_wrong_setting_is_named_with_a_remedy(setting, complaint):
    with pytest.raises(BadParams, match=complaint):
        params_of(None, [setting])


# --- help ------------------------------------------------------------------------------------------------------------


def test_the_help_lists_every_parameter_with_its_default_and_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    lines = training_help().splitlines()
    rows = {line.split()[0]: line for line in lines[lines.index("") + 1 :] if line.startswith("  ")}
    assert set(rows) == set(Params.model_fields)
    assert all(str(field.description) in rows[name] for name, field in Params.model_fields.items())
    assert "[224, 224, 3]" in rows["image_size"]
    assert "null" in rows["clip_norm"]
    assert "{vgg16, resnet18," in rows["network"]
    assert "{true, false, randaugment}" in rows["augmentation"]
    assert "{" not in rows["horizontal_flip"]


def test_the_help_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = training_help()
    assert max(map(len, text[text.index("parameters") :].splitlines())) <= 100


def test_the_help_does_not_wait_for_torch():
    program = (
        "import sys; from ml.__main__ import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("False False\n"), done.stderr
