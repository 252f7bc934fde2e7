"""config.yaml, where the stages read and write, as frozen objects; and params.yaml as `ml.spec.image.Params`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ml.runtime.errors import BadParams
from ml.spec.image import Params
from ml.spec.params import contradictions

M = TypeVar("M", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class DataIngestion(_Section):
    """`local_data_file`, a zip or a folder, is used where it exists; otherwise `source_URL` is downloaded to it."""

    root_dir: Path
    source_url: str | None = Field(None, alias="source_URL")
    local_data_file: Path
    unzip_dir: Path

    @property
    def scans_dir(self) -> Path:
        """The folder with one folder a class: `local_data_file` itself, or what its zip is unpacked to."""
        return self.local_data_file if self.local_data_file.is_dir() else self.unzip_dir

    @property
    def manifest_path(self) -> Path:
        """What the folder holds: classes, files, labels, patients, digest."""
        return self.root_dir / "manifest.json"

    @property
    def report_path(self) -> Path:
        """What the check found, without file names."""
        return self.root_dir / "dataset_report.json"

    @property
    def pixels_path(self) -> Path:
        """Every scan decoded and resized once: uint8 [scans, height, width, 3]."""
        return self.root_dir / "pixels.npy"


class PrepareBaseModel(_Section):
    """The network before training: as it came, and with the new head."""

    root_dir: Path
    base_model_path: Path
    updated_base_model_path: Path


class Training(_Section):
    """The trained network."""

    root_dir: Path
    trained_model_path: Path

    @property
    def history_path(self) -> Path:
        """One object an epoch, as in the `epoch` events."""
        return self.root_dir / "history.json"

    @property
    def out_of_fold_path(self) -> Path:
        """What the folds gave, if there were some."""
        return self.root_dir / "out_of_fold.json"


class Evaluation(_Section):
    """The scores on the held-out scans; the plots lie beside them."""

    root_dir: Path
    scores_path: Path


class PipelineConfig(_Section):
    """The whole of config.yaml. Relative paths are relative to the working directory."""

    artifacts_root: Path
    data_ingestion: DataIngestion
    prepare_base_model: PrepareBaseModel
    training: Training
    evaluation: Evaluation

    @classmethod
    def below(cls, folder: Path) -> PipelineConfig:
        """The places of config/config.yaml, with `folder` instead of artifacts."""
        ingestion, base = folder / "data_ingestion", folder / "prepare_base_model"
        training, evaluation = folder / "training", folder / "evaluation"
        return cls(
            artifacts_root=folder,
            data_ingestion=DataIngestion(
                root_dir=ingestion, source_url=None,
                local_data_file=ingestion / "data.zip", unzip_dir=ingestion / "images",
            ),
            prepare_base_model=PrepareBaseModel(
                root_dir=base, base_model_path=base / "base_model.safetensors",
                updated_base_model_path=base / "base_model_updated.safetensors",
            ),
            training=Training(root_dir=training, trained_model_path=training / "model.safetensors"),
            evaluation=Evaluation(root_dir=evaluation, scores_path=evaluation / "scores.json"),
        )  # fmt: skip

    def reading(self, data: str) -> PipelineConfig:
        """The same places, and other scans: a zip, a folder with one folder a class, or the address of a zip."""
        if "://" in data:
            # Each address has a file of its own: what came from another one must not be taken for this one's.
            name = f"data-{hashlib.sha256(data.encode()).hexdigest()[:8]}.zip"
            scans = {"source_url": data, "local_data_file": self.data_ingestion.root_dir / name}
        else:
            scans = {"source_url": None, "local_data_file": Path(data)}
        return self.model_copy(update={"data_ingestion": self.data_ingestion.model_copy(update=scans)})


@dataclass(frozen=True)
class CheckpointPlan:
    """Where checkpoints go, how often, and which one to go on from. The defaults: nowhere, and from the beginning."""

    folder: Path | None = None
    seconds: float = 60.0  # at least, between two of them; 0: after each epoch
    resume: Path | None = None


def load_config(path: Path) -> PipelineConfig:
    """The configuration of a YAML file; BadParams names the wrong field."""
    try:
        return PipelineConfig(**read_yaml(path))
    except ValidationError as error:
        raise BadParams(f"{path.name}: {_first_complaint(error)}") from error


def load_params(path: Path) -> Params:
    """The image pipeline's parameters in a YAML file; BadParams names the wrong field."""
    return parse_params(read_yaml(path))


def parse_params(fields: Mapping[str, Any]) -> Params:
    """The image pipeline's parameters of a mapping, as `parse` reads it."""
    return parse(Params, fields)


def parse(model: type[M], fields: Mapping[str, Any]) -> M:
    """Parameters of a mapping, its keys in either case (params.yaml has capitals).

    Raises:
        BadParams: `field: what is wrong`, for the first wrong field.
    """
    if not isinstance(fields, Mapping):
        raise BadParams("The parameters must be a mapping of names to values.")
    try:
        params = model(**{str(key).lower(): value for key, value in fields.items()})
    except ValidationError as error:
        raise BadParams(_first_complaint(error)) from error
    for field, message in contradictions(params):
        raise BadParams(f"{field}: {_uncapitalized(message)}")
    return params


def _first_complaint(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    names = [str(part) for part in first["loc"] if not str(part).startswith(("literal[", "bool"))]
    return f"{'.'.join(names) or 'params'}: {first['msg']}."


def _uncapitalized(sentence: str) -> str:
    return sentence if sentence[1:2].isupper() else sentence[:1].lower() + sentence[1:]


# --- YAML ---


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; BadParams when the file is missing or holds something else."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadParams(f"{path.name}: cannot be read as YAML.") from error
    if not isinstance(content, dict):
        raise BadParams(f"{path.name}: a mapping of names to values is expected.")
    return content


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text: it wants 1.0e-3. YAML 1.2, JSON and Python read a number, and so does this."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for; yaml.YAMLError where it is no YAML."""
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
