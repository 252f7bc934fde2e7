"""A locked test set: a second dataset tests, and decides nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ml.image.dataset.grouping import group_scans
from ml.image.dataset.lineage import leaks
from ml.image.dataset.scans import DatasetReport
from ml.image.dataset.splits import LOCKED, split_locked
from ml.image.stages import champion, runner
from ml.image.stages.run import Run, RunEnvironment
from ml.runtime.config import load_config, parse_params
from ml.runtime.errors import BadDataset, BadParams
from ml.runtime.events import Evaluated, Event
from tests.ml.builders import make_files, write_zip
from tests.ml.conftest import SIDE, SMALL, SmallRun, write_config
from tests.ml.test_splits import make_report

PARAMS = {**SMALL, "network": "resnet18", "head": "gap", "augmentation": False, "epochs": 1}


def locked(report: DatasetReport, *numbers: int) -> DatasetReport:
    """The report with these scans in the locked test set."""
    scans = [replace(scan, side=LOCKED) if at in numbers else scan for at, scan in enumerate(report.scans)]
    return replace(report, scans=tuple(scans))


def test_locked_scans_test_and_who_belongs_to_them_is_on_no_side() -> None:
    report = make_report(12)
    groups = group_scans(report.scans)
    firsts = [int(np.flatnonzero(groups == group)[0]) for group in (groups[0], groups[-1])]
    split = split_locked(locked(report, *firsts), 0, 0.2)
    assert split.test.tolist() == sorted(firsts)
    used = {*split.train.tolist(), *split.validation.tolist()}
    assert used == {at for at, group in enumerate(groups) if group not in groups[firsts]}
    assert not leaks(report, split).any


def test_the_seed_changes_the_validation_scans_and_never_the_test() -> None:
    report = locked(make_report(12), 0, 1, 59, 58)
    one, other = (split_locked(report, seed, 0.2) for seed in (0, 1))
    assert one.test.tolist() == other.test.tolist()
    assert one.validation.tolist() != other.validation.tolist()


def test_a_class_of_which_nothing_is_left_to_learn_is_refused() -> None:
    report = make_report(4)
    with pytest.raises(BadDataset, match="locked test set"):
        split_locked(locked(report, *np.flatnonzero(report.labels == 1)), 0)


def other_files() -> dict[str, bytes]:
    """Twelve scans of each class that the small run has not."""
    made = make_files(32, side=SIDE)
    return {name: content for name, content in made.items() if int(name[-7:-4]) >= 20}


def run_beside(folder: Path, archive: Path, test: Path, environment: RunEnvironment, **params: object) -> Evaluated:
    events: list[Event] = []
    config = load_config(write_config(folder, archive))
    runner.run_all(config, parse_params({**PARAMS, **params}), events.append, replace(environment, locked_test=test))
    return next(event for event in events if isinstance(event, Evaluated))


def test_a_training_is_tested_on_the_other_zip_alone(small_run: SmallRun, tmp_path: Path) -> None:
    test = write_zip(other_files(), tmp_path / "test.zip")
    found = run_beside(tmp_path, small_run.archive, test, small_run.environment)
    assert found.metrics["held_out"] == 24
    learnt = found.metrics["counts"]["train"] + found.metrics["counts"]["validation"]
    assert 36 <= learnt <= 40, "but for a few that look almost like a test scan"
    assert set(found.metrics["leaks"].values()) == {0}
    again = run_beside(tmp_path / "again", small_run.archive, test, small_run.environment, seed=3)
    assert again.metrics["test_digest"] == found.metrics["test_digest"], "whatever the seed"
    # The cache's own pixels are as they were.
    events: list[Event] = []
    runner.run_all(load_config(write_config(tmp_path / "plain", small_run.archive)), parse_params(PARAMS),
                   events.append, small_run.environment)  # fmt: skip
    run = Run(load_config(tmp_path / "plain" / "config.yaml"), parse_params(PARAMS), events.append)
    assert len(run.pixels) == len(run.report.scans) == 40
    # A champion with another transform decodes the scans of both anew.
    run = Run(load_config(tmp_path / "config.yaml"), parse_params(PARAMS), events.append)
    decoded = list(champion._decoded(run, replace(run.transform, height=32, width=32), run.split.test))
    assert len(decoded) == 24
    assert decoded[0].shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("files", "params", "words"),
    [
        ({}, {"folds": 2}, "test_dataset_id: leave out folds"),
        ({"Cyst": 6, "Normal": 6}, {}, "its classes are Cyst, Normal, not Normal, Tumor"),
    ],
)
def test_what_does_not_go_together_is_refused(
    small_run: SmallRun, tmp_path: Path, files: dict[str, int], params: dict[str, int], words: str
) -> None:
    made = other_files()
    if files:
        made = {name.replace("Tumor/", "Cyst/"): content for name, content in made.items()}
    test = write_zip(made, tmp_path / "test.zip")
    with pytest.raises((BadDataset, BadParams), match=words):
        run_beside(tmp_path, small_run.archive, test, small_run.environment, **params)
