"""Which pipeline and which task a request means."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import marshmallow as ma
from marshmallow import fields, validate

from api.http.pipelines.schemas import schema_of
from ml.spec import registry
from ml.spec.pipeline import DEFAULT_TASK, IMAGE, PipelineSpec

TASK = r"^[a-z0-9][a-z0-9_-]{0,39}$"


class PipelineName(fields.String):
    """The name of an installed pipeline."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(validate=_is_installed, **kwargs)


class TaskName(fields.String):
    """What a model is for: a tenant has one champion for each pipeline and task."""

    def __init__(self, **kwargs: Any) -> None:
        checks = validate.Regexp(TASK, error="Must be 1 to 40 of a-z, 0-9, _ and -, and begin with a letter or digit.")
        super().__init__(validate=checks, metadata={"pattern": TASK}, **kwargs)


def _is_installed(name: str) -> None:
    try:
        registry.spec_of(name)
    except registry.UnknownPipeline as error:
        raise ma.ValidationError(str(error)) from None


class PipelineParams(fields.Nested):
    """A training's parameters, by the schema of the pipeline that stands beside them; in OpenAPI that of images."""

    def __init__(self) -> None:
        super().__init__(_params_schema(IMAGE), unknown=ma.RAISE)

    def _deserialize(  # type: ignore[override]
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> Any:
        name = (data or {}).get("pipeline", IMAGE)
        if name == IMAGE or name not in registry.installed():
            return super()._deserialize(value, attr, data, **kwargs)
        return _params_schema(name)(unknown=ma.RAISE).load(value)


@cache
def _params_schema(pipeline: str) -> type[ma.Schema]:
    spec = registry.spec_of(pipeline)
    return schema_of(spec.params, spec.renamed_params)


class ModelTask(ma.Schema):
    """Of which pipeline and task the champion is meant."""

    pipeline = PipelineName(load_default=IMAGE)
    task = TaskName(load_default=DEFAULT_TASK)


def spec_of(body: dict[str, Any]) -> PipelineSpec:
    """The pipeline that a checked body names; `image` where it names none."""
    return registry.spec_of(body.get("pipeline", IMAGE))
