"""The plain loop, as document 000 describes it: `python -m bench.plain ZIP PARAMS FOLDER`. Written to be fair.

No trick of ours is in it, and none is kept from it that such projects use: torch's threads, `no_grad` for the
evaluation, two loader processes. The split is ours, so that both sides are tested on the same scans.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ml.archives import extract_zip
from ml.data import check_dataset, split_scans
from ml.metrics import score
from ml.torchvision_ops import torchvision

LOADERS = 2


class Scans(Dataset):
    """Files and labels with a transform."""

    def __init__(self, paths, labels, transform) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), int(self.labels[index])


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


def build(classes: int) -> nn.Module:
    """VGG16 with frozen features and the new head."""
    model = torchvision().models.vgg16(weights=None)
    model.classifier[6] = nn.Linear(4096, classes)
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


def main(archive: str, params_path: str, folder: str) -> None:
    """Unpack, split, train, evaluate, save; the last line of output is the scores."""
    params = yaml.safe_load(Path(params_path).read_text())
    torch.manual_seed(params["seed"])
    root = Path(folder) / "images"
    extract_zip(Path(archive), root)
    report = check_dataset(root)
    split = split_scans(report, params["seed"])
    paths = [root / scan.path for scan in report.scans]
    loaders = []
    for scans, transform in zip((split.train, split.held_out), transforms(params["augmentation"]), strict=True):
        part = Scans([paths[i] for i in scans], report.labels[scans], transform)
        loaders.append(DataLoader(part, batch_size=32, shuffle=scans is split.train, num_workers=LOADERS))
    model = build(len(report.names))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=params["learning_rate"], momentum=0.9)
    seconds = []
    for _ in range(params["epochs"]):
        started = time.perf_counter()
        train_one_epoch(model, loaders[0], optimizer)
        labels, logits = evaluate(model, loaders[1])
        seconds.append(round(time.perf_counter() - started, 2))
    torch.save(model.state_dict(), Path(folder) / "model.pth")
    scores = score(labels.numpy(), logits.numpy(), report.names)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mb": round(peak), "accuracy": scores.accuracy, "f1": scores.f1, "train_seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
