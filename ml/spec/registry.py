"""The pipelines that are installed: every distribution may bring some, by the entry points `renalq.pipelines`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType

from ml.spec.pipeline import PipelineSpec

GROUP = "renalq.pipelines"


class UnknownPipeline(LookupError):
    """No such pipeline is installed."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no pipeline {name}: installed are {', '.join(sorted(installed()))}.")


@cache
def installed() -> Mapping[str, PipelineSpec]:
    """The specs by name. An entry point loads a `PipelineSpec`, whose name is the entry point's."""
    found: dict[str, PipelineSpec] = {}
    for point in entry_points(group=GROUP):
        spec = point.load()
        if not isinstance(spec, PipelineSpec) or spec.name != point.name:
            raise TypeError(f"The entry point {GROUP}: {point.name} must load a PipelineSpec of this name.")
        found[spec.name] = spec
    return MappingProxyType(found)


def spec_of(name: str) -> PipelineSpec:
    """The spec of an installed pipeline.

    Raises:
        UnknownPipeline
    """
    try:
        return installed()[name]
    except KeyError:
        raise UnknownPipeline(name) from None
