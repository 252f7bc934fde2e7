"""Stage 2, prepare_base_model: the network with a new head, frozen but for it, begun from the weights that are asked
for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ml.image.networks import network, weights
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.network import Begun, Model
from ml.image.stages.run import Run
from ml.runtime.errors import BadParams, ModelFileError, WeightsMissing

CALIBRATED_ON = 64  # training scans that an untrained network's batch normalizations are set by
OUTPUTS = tuple(str(number) for number in range(1000))  # of a network as ImageNet knows it


def prepare_base_model(state: Run) -> None:
    """Prepare the network. Alone, the stage writes it, and the network that it came from."""
    state.model = prepared(state)
    if state.whole:
        return
    paths = state.config.prepare_base_model
    network.save(state.model, paths.updated_base_model_path)
    network.save(_as_it_came(state), paths.base_model_path)


def prepared(state: Run) -> Model:
    """The network before training; its metadata say what it began with."""
    params, report = state.params, state.report
    classes, head = report.names, params.head_kind
    built = network.build(len(classes), params.seed, params.network, head, params.dropout)
    model = Model(built, classes, state.transform, {}, params.network, head)
    begun = _begin(state, model)
    built.eval()
    metadata = provenance(state) | {"weights": {"source": begun.source, "sha256": begun.sha256}}
    return replace(model, metadata=metadata | {"begun_lineage": list(begun.lineage)})


def provenance(state: Run) -> dict[str, Any]:
    """What a model file says of its making, before it learned."""
    return {"params": state.params.model_dump(mode="json"), "dataset_digest": state.report.digest}


def _begin(state: Run, model: Model) -> Begun:
    try:
        return _take_weights(state, model)
    except ModelFileError as error:
        raise WeightsMissing(f"weights: {error} Put a whole one there, or begin from others.") from error


def _take_weights(state: Run, model: Model) -> Begun:
    params, of = state.params, ARCHITECTURES[model.architecture]
    if params.weights == "none":
        network.calibrate(model.network, _calibration_images(state))
        return Begun()
    if params.weights == "imagenet":
        path = weights.imagenet_weights(of, state.around.weights_dir)
        network.begin_from_published(model.network, of, path, params.include_top)
        return Begun("imagenet", weights.sha256(path))
    path = _base_file(state)
    return Begun(params.weights, weights.sha256(path), network.begin_from_file(model, path))


def _base_file(state: Run) -> Path:
    if state.around.base_weights is not None:
        return state.around.base_weights
    kind, _, name = state.params.weights.partition(":")
    if kind == "version":
        raise BadParams("weights: versions are known to the API; here, give a model file as weights: file:PATH.")
    return weights.file_weights(name, state.around.weights_dir)


def _calibration_images(state: Run) -> list[torch.Tensor]:
    random = np.random.default_rng(state.params.seed)
    chosen = np.sort(random.permutation(state.split.train)[:CALIBRATED_ON])
    normalize = state.transform.normalize
    return [normalize(torch.from_numpy(state.pixels[chosen[at : at + 16]])) for at in range(0, len(chosen), 16)]


def _as_it_came(state: Run) -> Model:
    """The network with 1000 outputs, untrained or as torchvision publishes it."""
    params = state.params
    of = ARCHITECTURES[params.network]
    built = network.build(len(OUTPUTS), params.seed, params.network, params.head_kind, params.dropout)
    if params.weights == "imagenet":
        path = weights.imagenet_weights(of, state.around.weights_dir)
        network.begin_from_published(built, of, path, params.network == "vgg16" and params.head_kind == "vgg")
    return Model(built.eval(), OUTPUTS, state.transform, {"weights": params.weights}, params.network, params.head_kind)
