"""What a worker says of the weights that it can read."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from worker.execution import weights


def _fails(folder: Path) -> list[str]:
    raise PermissionError(folder)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda folder: ["imagenet:vgg16"], {"one": ["imagenet:vgg16"]}),
        (lambda folder: [], {"one": []}),
        (lambda folder: None, {}),
        (_fails, {}),
    ],
    ids=["some", "none", "it does not say", "it fails"],
)
def test_each_pipeline_says_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: object, said: dict[str, list[str]]
) -> None:
    monkeypatch.setattr(weights, "installed", lambda: {"one": None})
    monkeypatch.setattr(weights, "pipeline_of", lambda name: SimpleNamespace(readable_weights=answer))
    assert weights.readable(tmp_path) == said
