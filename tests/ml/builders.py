"""Scans, zips and datasets for the tests of ml/: small, and different for each seed."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from torch import nn

from ml.data import Split
from ml.features import Features
from ml.params import Params, parse_params
from ml.train import TrainData

SCANS = 40  # of make_data
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


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
    """Name → bytes of a dataset that can be learned: each class its own kind of picture."""
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


# --- training without a real backbone ---


def make_narrow_network(seed: int = 0) -> nn.Module:
    """VGG16's classifier with 48 instead of 4096 hidden units: all that training touches, at a fraction of its time."""
    layers = [nn.Linear(25088, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 48), nn.ReLU(), nn.Dropout()]
    network = nn.Module()
    network.classifier = nn.Sequential(*layers, nn.Linear(48, 2))
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0, 0.01, generator=generator)
    return network


class CountingBackbone:
    """A stand-in device with the real interface: a fixed random projection that counts each distinct picture."""

    name, batch = "projection", 16

    def __init__(self) -> None:
        self.seen: Counter[bytes] = Counter()
        self._projection = np.random.default_rng(0).normal(size=(16 * 16, 25088)).astype(np.float32) / 100

    def stream(self, batches):
        for batch in batches:
            self.seen.update(image.tobytes() for image in batch)
            yield np.maximum(batch[:, ::2, ::2, 0].reshape(len(batch), -1).astype(np.float32) @ self._projection, 0)


def make_data(backbone: CountingBackbone) -> TrainData:
    """40 scans in two classes that can be told apart; 8 are held out."""
    pixels = np.stack([make_pixels(seed, 32, 32, bright=seed % 2 == 1) for seed in range(SCANS)])
    split = Split(np.arange(8, SCANS), np.arange(8))
    return TrainData(Features(backbone, pixels), np.arange(SCANS) % 2, split)


def make_params(**fields: object) -> Params:
    """Params of a small training from scratch."""
    return parse_params({"weights": "none", "learning_rate": 0.01, "epochs": 3, "batch_size": 8, **fields})
