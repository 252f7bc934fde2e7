"""The four stages. Each reads its inputs from disk and writes its outputs there, so each can run alone (and by dvc).

`run` does all four in one process and hands big things on in memory: the network before training (2 × 537 MB as files)
is then not written, and the held-out scans' features are not computed again for the evaluation. Else all is the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ml import network
from ml.archives import extract_zip
from ml.checkpoints import Keeper, Origin, resumed
from ml.config import CheckpointPlan, PipelineConfig
from ml.data import DatasetReport, check_dataset, count_images, load_manifest, save_manifest, split_scans
from ml.download import fetch
from ml.engines import device_name, open_backbone
from ml.errors import BadDataset, BadParams
from ml.events import Emit, Epoch, Evaluated, Finished, Resumed, StageFinished, StageStarted, reporter
from ml.features import Features
from ml.metrics import Scores, score
from ml.params import Params
from ml.tensorfile import reserve
from ml.train import Start, TrainConfig, TrainData, train
from ml.transforms import Transform

DOWNLOAD_SHARE = 0.4  # of the first stage's progress, when there is something to download


@dataclass
class Run:
    """One run of the pipeline: where to read and write, whom to tell, and what stages hand on in memory."""

    config: PipelineConfig
    params: Params
    emit: Emit
    weights_dir: Path | None = None
    whole: bool = False  # all four stages in this process
    checkpoints: CheckpointPlan = field(default_factory=CheckpointPlan)
    model: network.Model | None = None
    features: Features | None = None
    epochs: list[Epoch] = field(default_factory=list)
    device_seconds: float = 0.0

    @property
    def transform(self) -> Transform:
        """The transform that the parameters ask for."""
        return Transform(self.params.image_size[0], self.params.image_size[1])


Stage = Callable[[Run], None]


def run(
    config: PipelineConfig,
    params: Params,
    emit: Emit,
    weights_dir: Path | None = None,
    checkpoints: CheckpointPlan | None = None,
) -> Finished:
    """All four stages in this process; ends with the `finished` event, which is also returned."""
    whole = Run(config, params, emit, weights_dir, whole=True, checkpoints=checkpoints or CheckpointPlan())
    for name in STAGES:
        run_stage(name, whole)
    finished = Finished(str(config.training.trained_model_path), _artifacts(config), round(whole.device_seconds, 3))
    emit(finished)
    return finished


def run_stage(name: str, state: Run) -> None:
    """One stage, between its `stage_started` and `stage_finished` events."""
    started = time.perf_counter()
    state.emit(StageStarted(name))
    STAGES[name](state)
    state.emit(StageFinished(name, round(time.perf_counter() - started, 3)))


# --- 1 data_ingestion ------------------------------------------------------------------------------------------------


def data_ingestion(state: Run) -> None:
    """A zip (local, or downloaded) → a folder of scans, manifest.json, and pixels.npy with every scan decoded once."""
    paths, tell = state.config.data_ingestion, reporter(state.emit, "data_ingestion")
    paths.root_dir.mkdir(parents=True, exist_ok=True)
    begin = 0.0
    if not paths.local_data_file.exists():
        if not paths.source_url:
            raise BadParams("data_ingestion: local_data_file does not exist, and source_URL is not set.")
        fetch(paths.source_url, paths.local_data_file, report=lambda fraction: tell(DOWNLOAD_SHARE * fraction))
        begin = DOWNLOAD_SHARE
    extract_zip(paths.local_data_file, paths.unzip_dir)
    report = _decode_all(state, lambda fraction: tell(begin + (1 - begin) * fraction))
    report.raise_for_problems()
    save_manifest(report, paths.manifest_path)


def _decode_all(state: Run, tell: Callable[[float], None]) -> DatasetReport:
    paths, transform = state.config.data_ingestion, state.transform
    partial = paths.pixels_path.with_name(f".{paths.pixels_path.name}.partial")
    shape = (count_images(paths.unzip_dir), transform.height, transform.width, 3)
    try:
        pixels = _pixels_file(partial, shape) if shape[0] else np.empty(shape, np.uint8)

        def keep(index: int, image: np.ndarray) -> None:
            pixels[index] = transform.resize(image)

        report = check_dataset(paths.unzip_dir, state.params.classes, keep, tell)
        if not report.problems:
            partial.replace(paths.pixels_path)
    finally:
        partial.unlink(missing_ok=True)
    return report


def _pixels_file(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    pixels: np.ndarray = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    with path.open("r+b") as file:
        reserve(file.fileno(), path.stat().st_size)
    return pixels


def load_pixels(state: Run) -> np.ndarray:
    """Every scan's pixels as data_ingestion left them: uint8 [scans, height, width, 3], mapped from the file."""
    try:
        pixels: np.ndarray = np.load(state.config.data_ingestion.pixels_path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise BadDataset("There is no dataset yet: run the stage data_ingestion first.") from error
    if pixels.shape[1:] != state.params.image_size:
        raise BadParams("image_size: the dataset was decoded in another size; run the stage data_ingestion again.")
    return pixels


# --- 2 prepare_base_model --------------------------------------------------------------------------------------------


def prepare_base_model(state: Run) -> None:
    """VGG16 with frozen features and a new head. Alone, the stage writes it, and the network that it came from."""
    report = load_manifest(state.config.data_ingestion.manifest_path)
    built = _build(state, len(report.names))
    state.model = network.Model(built, report.names, state.transform, _provenance(state, report))
    if state.whole:
        return
    paths = state.config.prepare_base_model
    network.save(state.model, paths.updated_base_model_path)
    network.save(_base_model(state), paths.base_model_path)


def _build(state: Run, classes: int) -> torch.nn.Module:
    params = state.params
    if params.weights == "none":
        return network.build(classes, params.seed)
    weights = network.imagenet_weights(state.weights_dir)
    return network.build_imagenet(classes, params.seed, params.include_top, weights)


def _base_model(state: Run) -> network.Model:
    """VGG16 as it came, with ImageNet's 1000 outputs, or its untrained likeness."""
    outputs = tuple(str(number) for number in range(1000))
    params = state.params
    if params.weights == "none":
        return network.Model(network.build(1000, params.seed), outputs, state.transform)
    weights = network.imagenet_weights(state.weights_dir)
    base = network.build_imagenet(1000, params.seed, True, weights)
    base.load_state_dict(torch.load(weights, weights_only=True, mmap=True, map_location="cpu"))
    return network.Model(base, outputs, state.transform)


def _provenance(state: Run, report: DatasetReport) -> dict[str, object]:
    return {"params": state.params.model_dump(mode="json"), "dataset_digest": report.digest}


# --- 3 training ------------------------------------------------------------------------------------------------------


def training(state: Run) -> None:
    """Frozen features once, then the head by SGD; writes model.safetensors and history.json."""
    started = time.perf_counter()
    report = load_manifest(state.config.data_ingestion.manifest_path)
    model = state.model or network.load(state.config.prepare_base_model.updated_base_model_path)
    if not state.whole:
        _own_memory(model.network)
    backbone = open_backbone(model.network, model.transform)
    state.features = Features(backbone, load_pixels(state))
    split = split_scans(report, state.params.seed, state.params.held_out)
    origin = Origin.of(state.params, report, model.network, backbone.name)
    keeper = Keeper(state.checkpoints, origin, state.epochs, state.emit)
    tell, start = reporter(state.emit, "training"), _start(state, origin)
    config = TrainConfig(model.network, state.params, tell, keeper, start)
    for epoch in train(config, TrainData(state.features, report.labels, split)):
        state.epochs.append(epoch)
        state.emit(epoch)
    metadata = {**model.metadata, **_provenance(state, report), "engine": backbone.name, "device": device_name()}
    state.model = replace(model, metadata=metadata)
    state.device_seconds += time.perf_counter() - started
    network.save(state.model, state.config.training.trained_model_path)
    _write_json(state.config.training.history_path, [asdict(epoch) for epoch in state.epochs])


def _start(state: Run, origin: Origin) -> Start:
    checkpoint = resumed(state.checkpoints, origin)
    if checkpoint is None:
        return Start()
    state.epochs.extend(checkpoint.history)
    state.emit(Resumed(checkpoint.epoch))
    return Start(checkpoint.epoch, checkpoint.head)


def _own_memory(module: torch.nn.Module) -> None:
    # Loaded weights are a map of the file; training writes in place and must never write there.
    for parameter in module.get_submodule("classifier").parameters():
        parameter.data = parameter.data.clone()


# --- 4 evaluation ----------------------------------------------------------------------------------------------------


def evaluation(state: Run) -> None:
    """The saved network on the held-out scans; writes scores.json and the plots."""
    started = time.perf_counter()
    report = load_manifest(state.config.data_ingestion.manifest_path)
    model = state.model or network.load(state.config.training.trained_model_path)
    if state.features is None:
        state.features = Features(open_backbone(model.network, model.transform), load_pixels(state))
        state.features.on_images(_counting(state, report))
    held_out = split_scans(report, state.params.seed, state.params.held_out).held_out
    logits = _logits(model, state.features.plain(held_out))
    scores = score(report.labels[held_out], logits, model.classes)
    state.device_seconds += time.perf_counter() - started
    _write_json(state.config.evaluation.scores_path, scores.as_dict())
    _plot(state, scores)
    state.emit(Evaluated(scores.as_dict()))


@torch.inference_mode()
def _logits(model: network.Model, features: np.ndarray) -> np.ndarray:
    classifier = model.network.get_submodule("classifier").eval()
    return classifier(torch.from_numpy(features)).numpy()  # type: ignore[no-any-return]


def _counting(state: Run, report: DatasetReport) -> Callable[[int], None]:
    total, done, tell = report.images * state.params.held_out, 0, reporter(state.emit, "evaluation")

    def count(images: int) -> None:
        nonlocal done
        done += images
        tell(min(done / total, 1.0))

    return count


def _plot(state: Run, scores: Scores) -> None:
    from ml import plots

    paths = _plot_paths(state.config)
    plots.confusion_matrix(scores, paths["confusion_matrix.png"])
    plots.learning_curves(state.epochs or _history(state.config), paths["learning_curves.png"])


def _history(config: PipelineConfig) -> list[Epoch]:
    try:
        return [Epoch(**fields) for fields in json.loads(config.training.history_path.read_text(encoding="utf-8"))]
    except (OSError, ValueError) as error:
        raise BadParams("There is no training yet: run the stage training first.") from error


def _plot_paths(config: PipelineConfig) -> dict[str, Path]:
    return {name: config.evaluation.root_dir / name for name in ("confusion_matrix.png", "learning_curves.png")}


def _artifacts(config: PipelineConfig) -> dict[str, str]:
    paths = {
        "scores.json": config.evaluation.scores_path,
        "history.json": config.training.history_path,
        "manifest.json": config.data_ingestion.manifest_path,
        **_plot_paths(config),
    }
    return {name: str(path) for name, path in paths.items()}


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)


STAGES: dict[str, Stage] = {
    "data_ingestion": data_ingestion,
    "prepare_base_model": prepare_base_model,
    "training": training,
    "evaluation": evaluation,
}
