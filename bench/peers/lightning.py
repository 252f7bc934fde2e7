"""The same training by PyTorch Lightning's Trainer: `python -m bench.peers.lightning ZIP PARAMS FOLDER`.

As its documentation shows it: a LightningModule with the same network, loaders and optimizer as bench.peers.plain,
fit and predict by the Trainer, one checkpoint at the end.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import torch
import yaml
from torch import nn

from bench.peers.plain import build, material, report_scores, trainable
from ml.runtime.torchvision_import import torchvision

torchvision()  # torchmetrics imports it too, and would fail where its operators are missing
import pytorch_lightning as lightning  # noqa: E402


class Classifier(lightning.LightningModule):
    """The network, its loss and its optimizer."""

    def __init__(self, classes: int, rate: float) -> None:
        super().__init__()
        self.network, self.rate = build(classes), rate

    def training_step(self, batch, index: int) -> torch.Tensor:
        """Lightning's."""
        images, targets = batch
        return nn.functional.cross_entropy(self.network(images), targets)

    def validation_step(self, batch, index: int) -> None:
        """Lightning's."""
        images, targets = batch
        self.log("val_loss", nn.functional.cross_entropy(self.network(images), targets))

    def predict_step(self, batch, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lightning's: labels and logits."""
        images, targets = batch
        return targets, self.network(images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Lightning's."""
        return torch.optim.SGD(trainable(self.network), lr=self.rate, momentum=0.9)


def main(archive: str, params_path: str, folder: str) -> None:
    """Unpack, split, train, evaluate, save."""
    warnings.simplefilter("ignore")
    params = yaml.safe_load(Path(params_path).read_text())
    lightning.seed_everything(params["seed"], verbose=False)
    data = material(Path(archive), params, Path(folder))
    model = Classifier(len(data.names), params["learning_rate"])
    trainer = lightning.Trainer(
        max_epochs=params["epochs"], default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, accelerator="auto",
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(model, data.train, data.validation)
    seconds = [round(time.perf_counter() - started, 2)]
    labels, logits = zip(*trainer.predict(model, data.test), strict=True)
    report_scores(data.names, torch.cat(labels), torch.cat(logits), seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
