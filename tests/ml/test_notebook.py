"""docs/pipeline.ipynb: a valid notebook that runs from top to bottom."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.depth import depth

SMALLER = depth({"patients=40": "patients=20", '"augmentation": False}': '"augmentation": False, "head": "gap"}'}, {})
"""What `make test` does with less: VGG16's own head is nine tenths of its file."""
NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "pipeline.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_it_is_of_format_4_5_and_keeps_no_outputs(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code_of(notebook))


@pytest.mark.slow
@pytest.mark.scaled
def test_its_cells_run_in_order_and_end_with_predictions(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in code_of(notebook):
        source = "".join(cell["source"])
        for written, smaller in SMALLER.items():
            source = source.replace(written, smaller)
        exec(compile(source, cell["id"], "exec"), names)  # noqa: S102 - the purpose of the test
    assert names["params"].head == depth("gap", "auto")
    assert "epoch 5/5" in capsys.readouterr().out
    assert [one.error_code for one in names["predictions"]] == [None] * 6
    assert names["folder"].is_relative_to(tmp_path)


def code_of(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
