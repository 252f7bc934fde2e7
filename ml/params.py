"""The parameters of a training: one frozen schema for params.yaml, for a job's `params` and for the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ml.errors import BadParams


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Side = Annotated[int, Field(ge=32, le=1024)]
ImageSize = Annotated[tuple[Side, Side, Literal[3]], BeforeValidator(_as_tuple)]


class Params(BaseModel):
    """Everything that shapes a training. Unknown keys and ill-typed values are errors that name the field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image_size: ImageSize = Field(
        (224, 224, 3), description="height, width (pixels) and channels of the network's input"
    )
    batch_size: int = Field(32, ge=1, le=1024, description="scans for one step of the optimizer")
    epochs: int = Field(2, ge=1, le=1000, description="passes over the training scans")
    learning_rate: float = Field(0.001, gt=0, le=10, description="of SGD")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    classes: int | None = Field(
        None, ge=2, le=1000, description="if given, the dataset must have this many class folders"
    )
    augmentation: bool = Field(True, description="rotate, mirror, shift, scale the training scans anew in each epoch")
    include_top: bool = Field(
        False, description="start from ImageNet's 4096-4096 classifier layers; needs ImageNet weights"
    )
    weights: Literal["imagenet", "none"] = Field("imagenet", description="where the frozen features come from")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of the split, the head, the shuffling and the augmentation")
    held_out: float = Field(0.2, ge=0.05, le=0.5, description="share of the scans that training never sees")
    standardize: Literal["auto"] | bool = Field(
        "auto", description="features to mean 0, std 1; auto: when weights is none"
    )

    @property
    def standardizes(self) -> bool:
        """Whether the features are standardized with the training set's mean and std."""
        return self.weights == "none" if self.standardize == "auto" else self.standardize


def parse_params(fields: dict[str, Any]) -> Params:
    """Params of a mapping, keys in either case (params.yaml writes capitals); BadParams names the field."""
    if not isinstance(fields, dict):
        raise BadParams("The parameters must be a mapping of names to values.")
    try:
        params = Params(**{str(key).lower(): value for key, value in fields.items()})
    except ValidationError as error:
        raise BadParams(first_complaint(error)) from error
    if params.include_top and params.weights == "none":
        raise BadParams("include_top: there is no ImageNet classifier to keep when weights is none.")
    return params


def load_params(path: Path) -> Params:
    """Params of a YAML file."""
    return parse_params(read_yaml(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; BadParams when the file is missing or holds something else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadParams(f"{path.name}: cannot be read as YAML.") from error
    if not isinstance(content, dict):
        raise BadParams(f"{path.name}: a mapping of names to values is expected.")
    return content


def first_complaint(error: ValidationError) -> str:
    """`field: what is wrong`, for the first wrong field."""
    first = error.errors(include_url=False, include_input=False)[0]
    names = [str(part) for part in first["loc"] if not str(part).startswith(("literal[", "bool"))]
    return f"{'.'.join(names) or 'params'}: {first['msg']}."
