"""dvc.yaml against the code: dvc would skip a stage if code changed that is missing from its dependencies."""

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
DVC_STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
RUN = "ml/image/stages/run.py"
FILES = dict(zip(STAGES, ("ingestion", "base_model", "training", "evaluation"), strict=True))


@cache
def imports_of(file: str) -> dict[str, str]:
    """Name in this file → the file in ml/ that it is or comes from."""
    found = {}
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ml."):
            folder = str(node.module).replace(".", "/")
            for name in node.names:
                files = (f"{folder}/{name.name}.py", f"{folder}.py", f"{folder}/__init__.py")
                found[name.asname or name.name] = next(file for file in files if (ROOT / file).exists())
    return found


def behind_run(attribute: str) -> set[str]:
    """The files that an attribute of `ml.image.stages.run.Run` uses, by the statement that defines it."""
    imports, tree = imports_of(RUN), ast.parse((ROOT / RUN).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Run").body
    for node in body:
        defined = node.target.id if isinstance(node, ast.AnnAssign) else getattr(node, "name", "")
        if defined == attribute:
            return {imports[one.id] for one in ast.walk(node) if isinstance(one, ast.Name) and one.id in imports}
    return set()


def files_behind(stage: str) -> set[str]:
    """All files that a stage imports, directly or indirectly; of a Run, only what the stage uses of it."""
    found: set[str] = set()
    waiting = {f"ml/image/stages/{FILES[stage]}.py"}
    while waiting:
        file = waiting.pop()
        found.add(file)
        if file == RUN:
            continue
        used = set(re.findall(r"\brun\.(\w+)", (ROOT / file).read_text()))
        waiting |= {*imports_of(file).values(), *(one for name in used for one in behind_run(name))} - found
    return found


def room_of(file: str) -> str:
    """The folder of a file; stages are files of their own."""
    return file if file.startswith("ml/image/stages/") else str(Path(file).parent)


def test_the_stages_are_the_pipelines():
    assert tuple(DVC_STAGES) == STAGES
    assert [stage["cmd"] for stage in DVC_STAGES.values()] == [f"python -m ml {name}" for name in STAGES]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_rooms_that_it_imports_from(stage):
    listed = {path for path in DVC_STAGES[stage]["deps"] if path.startswith("ml/")}
    assert listed == {room_of(file) for file in files_behind(stage)}


def test_every_dependency_is_in_the_repository_or_written_by_a_stage_before():
    written = {str(load_config(ROOT / "config" / "config.yaml").data_ingestion.local_data_file)}
    for stage in DVC_STAGES.values():
        for path in stage["deps"]:
            assert path in written or (not path.startswith("artifacts/") and (ROOT / path).exists()), path
        written |= set(stage["outs"])


def test_every_parameter_is_one_of_some_stage():
    named = [name for stage in DVC_STAGES.values() for name in stage["params"]]
    assert {name.lower() for name in named} == set(Params.model_fields)


def test_the_config_is_a_dependency_of_every_stage():
    assert all("config/config.yaml" in stage["deps"] for stage in DVC_STAGES.values())


# --- dvc itself ------------------------------------------------------------------------------------------------------


def dvc(folder: Path, *arguments: str) -> str:
    """The output of a dvc command, which finds this `python` first, and sends no analytics."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "dvc", *arguments]
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stages_to_run(folder: Path, **changed: object) -> set[str]:
    """The stages with changed dependencies, if parameters change as well."""
    path = folder / "params.yaml"
    before = path.read_text()
    path.write_text(yaml.safe_dump(yaml.safe_load(before) | changed))
    found = json.loads(dvc(folder, "status", "--json"))
    path.write_text(before)
    return set(found)


@pytest.mark.full
def test_dvc_runs_all_stages_and_then_only_what_has_changed(tmp_path):
    for name in ("ml", "config"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, tmp_path)
    params = make_params(network="resnet18", image_size=[SIDE, SIDE, 3], epochs=1).model_dump(mode="json")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({name.upper(): value for name, value in params.items()}))
    (tmp_path / "artifacts" / "data_ingestion").mkdir(parents=True)
    write_zip(make_files(12, side=SIDE), tmp_path / "artifacts" / "data_ingestion" / "data.zip")
    dvc(tmp_path, "init", "--no-scm")
    dvc(tmp_path, "repro")
    assert json.loads((tmp_path / "artifacts/evaluation/scores.json").read_text())["held_out"] == 4
    assert stages_to_run(tmp_path) == set()
    assert stages_to_run(tmp_path, EPOCHS=9) == {"training"}, "and evaluation after it, which depends on its output"
    assert stages_to_run(tmp_path, FOLDS=2) == {"training"}, "which tests them too"
