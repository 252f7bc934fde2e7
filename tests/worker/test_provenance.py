"""Where a network comes from."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from worker.tracking.provenance import environment, model_file_metadata


def test_a_model_file_tells_its_device_and_the_weights_that_it_began_with(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    said = {"engine": "torch-cpu", "device": "CPU", "weights": {"source": "imagenet", "sha256": "e" * 64}}
    save_file({"w": np.zeros(2, np.float32)}, path, {"renalq": json.dumps(said)})
    assert model_file_metadata(path) == {"engine": "torch-cpu", "device": "CPU", "base_weights_sha256": "e" * 64}


def test_a_file_that_says_nothing_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(2, np.float32)}, path)
    assert model_file_metadata(path) == {}
    save_file(
        {"w": np.zeros(2, np.float32)}, path, {"renalq": json.dumps({"weights": {"source": "none", "sha256": None}})}
    )
    assert model_file_metadata(path) == {}
    path.write_bytes(b"no safetensors")
    assert model_file_metadata(path) == {}
    assert model_file_metadata(tmp_path / "nothing") == {}


def test_the_environment_names_the_packages_that_decide_a_networks_numbers() -> None:
    found = environment()
    assert {"python", "torch", "torchvision", "numpy", "scikit-learn", "mlflow"} <= set(found)
    assert found["numpy"] == np.__version__
