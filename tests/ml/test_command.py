"""`python -m ml` for people."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ml.__main__ import main
from tests.ml.builders import encode, make_files, make_pixels, write_folder, write_zip


@pytest.mark.parametrize(("given", "kept"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_environment_says_otherwise(given, kept):
    """OpenMP reads its policy when torch is loaded, so it must be set before."""
    code = (
        "import os, sys\nfrom ml.__main__ import main\nassert 'torch' not in sys.modules\n"
        "main(['check', 'nowhere'])\nprint(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split()[-1] == kept


def test_check_shows_what_a_zip_holds(tmp_path, capsys):
    assert main(["check", str(write_zip(make_files(6), tmp_path / "data.zip"))]) == 0
    assert "Tumor" in capsys.readouterr().out


def test_check_names_what_is_wrong_with_a_folder(tmp_path, capsys):
    folder = write_folder({**make_files(6), "Normal/torn.png": b"x"}, tmp_path / "data")
    assert main(["check", str(folder)]) == 1
    assert "Normal/torn.png" in capsys.readouterr().out


def test_check_refuses_what_is_no_zip(tmp_path, capsys):
    (tmp_path / "data.zip").write_bytes(b"x")
    assert main(["check", str(tmp_path / "data.zip")]) == 1
    assert "zip" in capsys.readouterr().err


def test_predict_prints_a_line_for_each_scan(small_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # a long path to the scan would else break the sentence into two lines
    (tmp_path / "a.png").write_bytes(encode(make_pixels()))
    (tmp_path / "b.png").write_bytes(b"junk")
    assert main(["predict", str(small_run.model_path), str(tmp_path / "a.png"), str(tmp_path / "b.png")]) == 0
    shown = capsys.readouterr().out
    assert "Normal" in shown or "Tumor" in shown
    assert "not a readable" in shown


def test_predict_refuses_what_is_no_model(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    assert main(["predict", str(tmp_path / "model.safetensors"), "x.png"]) == 1
    assert "not a RenalQ model" in capsys.readouterr().err


def test_phantom_is_delegated(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["phantom", "--help"])
    assert ended.value.code == 0
    assert "--patients" in capsys.readouterr().out


# --- train -----------------------------------------------------------------------------------------------------------


def test_train_without_scans_says_what_to_give(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of this process
    assert main(["train", "--data", str(tmp_path / "none.zip"), "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().out
    assert "BAD_PARAMS --data: there is no file or folder" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_train_on_a_folder_needs_no_config_and_ends_with_what_to_do_next(tmp_path):
    scans = write_folder(make_files(12, ("Cyst", "Normal", "Tumor")), tmp_path / "scans")
    settings = ["network=resnet18", "weights=none", "EPOCHS=1", "image_size=[64, 64, 3]", "augmentation=false"]
    options = [option for setting in settings for option in ("--set", setting)]
    command = [sys.executable, "-m", "ml", "train", "--data", str(scans), "--out", "runs/first", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "runs/first/evaluation/report.html" in done.stdout
    assert done.stdout.splitlines()[-1].split()[1:] == [
        "python", "-m", "ml", "predict", "runs/first/training/model.safetensors", "SCAN…",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "scans"]
    assert not (tmp_path / "runs/first/data_ingestion/images").exists(), "a folder is read where it lies"
