"""dvc.yaml against the code: a stage that leaves out what it depends on would be skipped when that has changed."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from ml.runtime.config import load_config
from ml.spec.image import Params
from ml.spec.image_pipeline import STAGES
from tests.ml.builders import make_files, make_params, write_zip
from tests.ml.conftest import SIDE

ROOT = Path(__file__).resolve().parents[2]
STAGES_OF_DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
NO_OUTCOME = {"errors", "events", "cache"}
"""They say what went wrong, tell how far it is, and keep what was computed: none of it changes what a stage writes."""
MODULES = dict(zip(STAGES, ("ingestion", "preparation", "fitting", "evaluation"), strict=True))


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / "ml" / f"{module}.py").read_text())


def imported(module: str) -> dict[str, str]:
    """Name in this module → the module of ml that it is or comes from."""
    found = {}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and node.module == "ml":
            found |= {one.asname or one.name: one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ml."):
            found |= {one.asname or one.name: str(node.module)[3:] for one in node.names}
    return found


def handed_on(attribute: str) -> set[str]:
    """The modules that stand behind an attribute of `ml.image.stages.run.Run`, by the statement of the class that
    defines it."""
    names = imported("run")
    body = next(node for node in tree_of("run").body if isinstance(node, ast.ClassDef) and node.name == "Run").body
    for node in body:
        defined = node.target.id if isinstance(node, ast.AnnAssign) else getattr(node, "name", "")
        if defined == attribute:
            return {names[one.id] for one in ast.walk(node) if isinstance(one, ast.Name) and one.id in names}
    return set()


def modules_behind(stage: str) -> set[str]:
    """All that a stage imports, directly or through others; of what ml.image.stages.run imports, what the stage asks
    a Run for."""
    found: set[str] = set()
    waiting = {MODULES[stage]}
    while waiting:
        module = waiting.pop()
        found.add(module)
        more = set() if module == "run" else set(imported(module).values())
        if module != "run":
            asked = set(re.findall(r"\bstate\.(\w+)", (ROOT / "ml" / f"{module}.py").read_text()))
            more |= {behind for attribute in asked for behind in handed_on(attribute)}
        waiting |= more - found - NO_OUTCOME
    return found


def test_the_stages_are_the_pipelines():
    assert tuple(STAGES_OF_DVC) == STAGES
    assert [stage["cmd"] for stage in STAGES_OF_DVC.values()] == [f"python -m ml {name}" for name in STAGES]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_every_module_behind_it_and_on_no_other(stage):
    listed = {path for path in STAGES_OF_DVC[stage]["deps"] if path.startswith("ml/") and path.endswith(".py")}
    assert listed == {f"ml/{module}.py" for module in modules_behind(stage)}


def test_every_dependency_is_in_the_repository_or_written_by_a_stage_before():
    written = {str(load_config(ROOT / "config" / "config.yaml").data_ingestion.local_data_file)}
    for stage in STAGES_OF_DVC.values():
        for path in stage["deps"]:
            assert path in written or (not path.startswith("artifacts/") and (ROOT / path).exists()), path
        written |= set(stage["outs"])


def test_every_parameter_is_one_of_some_stage():
    told = [name for stage in STAGES_OF_DVC.values() for name in stage["params"]]
    assert {name.lower() for name in told} == set(Params.model_fields)


def test_the_page_of_the_report_and_the_config_are_dependencies_too():
    assert "ml/templates" in STAGES_OF_DVC["evaluation"]["deps"]
    assert all("config/config.yaml" in stage["deps"] for stage in STAGES_OF_DVC.values())


# --- dvc itself ------------------------------------------------------------------------------------------------------


def dvc(folder: Path, *arguments: str) -> str:
    """Its stdout; it finds our `python` first, and tells nobody of its use."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "dvc", *arguments]
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stages_to_run(folder: Path, **changed: object) -> set[str]:
    """The stages that something has changed for, other parameters among it."""
    path = folder / "params.yaml"
    before = path.read_text()
    path.write_text(yaml.safe_dump(yaml.safe_load(before) | changed))
    found = json.loads(dvc(folder, "status", "--json"))
    path.write_text(before)
    return set(found)


@pytest.mark.slow
def test_dvc_runs_all_stages_and_then_only_what_has_changed(tmp_path):
    for name in ("ml", "config"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    params = make_params(network="resnet18", image_size=[SIDE, SIDE, 3], epochs=1).model_dump(mode="json")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({name.upper(): value for name, value in params.items()}))
    (tmp_path / "artifacts" / "data_ingestion").mkdir(parents=True)
    write_zip(make_files(12, side=SIDE), tmp_path / "artifacts" / "data_ingestion" / "data.zip")
    dvc(tmp_path, "init", "--no-scm")
    dvc(tmp_path, "repro")
    assert json.loads((tmp_path / "artifacts/evaluation/scores.json").read_text())["held_out"] == 4
    assert stages_to_run(tmp_path) == set()
    assert stages_to_run(tmp_path, EPOCHS=9) == {"training"}, "and evaluation after it, which depends on its output"
    assert stages_to_run(tmp_path, FOLDS=2) == {"evaluation"}
