"""Stage 2, prepare_base_model: the network with a new head on a frozen backbone, and its initial weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ml.image.networks import network, weights
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.network import InitialWeights, Model
from ml.image.stages.run import Run
from ml.runtime.errors import BadParams, ModelFileError, WeightsMissing

CALIBRATION_SCANS = 64  # training scans by which the batch normalizations of an untrained network are set
IMAGENET_OUTPUTS = tuple(str(number) for number in range(1000))


def prepare_base_model(run: Run) -> None:
    """Prepare the network. A stage that runs alone writes it, together with the original network."""
    run.model = build_base_model(run)
    if run.in_one_process:
        return
    paths = run.config.prepare_base_model
    network.save(run.model, paths.updated_base_model_path)
    network.save(_original_network(run), paths.base_model_path)


def build_base_model(run: Run) -> Model:
    """The network before training; its metadata say which weights it started from."""
    params, report = run.params, run.report
    classes, head = report.names, params.head_kind
    built = network.build(len(classes), params.seed, params.network, head, params.dropout)
    model = Model(built, classes, run.transform, {}, params.network, head)
    initial = _load_initial_weights(run, model)
    built.eval()
    metadata = {
        "params": params.model_dump(mode="json"),
        "dataset_digest": report.digest,
        "weights": {"source": initial.source, "sha256": initial.sha256},
        "begun_lineage": list(initial.lineage),
        "new_head": not initial.with_head,
        "positive": list(run.positive),
    }
    return replace(model, metadata=metadata)


def _load_initial_weights(run: Run, model: Model) -> InitialWeights:
    try:
        return _load_weights(run, model)
    except ModelFileError as error:
        raise WeightsMissing(f"weights: {error} Put a whole one there, or begin from others.") from error


def _load_weights(run: Run, model: Model) -> InitialWeights:
    params, architecture = run.params, ARCHITECTURES[model.architecture]
    if params.weights == "none":
        network.calibrate_batch_norms(model.network, _calibration_images(run))
        return InitialWeights()
    if params.weights == "imagenet":
        path = weights.find_imagenet_weights(architecture.name, run.environment.weights_dir)
        network.load_published_weights(model.network, architecture, path, params.include_top)
        return InitialWeights("imagenet", weights.sha256(path), with_head=params.include_top)
    path = _weights_file(run)
    lineage, with_head = network.load_file_weights(model, path)
    return InitialWeights(params.weights, weights.sha256(path), lineage, with_head)


def _weights_file(run: Run) -> Path:
    if run.environment.base_weights is not None:
        return run.environment.base_weights
    kind, _, name = run.params.weights.partition(":")
    if kind == "version":
        raise BadParams("weights: versions are known to the API; here, give a model file as weights: file:PATH.")
    return weights.find_weights_file(name, run.environment.weights_dir)


def _calibration_images(run: Run) -> list[torch.Tensor]:
    random = np.random.default_rng(run.params.seed)
    chosen = np.sort(random.permutation(run.split.train)[:CALIBRATION_SCANS])
    normalize = run.transform.normalize
    return [normalize(torch.from_numpy(run.pixels[chosen[at : at + 16]])) for at in range(0, len(chosen), 16)]


def _original_network(run: Run) -> Model:
    """The network with its 1000 ImageNet outputs, untrained or with torchvision's weights."""
    params = run.params
    architecture = ARCHITECTURES[params.network]
    outputs = IMAGENET_OUTPUTS
    built = network.build(len(outputs), params.seed, params.network, params.head_kind, params.dropout)
    if params.weights == "imagenet":
        path = weights.find_imagenet_weights(architecture.name, run.environment.weights_dir)
        vgg = params.network == "vgg16" and params.head_kind == "vgg"
        include_top = vgg and network.has_top(network.read_state_dict(path))
        network.load_published_weights(built, architecture, path, include_top)
    return Model(built.eval(), outputs, run.transform, {"weights": params.weights}, params.network, params.head_kind)
