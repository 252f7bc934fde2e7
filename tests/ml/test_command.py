"""`python -m ml` for people."""

from __future__ import annotations

import pytest

from ml.__main__ import main
from tests.ml.builders import encode, make_files, make_pixels, write_folder, write_zip


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
