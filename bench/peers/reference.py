"""The same training in the manner of torchvision's reference: `python -m bench.peers.reference ZIP PARAMS FOLDER`.

Its habits, on bench.peers.plain's network and data: channels_last, pinned loaders, `inference_mode` for the evaluation,
gradients set to None, a learning-rate scheduler stepped each epoch, a checkpoint of network and optimizer after each.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

from bench.peers.plain import build, material, report_scores, trainable


@torch.inference_mode()
def evaluate(model: nn.Module, criterion: nn.Module, loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and logits; the loss is reckoned on the way."""
    model.eval()
    labels, logits, total = [], [], 0.0
    for images, targets in loader:
        outputs = model(images.contiguous(memory_format=torch.channels_last))
        total += float(criterion(outputs, targets)) * len(targets)
        labels.append(targets)
        logits.append(outputs)
    return torch.cat(labels), torch.cat(logits)


def train_one_epoch(
    model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader
) -> float:
    """One pass; the mean accuracy while learning."""
    model.train()
    correct = seen = 0
    for images, targets in loader:
        outputs = model(images.contiguous(memory_format=torch.channels_last))
        loss = criterion(outputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        correct += int((outputs.argmax(1) == targets).sum())
        seen += len(targets)
    return correct / seen


def main(archive: str, params_path: str, folder: str) -> None:
    """Unpack, split, train, evaluate, save."""
    params = yaml.safe_load(Path(params_path).read_text())
    torch.manual_seed(params["seed"])
    data = material(Path(archive), params, Path(folder))
    model = build(len(data.names)).to(memory_format=torch.channels_last)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(trainable(model), lr=params["learning_rate"], momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    seconds = []
    for _ in range(params["epochs"]):
        started = time.perf_counter()
        train_one_epoch(model, criterion, optimizer, data.train)
        scheduler.step()
        evaluate(model, criterion, data.validation)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, Path(folder) / "checkpoint.pth")
        seconds.append(round(time.perf_counter() - started, 2))
    report_scores(data.names, *evaluate(model, criterion, data.test), seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
