"""What a pipeline takes and gives, declared once: a `PipelineSpec`.

The API's schemas and OpenAPI, the command line's help, the docs and the workers' checks are made from it. A spec is
plain data: importing one loads pydantic and nothing heavier. The code that does the work is named by `runtime`, and
only workers and their children import it (see `ml.pipelines`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import IO, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

IMAGE, DEFAULT_TASK = "image", "default"
"""The pipeline and the task of whoever names none: every client before there was a choice."""

OVERLAY, HEATMAP, BLANK_NOTE = ".png", ".heatmap.png", ".blank.txt"
"""The files of an explanation, by suffix: a picture for people, the bare heatmap, a note that the heatmap is empty."""


CACHE_OWNERS = "owners.txt"
"""The file in a cache entry that names the datasets and jobs that it was computed from, an id a line."""


class _Declaration(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Stage(_Declaration):
    """One stage of a training. `weight` is its share of the job's progress; the weights of all stages sum to 1."""

    name: str
    weight: float = Field(gt=0, le=1)


class Media(NamedTuple):
    """What an item's header declares; width and height in pixels, where the item has any. `frames`: how many pictures
    the item holds, each with a result of its own in a batch."""

    media_type: str
    width: int | None = None
    height: int | None = None
    frames: int = 1


class RefusedInput(Exception):
    """An item that the pipeline does not read. The message says what to send instead."""


Inspect = Callable[[IO[bytes], int], Media]
"""A look at an item's header: the stream and the largest number of pixels that may be declared → Media.

Raises RefusedInput. The stream's position is the caller's to restore."""


class Inputs(_Declaration):
    """What items the pipeline reads. `inspect`: "module:function", an `Inspect`; without it any bytes are of
    `media_types[0]`. `beside`: names of files that lie beside items in a zip, in lower case."""

    item: str = "item"
    described: str = "items"
    media_types: tuple[str, ...] = ("application/octet-stream",)
    inspect: str | None = None
    beside: tuple[str, ...] = ()
    refusal_code: str = "BAD_INPUT"
    refusal: str = "This is no input that the pipeline can read."

    def look(self, stream: IO[bytes], max_pixels: int) -> Media:
        """What the stream holds, by its header; the stream is rewound.

        Raises:
            RefusedInput
        """
        stream.seek(0)
        try:
            return self._inspect(stream, max_pixels) if self._inspect else Media(self.media_types[0])
        finally:
            stream.seek(0)

    @cached_property
    def _inspect(self) -> Inspect | None:
        return load(self.inspect) if self.inspect else None


class Bound(_Declaration):
    """A figure of the evaluation that a new version must keep: at least `least`, or at most `most`.

    `minus` names a figure that is subtracted first. `lower_end`: the lower end of the figure's 95 % interval counts;
    `least` 0 asks for none. `setting` names the setting whose value takes the bound's place.
    `unknown`: the sentence for a version without the figure; `{bound}` stands for the number.
    """

    figure: str
    title: str
    least: float | None = None
    most: float | None = None
    minus: str | None = None
    lower_end: bool = False
    setting: str | None = None
    unknown: str | None = None


class Gate(_Declaration):
    """What the promotion gate goes by: `leads` decides against the champion, and has a bound for the first champion.

    `always` are bounds for every version. `by_groups`: the evaluation counts independent groups of each class and
    compares with the champion by groups (`ml.evaluation.paired`), so floors of groups and of each class's recall apply,
    and the difference's interval decides against the champion. `unknown_patients`: a warning before the reasons where
    the figures may be too good because nothing tells the patients (`patients_known` is false).
    """

    leads: Bound
    always: tuple[Bound, ...] = ()
    by_groups: bool = False
    unknown_patients: str | None = None


class Card(_Declaration):
    """What a model card says of every version: sentences, and what it tells of a version's parameters.

    `details`: of the parameters, as JSON. `rows`: of the card's details, as rows of its table; null is told as unknown.
    `limits`: of the metrics, sentences on which inputs the version refuses to answer to.
    """

    title: str
    use: str = "Telling {classes} apart."
    factors: tuple[str, ...] = ()
    not_for: tuple[str, ...] = ()
    ethics: tuple[str, ...] = ()
    details: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda params: {}
    limits: Callable[[Mapping[str, Any]], list[str]] = lambda metrics: []
    rows: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda details: {"Classes": ", ".join(details["classes"])}


class DatasetFacts(NamedTuple):
    """What a training's request is checked against: items by class, and the `inspection` of the dataset's check, which
    is the pipeline's own. `tested_on`: items by class of the dataset that is locked for testing, if there is one."""

    classes: Mapping[str, int]
    inspection: Mapping[str, Any] = {}
    tested_on: Mapping[str, int] | None = None


Shortages = Callable[[Any, DatasetFacts], Iterable[tuple[str, str]]]
"""(valid parameters, dataset) → pairs of a field (one of the parameters, or `test_dataset_id`) and a sentence: what the
dataset is certain to be too thin for, and what to do."""


FILE = "file:"
"""How the names of a site's own files begin among readable weights: clients are not told which files there are."""


class NeededWeights(NamedTuple):
    """Weights that a training begins from and that lie on the workers: their name, as in `readable_weights` of
    `ml.pipelines.Pipeline`, and what to do where no worker has them."""

    name: str
    remedy: str


class StoredParams(_Declaration):
    """How a training's parameters are read from a row, where an earlier version may have written them.

    `current`: under the names of today. `base_version`, `base_file`: what the training begins from, a model version's
    number or the name of a file in the workers' folder of weights. `needed_weights`: what a worker must be able to read
    for it. `architecture`: what a version must share with the training that begins from it.
    """

    current: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    base_version: Callable[[Mapping[str, Any]], int | None] = lambda params: None
    base_file: Callable[[Mapping[str, Any]], str | None] = lambda params: None
    needed_weights: Callable[[Mapping[str, Any]], NeededWeights | None] = lambda params: None
    architecture: Callable[[Mapping[str, Any]], str | None] = lambda params: None


class PipelineSpec(_Declaration):
    """A pipeline, declared.

    `runtime`: "module:attribute" of its `ml.pipelines.Pipeline`. `tasks`: which of train, predict and explain it does.
    `public_artifacts`: files that hold neither items nor names of files, so that MLflow may show them. `phases`: values
    of an epoch's `phase`, in order. `packages`: distributions whose versions decide a model's numbers.
    `shortages`: what of a training's request a dataset does not suffice for, found out when it is submitted.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    title: str
    runtime: str
    params: type[BaseModel]
    stages: tuple[Stage, ...]
    tasks: frozenset[str] = frozenset({"train", "predict"})
    inputs: Inputs = Inputs()
    gate: Gate
    figures: tuple[str, ...] = ()
    card: Card
    model_file: str = "model.safetensors"
    public_artifacts: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    stored: StoredParams = StoredParams()
    renamed_params: Mapping[str, str] = {}
    shortages: Shortages = lambda params, dataset: ()

    def progress(self, stage: str, fraction: float) -> float:
        """The job's progress, 0 to just below 1, at a fraction of a stage."""
        done = 0.0
        for each in self.stages:
            if each.name == stage:
                return min(done + each.weight * fraction, 0.999)  # 1 is for the job's end alone
            done += each.weight
        raise ValueError(f"The pipeline {self.name} has no stage {stage}.")


def load(path: str) -> Any:
    """What "module:attribute" names."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
