"""The plain loop, as document 000 describes it: `python -m bench.peers.plain ZIP PARAMS FOLDER`. Written to be fair.

No trick of ours is in it, and none is kept from it that such projects use: torch's threads, `no_grad` for the
evaluation, two loader processes. The split is ours, so that both sides are tested on the same scans; and so is the
standardization of random features, as a layer: without it plain SGD learns next to nothing from them, and there would
be no quality to compare.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ml.evaluation.metrics import ModelOutputs, score
from ml.image.dataset.scans import check_dataset
from ml.image.dataset.splits import split_scans
from ml.runtime.archives import extract_zip
from ml.runtime.torchvision_import import torchvision

LOADERS = 2


class Scans(Dataset):
    """Files and labels with a transform."""

    def __init__(self, paths, labels, transform) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), int(self.labels[index])


class Standardized(nn.Module):
    """(x - mean) / std of the first batch of features, as ml.image.learning.standardization has it of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)
        self.register_buffer("scale", None)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [n, 25088]."""
        if self.mean is None:
            std, self.mean = torch.std_mean(features.detach(), dim=0)
            self.scale = torch.hypot(std, 0.3 * std.mean() + 1e-12) / 0.3
        return (features - self.mean) / self.scale


@dataclass
class Material:
    """What every side of the comparison starts from."""

    names: tuple[str, ...]
    train: DataLoader
    validation: DataLoader
    test: DataLoader


def transforms(augmentation: bool):
    """Document 000's two pipelines: (training, validation)."""
    t = torchvision().transforms
    changes = [
        t.RandomRotation(40),
        t.RandomHorizontalFlip(),
        t.RandomAffine(0, translate=(0.2, 0.2)),
        t.RandomAffine(0, scale=(0.8, 1.2)),
    ]
    end = [t.ToTensor(), t.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    resize = [t.Resize((224, 224))]
    return t.Compose([*resize, *(changes if augmentation else []), *end]), t.Compose([*resize, *end])


def material(archive: Path, params: dict, folder: Path) -> Material:
    """Unpack, check, split; a loader for each side."""
    root = folder / "images"
    extract_zip(archive, root)
    report = check_dataset(root)
    split = split_scans(report, params["seed"])
    paths = np.array([str(root / scan.path) for scan in report.scans])
    changing, still = transforms(params["augmentation"])

    def loader(scans: np.ndarray, transform, shuffle: bool = False) -> DataLoader:
        part = Scans(paths[scans], report.labels[scans], transform)
        return DataLoader(part, batch_size=32, shuffle=shuffle, num_workers=LOADERS)

    return Material(
        report.names, loader(split.train, changing, True), loader(split.validation, still), loader(split.test, still)
    )


def build(classes: int) -> nn.Module:
    """VGG16 with frozen features and the new head."""
    model = torchvision().models.vgg16(weights=None)
    model.classifier[6] = nn.Linear(4096, classes)
    model.classifier.insert(0, Standardized())
    for parameter in model.features.parameters():
        parameter.requires_grad = False
    return model


def evaluate(model: nn.Module, loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and logits of a loader's scans."""
    model.eval()
    labels, logits = [], []
    with torch.no_grad():
        for images, targets in loader:
            logits.append(model(images))
            labels.append(targets)
    return torch.cat(labels), torch.cat(logits)


def train_one_epoch(model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer) -> None:
    """The loop of every tutorial."""
    model.train()
    for images, targets in loader:
        loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    """The head's parameters."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def report_scores(names: tuple[str, ...], labels: torch.Tensor, logits: torch.Tensor, seconds: list[float]) -> None:
    """The last line of output: what `bench.train` reads."""
    scores = score(ModelOutputs(names, labels.numpy(), logits.numpy()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mb": round(peak), "accuracy": scores.accuracy, "f1": scores.f1, "train_seconds": seconds}))


def main(archive: str, params_path: str, folder: str) -> None:
    """Unpack, split, train, evaluate, save."""
    params = yaml.safe_load(Path(params_path).read_text())
    torch.manual_seed(params["seed"])
    data = material(Path(archive), params, Path(folder))
    model = build(len(data.names))
    optimizer = torch.optim.SGD(trainable(model), lr=params["learning_rate"], momentum=0.9)
    seconds = []
    for _ in range(params["epochs"]):
        started = time.perf_counter()
        train_one_epoch(model, data.train, optimizer)
        evaluate(model, data.validation)
        seconds.append(round(time.perf_counter() - started, 2))
    torch.save(model.state_dict(), Path(folder) / "model.pth")
    report_scores(data.names, *evaluate(model, data.test), seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
