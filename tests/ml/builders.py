"""Scans, zips and datasets for the tests of ml/: small, and different for each seed."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from torch import nn

from ml.image.dataset.splits import Split
from ml.image.engines.backends import TorchEngine
from ml.image.engines.features import Features
from ml.image.learning.train import TrainData
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.network import Model
from ml.image.pixels.transforms import Transform
from ml.runtime.config import parse_params
from ml.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from ml.spec.image import Params

TRAINED, VALIDATED, TESTED = 32, 8, 4  # scans of make_data
SCANS = TRAINED + VALIDATED + TESTED
CLASSES = ("Normal", "Tumor")
LIGHT_NETWORKS = ("vgg16", "resnet18")
"""Of the six, those that most tests take: the default, and the one that takes least time."""
FEATURES = 2048  # per scan, if a `CountingBackbone` computes them


def last_linear(model: Model) -> nn.Linear:
    """The layer that outputs the logits."""
    head = model.network.get_submodule(ARCHITECTURES[model.architecture].head)
    assert isinstance(head, nn.Sequential)
    assert isinstance(head[-1], nn.Linear)
    return head[-1]


def make_pixels(seed: int = 0, height: int = 48, width: int = 48, bright: bool = False) -> np.ndarray:
    """A noisy disc, uint8 [height, width, 3]; a bright square in it marks the second class."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    disc = ((y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 2.4) ** 2) * 90.0
    if bright:
        top, left = random.integers(height // 4, height // 2, 2)
        disc[top : top + height // 5, left : left + width // 5] = 230
    noisy = np.clip(disc + random.normal(20, 6, (height, width)), 0, 255)
    return np.repeat(noisy[:, :, None], 3, axis=2).astype(np.uint8)


def encode(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    """Pixels (or a Pillow picture) as the bytes of an image file."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    sink = io.BytesIO()
    picture.save(sink, form, **options)
    return sink.getvalue()


def make_dicom(values: np.ndarray, **attributes: object) -> bytes:
    """A CT file of int16 stored values [height, width] or [frames, height, width]; attributes override its tags."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2.3.4"
    meta.TransferSyntaxUID = attributes.pop("syntax", ExplicitVRLittleEndian)
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID, ds.Modality = CTImageStorage, "1.2.3.4", "SECRET-77", "CT"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.Rows, ds.Columns = values.shape[-2:]
    if values.ndim == 3:
        ds.NumberOfFrames = len(values)
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    ds.PixelData = values.astype("<i2").tobytes()
    for name, value in attributes.items():
        setattr(ds, name, value)
    sink = io.BytesIO()
    ds.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def make_files(per_class: int = 6, classes: tuple[str, ...] = ("Normal", "Tumor"), side: int = 48) -> dict[str, bytes]:
    """Name → bytes of a dataset that can be learned: each class has its own kind of picture."""
    files = {}
    for number, name in enumerate(classes):
        for index in range(per_class):
            pixels = make_pixels(1000 * number + index, side, side, bright=number % 2 == 1)
            files[f"{name}/{name}-{index:03}.png"] = encode(pixels)
    return files


def write_folder(files: dict[str, bytes], folder: Path) -> Path:
    """The files below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(files: dict[str, bytes], path: Path) -> Path:
    """The files as a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


# --- training without a real backbone --------------------------------------------------------------------------------


def make_scans(count: int = SCANS, side: int = 32) -> np.ndarray:
    """Pictures of two alternating classes: uint8 [count, side, side, 3]."""
    return np.stack([make_pixels(seed, side, side, bright=seed % 2 == 1) for seed in range(count)])


def make_split() -> Split:
    """8 validation scans, 32 training scans, 4 test scans, in this order."""
    return Split(np.arange(VALIDATED, VALIDATED + TRAINED), np.arange(VALIDATED), np.arange(SCANS - TESTED, SCANS))


class NarrowModel(Model):
    """A model with a classifier only; its features come from a `CountingBackbone`."""

    def cut(self, top: int = 0) -> tuple[nn.Sequential, nn.Sequential]:
        assert top == 0, "there is no block to unfreeze"
        return nn.Sequential(), nn.Sequential(self.network.classifier)


def make_narrow_model(seed: int = 0, head: str = "vgg", dropout: float = 0.5, width: int = 48) -> NarrowModel:
    """VGG16's classifier with 48 instead of 4096 hidden units, or a gap head: everything that is trained, but fast."""
    network = nn.Module()
    if head == "gap":
        network.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(FEATURES, 2))
    else:
        hidden = [nn.Linear(FEATURES, width), nn.ReLU(), nn.Dropout(dropout)]
        hidden += [nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)]
        network.classifier = nn.Sequential(*hidden, nn.Linear(width, 2))
    _draw_weights(network, seed)
    return NarrowModel(network.eval(), CLASSES, Transform(32, 32), {}, "vgg16", head)


class CountingBackbone:
    """A stand-in device with the real interface: a fixed random projection that counts each distinct picture."""

    name, batch, streams = "projection", 16, 1

    def __init__(self) -> None:
        self.seen: Counter[bytes] = Counter()
        self._projection = np.random.default_rng(0).normal(size=(16 * 16, FEATURES)).astype(np.float32) / 100

    def stream(self, batches):
        for batch in batches:
            self.seen.update(image.tobytes() for image in batch)
            yield np.maximum(batch[:, ::2, ::2, 0].reshape(len(batch), -1).astype(np.float32) @ self._projection, 0)


def make_data(backbone: CountingBackbone | None = None, group: ProcessGroup = SINGLE_PROCESS) -> TrainData:
    """44 scans in two separable classes, for a `NarrowModel`."""
    features = Features(backbone or CountingBackbone(), make_scans(), group)
    return TrainData(lambda top: features, np.arange(SCANS) % 2, make_split(), positive=(1,))


class TinyModel(Model):
    """A convolutional network of two blocks with batch normalization, for pictures of 32 × 32."""

    def cut(self, top: int = 0) -> tuple[nn.Sequential, nn.Sequential]:
        blocks = list(self.network.blocks)
        if top == 0:
            return nn.Sequential(*blocks, self.network.pool), nn.Sequential(self.network.head)
        return nn.Sequential(*blocks[:-top]), nn.Sequential(*blocks[-top:], self.network.pool, self.network.head)


def make_tiny_model(seed: int = 0, dropout: float = 0.5) -> TinyModel:
    """An untrained model, frozen except for its head."""
    network = nn.Module()
    network.blocks = nn.Sequential(_tiny_block(3, 8), _tiny_block(8, 16))
    network.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    network.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(64, 2))
    _draw_weights(network, seed)
    network.requires_grad_(False)
    network.head.requires_grad_(True)
    return TinyModel(network.eval(), CLASSES, Transform(32, 32), {}, "resnet18", "gap")


def _tiny_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)
    )  # fmt: skip


def _draw_weights(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            nn.init.normal_(layer.bias, 0, 0.01, generator=generator)


def make_tuned_data(model: Model, group: ProcessGroup = SINGLE_PROCESS) -> TrainData:
    """The scans of `make_data`, with features of a `TinyModel` computed by torch."""
    pixels = make_scans()

    @cache
    def features(top: int) -> Features:
        return Features(TorchEngine(model.cut(top)[0], model.transform, "cpu", "fp32"), pixels, group)

    return TrainData(features, np.arange(SCANS) % 2, make_split(), positive=(1,))


def make_params(**fields: object) -> Params:
    """Params of a small training from scratch."""
    return parse_params({"weights": "none", "learning_rate": 0.01, "epochs": 3, "batch_size": 8, **fields})
