"""What a pipeline declares, and that the queue, the API and the workers know pictures by that alone."""

import ast
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from ml.pipelines import TrainingJob, pipeline_of
from ml.spec.pipeline import Bound, Card, Gate, Inputs, Media, PipelineSpec, RefusedInput, Stage
from ml.spec.registry import UnknownPipeline, installed, spec_of

ROOT = Path(__file__).resolve().parents[2]
IMAGES = re.compile(r"vgg|dicom|jpe?g|tiff|webp|\bbmp\b|hounsfield|grad.?cam|pixel|torchvision", re.IGNORECASE)
ALLOWED = {
    "api/resources/legacy.py": "three older documents, whose clients know pictures only",
    "jobs/settings.py": "settings keep their names and what they say: RENALQ_MAX_PIXELS, the folder of weights",
    "jobs/policy_settings.py": "the same: RENALQ_PATIENT_IDS",
}
"""Files that may name them, and why."""


class Nothing(BaseModel):
    """No parameters."""


def make_spec(**changes: object) -> PipelineSpec:
    """A spec with two stages."""
    fields = {
        **{"name": "toy", "title": "A toy", "runtime": "nowhere:Toy", "params": Nothing, "card": Card(title="Toy")},
        **{"stages": (Stage(name="one", weight=0.25), Stage(name="two", weight=0.75))},
        **{"gate": Gate(leads=Bound(figure="accuracy", title="Accuracy", least=0.5))},
    }
    return PipelineSpec(**{**fields, **changes})  # type: ignore[arg-type]


def test_progress_runs_through_the_stages_and_leaves_one_to_the_jobs_end() -> None:
    spec = make_spec()
    fractions = [("one", 0.0), ("one", 1.0), ("two", 0.5), ("two", 1.0)]
    assert [spec.progress(*each) for each in fractions] == [0.0, 0.25, 0.625, 0.999]
    with pytest.raises(ValueError, match="no stage three"):
        spec.progress("three", 0.0)


def test_an_unknown_pipeline_names_those_that_are_installed() -> None:
    assert spec_of("image") is installed()["image"]
    with pytest.raises(UnknownPipeline, match="no pipeline sound: installed are image"):
        spec_of("sound")


@pytest.mark.parametrize("name", ["", "Image", "9", "a-b", "a" * 41])
def test_a_pipelines_name_is_a_plain_word(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        make_spec(name=name)


def test_any_bytes_are_taken_without_an_inspection_and_the_stream_is_rewound() -> None:
    stream = io.BytesIO(b"text")
    stream.read()
    assert Inputs(media_types=("text/plain",)).look(stream, 100) == Media("text/plain")
    assert stream.tell() == 0


def test_a_refused_stream_is_rewound_too() -> None:
    stream = io.BytesIO(b"no picture")
    with pytest.raises(RefusedInput):
        spec_of("image").inputs.look(stream, 100)
    assert stream.tell() == 0


def test_a_training_job_is_the_same_after_its_file(tmp_path: Path) -> None:
    job = TrainingJob("image", {"epochs": 3}, tmp_path, archive=tmp_path / "data.zip", cache_bytes=7, revision="abc")
    assert TrainingJob.of(job.as_json()) == job


def test_a_pipelines_code_is_what_its_spec_names() -> None:
    assert type(pipeline_of("image")).__name__ == "ImagePipeline"


def _named(path: Path) -> Iterator[str]:
    """Names and texts in the code of a file; docstrings and comments are prose."""
    tree = ast.parse(path.read_text())
    with_prose = ast.Module | ast.ClassDef | ast.FunctionDef
    statements = [node for parent in ast.walk(tree) if isinstance(parent, with_prose) for node in parent.body]
    prose = {id(node.value) for node in statements if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        elif isinstance(node, ast.Name | ast.FunctionDef | ast.ClassDef | ast.Attribute | ast.arg | ast.alias):
            yield str(
                getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None) or node.name
            )


def test_only_the_image_pipeline_names_networks_pixels_and_file_types() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name.strip()[:60]}"
        for package in ("api", "jobs", "worker")
        for path in (ROOT / package).rglob("*.py")
        if str(path.relative_to(ROOT)) not in ALLOWED
        for name in _named(path)
        if IMAGES.search(name) and name != "max_pixels"
    }
    assert found == set()


def test_only_specs_and_the_interface_of_pipelines_are_imported_from_ml() -> None:
    interfaces = ("ml.spec", "ml.pipelines", "ml.runtime")
    found = {
        f"{path.relative_to(ROOT)}: {module}"
        for package in ("api", "jobs", "worker")
        for path in (ROOT / package).rglob("*.py")
        for module in re.findall(r"^\s*(?:from|import) (ml(?:\.\w+)*) ", path.read_text(), re.MULTILINE)
        if not module.startswith(interfaces) or module.startswith("ml.spec.image")
    }
    assert found == set()


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({}, "imagenet:vgg16"),
        ({"network": "resnet18", "weights": "imagenet"}, "imagenet:resnet18"),
        ({"weights": "file:a.pth"}, "file:a.pth"),
        ({"weights": "none"}, None),
        ({"weights": "version:3"}, None),
    ],
)
def test_what_a_training_needs_of_its_worker(params: dict[str, str], name: str | None) -> None:
    needed = spec_of("image").stored.needed_weights(params)
    assert (needed and needed.name) == name
