"""Grad-CAM (Selvaraju et al. 2017): where in a scan the network sees what speaks for a class.

The maps of one layer (see ml.image.networks.architectures), each weighed by the mean gradient of the class's score,
added up, and the positive part of it: by captum's LayerGradCam. The score is the class's log-odds against all
others. Its logit alone says less: what raises all logits alike changes no probability, but would be seen as speaking
for each class (of 50 phantoms' tumours, the peak was in 18 by the logit and in 37 by the log-odds).

The gradient needs torch from these maps on only: what lies below them, nearly all of the work, is a plain forward on
a fast engine, and serves all classes.

Everybody stretches the few cells of these maps over the whole picture. But a cell looks at a place that strides and
paddings give: ResNet's first one at the very corner, so that stretching shows its findings 15 pixels of 224 too far
right and down. Here each cell lies where its receptive field has its centre. Between the cells the heat is a quadratic
B-spline: what two neighbours see alike lies between them, where a linear stretch has its peak at one of the two (of 50
phantoms' tumours, 35 had the peak within 16 of 224 pixels of them when stretched linearly, and all 50 so).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ml.evaluation.calibration import Calibration
from ml.evaluation.metrics import positive_index
from ml.image.engines.admission import floating_form_of
from ml.image.engines.base import Precision, outputs_of
from ml.image.engines.engines import open_engine
from ml.image.learning.learner import device
from ml.image.networks import network
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.serving.predictor import ScanInput
from ml.runtime.errors import BadParams, ImageError, naming_out_of_memory

COLOURS = "inferno"  # perceptually uniform, and told apart by the colour-blind
OPACITY = 0.6  # of the colour where the heat is 1; at heat 0 the scan is as it was


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where a class was seen in a scan, or (`error_code` set) why nobody could look at it.

    `heatmap`: float32 [height, width] of the scan itself, 0 to 1 at the strongest place; 0 everywhere where nothing
    speaks for the class. `overlay`: a PNG of that size, the grey scan with the heat in colour.
    """

    id: str
    label: str | None = None
    heatmap: np.ndarray | None = None
    overlay: bytes | None = None
    error_code: str | None = None
    error_detail: str | None = None

    @property
    def is_blank(self) -> bool:
        """Whether nothing in the scan speaks for the class."""
        return self.heatmap is not None and not self.heatmap.any()

    def heatmap_png(self) -> bytes:
        """The heatmap as a PNG, 8-bit grey: 0 to 255 stand for 0 to 1."""
        assert self.heatmap is not None, "there is none of a scan that could not be read"
        return _png(_levels(self.heatmap))


class Explainer:
    """A model that stays loaded and belongs to the explainer: its upper part in fp32 by torch, what is below on the
    engine that predicts, or where that is int8, on the fastest other one that is admitted. Not for two threads at once.
    """

    def __init__(self, model: network.Model, precision: Precision = "auto") -> None:
        """`precision`: as it was predicted in. EngineNotAdmitted, as `ml.image.engines.admission.form_of` has it."""
        form = floating_form_of(model.metadata, precision)
        self.classes, self.transform = model.classes, model.transform
        self._of = ARCHITECTURES[model.architecture]
        self._calibration = Calibration.of(model.metadata)
        below, above, self._maps = _cut_at_maps(model)
        with naming_out_of_memory():
            # Scans come one at a time: by VGG16 one took 153 ms, and 214 where a second stream had half of the cores.
            self._below = open_engine(below, model.transform, form, streams=1)
            self._above = above.requires_grad_(False).eval().to(device())

    @classmethod
    def load(cls, path: Path, precision: Precision = "auto") -> Explainer:
        """Read a model file; ModelFileError for any other file, DeviceOutOfMemory where the device has no room,
        EngineNotAdmitted for a precision that this machine or this network is not made for."""
        return cls(network.load(path), precision)

    def explain(self, scans: Iterable[ScanInput], label: str | None = None) -> Iterator[Explanation]:
        """Explanations of the class `label`, one after another in the order of `scans`, which may be endless.

        None: of the class that the network finds in each scan; where an engine's rounding decides, a prediction may
        name another. BadParams for a class that the network does not know.
        """
        self._require(label)
        return (next(self._explanations(scan, label)) for scan in scans)

    def each_class(self, scan: ScanInput, label: str | None = None) -> Iterator[Explanation]:
        """Explanations of one scan: first that of `label` as above, then those of all other classes. One forward serves
        them all, and each is made when it is asked for: of the largest scan one takes 350 MB."""
        self._require(label)
        return self._explanations(scan, label)

    def _require(self, label: str | None) -> None:
        if label is not None and label not in self.classes:
            raise BadParams(f"label: the network knows no such class; choose one of {', '.join(self.classes)}.")

    def _explanations(self, scan: ScanInput, label: str | None) -> Iterator[Explanation]:
        try:
            pixels = scan.pixels(self.transform.window)
        except ImageError as error:
            yield Explanation(scan.id, error_code=error.code, error_detail=str(error))
            return
        with naming_out_of_memory():
            features = self._features(pixels)
            found = self.classes[self._decided(features)] if label is None else label
        for name in (found, *(name for name in self.classes if name != found)):
            yield self._of_class(scan.id, pixels, features, name)

    def _features(self, pixels: np.ndarray) -> torch.Tensor:
        """What the lower part makes of a scan, for all classes."""
        return torch.from_numpy(outputs_of(self._below, np.stack([self.transform.resize(pixels)]))).to(device())

    def _of_class(self, scan_id: str, pixels: np.ndarray, features: torch.Tensor, label: str) -> Explanation:
        with naming_out_of_memory():
            heatmap = self._over(self._weighed(features, self.classes.index(label)), *pixels.shape[:2])
            return Explanation(scan_id, label, heatmap, _overlay(pixels, heatmap))

    def _weighed(self, features: torch.Tensor, label: int) -> np.ndarray:
        """What each cell of the maps says for the class: float32 [rows, columns], not negative."""
        from captum.attr import LayerGradCam  # it takes half a second to import

        by = LayerGradCam(lambda below: _log_odds(self._above(below), label), self._maps)
        cells = by.attribute(features, relu_attributions=True)
        maps = cells[0] if isinstance(cells, tuple) else cells
        return maps[0, 0].detach().cpu().numpy()

    @torch.inference_mode()
    def _decided(self, features: torch.Tensor) -> int:
        logits = self._above(features).cpu().numpy()
        return int(self._calibration.decide(logits, positive_index(self.classes))[0])

    def _over(self, cells: np.ndarray, height: int, width: int) -> np.ndarray:
        """The heat of each pixel of a scan: float32 [height, width], 0 to 1."""
        cells = np.nan_to_num(cells)
        strongest = cells.max()
        if strongest <= 0:
            return np.zeros((height, width), np.float32)
        rows = _shares(height, self.transform.height, len(cells), *self._of.cells)
        columns = _shares(width, self.transform.width, cells.shape[1], *self._of.cells)
        heat: np.ndarray = rows @ (cells / strongest) @ columns.T
        return heat / (heat.max() or 1)  # a scan of few pixels may miss the strongest cell


def _log_odds(logits: torch.Tensor, label: int) -> torch.Tensor:
    """ln p/(1 - p) of a class, [N], of logits [N, classes]; of two classes, the difference of these."""
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    return logits[:, label] - others.logsumexp(1)


def _shares(pixels: int, side: int, cells: int, step: float, first: float) -> np.ndarray:
    """What each pixel of a scan's side takes of each cell, of its nearest three: float32 [pixels, cells].

    `side`: of the network's input, that the scan was resized to; there the cells are `step` apart, from `first` on.
    """
    places = (np.arange(pixels) + 0.5) * (side / pixels) - 0.5
    in_cells = np.clip((places - first) / step, 0, cells - 1)
    away = np.abs(in_cells[:, None] - np.arange(cells))
    shares: np.ndarray = np.where(away < 0.5, 0.75 - away**2, np.maximum(0, 1.5 - away) ** 2 / 2)
    return (shares / shares.sum(1, keepdims=True)).astype(np.float32)


# --- the pictures ----------------------------------------------------------------------------------------------------


def _levels(heatmap: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(heatmap * 255).astype(np.uint8))


def _overlay(pixels: np.ndarray, heatmap: np.ndarray) -> bytes:
    levels = _levels(heatmap)
    colours = levels.copy()
    colours.putpalette(_palette())
    grey = Image.fromarray(pixels).convert("L").convert("RGB")
    return _png(Image.composite(colours.convert("RGB"), grey, levels.point(lambda level: round(level * OPACITY))))


def _png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG", compress_level=1)
    return sink.getvalue()


@cache
def _palette() -> bytes:
    """256 colours, three bytes each."""
    from matplotlib import colormaps

    table: np.ndarray = colormaps[COLOURS](np.arange(256), bytes=True)
    return table[:, :3].tobytes()


# --- the maps --------------------------------------------------------------------------------------------------------


class _Maps(nn.Module):
    """Tokens [N, 1 + side², channels] → maps [N, channels, side, side], and the class token, which is of no place."""

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        patches = tokens[:, 1:].transpose(1, 2)
        side = round(patches.shape[2] ** 0.5)
        return patches.reshape(*patches.shape[:2], side, side), tokens[:, :1]


class _Tokens(nn.Module):
    """The reverse of `_Maps`."""

    def forward(self, parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """See the class."""
        maps, class_token = parts
        return torch.cat([class_token, maps.flatten(2).transpose(1, 2)], dim=1)


def _cut_at_maps(model: network.Model) -> tuple[nn.Sequential, nn.Sequential, nn.Module]:
    """The network below its maps and above them, and what within the upper part gives them. A transformer's last block
    stays above whole: its maps are within it."""
    below, above = model.cut(top=1)
    path = ARCHITECTURES[model.architecture].cam
    layer, (block, *rest) = model.network.get_submodule(path), above.children()
    if isinstance(layer, nn.LayerNorm):
        holder, _, name = path.rpartition(".")
        tokens = _Maps()
        setattr(model.network.get_submodule(holder), name, nn.Sequential(layer, tokens, _Tokens()))
        return below, above, tokens
    parts = [block] if block is layer else list(block.children())
    end, maps = parts.index(layer) + 1, nn.Identity()
    return nn.Sequential(*below, *parts[:end]), nn.Sequential(maps, *parts[end:], *rest), maps
