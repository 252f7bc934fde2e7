"""Grad-CAM (Selvaraju et al. 2017): the regions of a scan that support a class.

The maps of one layer (see ml.image.networks.architectures) are weighted by the mean gradient of the class's score,
summed, and clipped at 0, by captum's LayerGradCam. The score is the log-odds of the class against all others. Its logit
alone is worse: a region that raises all logits alike changes no probability, but would seem to support each class (the
peak was in the tumour in 18 of 50 phantoms by the logit and in 37 by the log-odds).

Only the layers above these maps need torch and gradients. The layers below, nearly all of the work, are one forward
pass on a fast engine, shared by all classes.

The usual upscaling stretches the few cells of these maps over the whole picture. But the position that a cell looks at
depends on strides and paddings: ResNet's first cell looks at the very corner, so that stretching shifts its findings by
15 of 224 pixels to the right and down. Here each cell is placed at the centre of its receptive field. Between cells the
heat is a quadratic B-spline: where two neighbours respond alike, its peak lies between them, while linear interpolation
has its peak at one of the two (of 50 phantoms' tumours, the peak was within 16 of 224 pixels of 35 with linear
interpolation, and of all 50 with B-splines).
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
from ml.image.engines.admission import choose_float_dtype
from ml.image.engines.backends import open_engine
from ml.image.engines.engine import Precision, outputs_of
from ml.image.engines.hardware import training_device
from ml.image.networks import network
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.pixels.picture import Picture
from ml.image.pixels.transforms import Spacing
from ml.image.serving.predictor import ScanInput
from ml.runtime.errors import BadParams, ItemError, naming_out_of_memory

COLOURS = "inferno"  # perceptually uniform and colour-blind safe
OPACITY = 0.6  # of the colour at heat 1; at heat 0 the scan is unchanged


@dataclass(frozen=True, eq=False)
class Explanation:
    """The regions of a scan that support a class, or (`error_code` set) the reason why the scan cannot be read.

    `heatmap`: float32 [height, width] in the scan's own size; its maximum is 1, or 0 if nothing supports the class.
    `overlay`: a PNG of the same size, the grey scan with the heat in colour.
    """

    id: str
    label: str | None = None
    heatmap: np.ndarray | None = None
    overlay: bytes | None = None
    error_code: str | None = None
    error_detail: str | None = None

    @property
    def is_blank(self) -> bool:
        """Whether nothing in the scan supports the class."""
        return self.heatmap is not None and not self.heatmap.any()

    def heatmap_png(self) -> bytes:
        """The heatmap as an 8-bit grey PNG: 0 to 255 stand for 0 to 1."""
        assert self.heatmap is not None, "an unreadable scan has no heatmap"
        return _png(_levels(self.heatmap))


class Explainer:
    """A loaded model, which it takes over and changes. Not thread-safe.

    Its upper layers run in torch in fp32. The layers below run on the engine that predicts or, if that is int8, on the
    fastest other one that is admitted.
    """

    def __init__(self, model: network.Model, precision: Precision = "auto") -> None:
        """`precision`: the one of the prediction. EngineNotAdmitted: see `ml.image.engines.admission.choose_dtype`."""
        dtype = choose_float_dtype(model.metadata, precision)
        self.classes, self.transform = model.classes, model.transform
        self._architecture = ARCHITECTURES[model.architecture]
        self._calibration, self._positive = Calibration.from_metadata(model.metadata), model.findings
        below, above, self._maps = _cut_at_maps(model)
        with naming_out_of_memory():
            # One scan at a time: with VGG16 it takes 153 ms, but 214 ms if a second stream has half of the cores.
            self._below = open_engine(below, model.transform, dtype, streams=1)
            self._above = above.requires_grad_(False).eval().to(training_device())

    @classmethod
    def load(cls, path: Path, precision: Precision = "auto") -> Explainer:
        """Load a model file; raises as `ml.image.serving.predictor.Predictor.load`."""
        return cls(network.load(path), precision)

    def explain(self, scans: Iterable[ScanInput], label: str | None = None) -> Iterator[Explanation]:
        """Explanations for the class `label`, in the order of `scans`, which may be infinite.

        None: for the class that the network decides for in each scan. In borderline cases this can differ from the
        prediction, which may run in another dtype. BadParams for a class that the network does not have.
        """
        self._require_known(label)
        return (next(self._explanations(scan, label)) for scan in scans)

    def each_class(self, scan: ScanInput, label: str | None = None) -> Iterator[Explanation]:
        """Explanations of one scan: for `label` as in `explain`, then for each other class.

        They share one forward pass and are computed lazily: one of the largest possible scan takes 350 MB.
        """
        self._require_known(label)
        return self._explanations(scan, label)

    def _require_known(self, label: str | None) -> None:
        if label is not None and label not in self.classes:
            raise BadParams(f"label: the network knows no such class; choose one of {', '.join(self.classes)}.")

    def _explanations(self, scan: ScanInput, label: str | None) -> Iterator[Explanation]:
        try:
            picture = scan.picture(self.transform)
        except ItemError as error:
            yield Explanation(scan.id, error_code=error.code, error_detail=str(error))
            return
        with naming_out_of_memory():
            features = self._features(picture)
            first = self.classes[self._decide(features)] if label is None else label
        for name in (first, *(name for name in self.classes if name != first)):
            yield self._explain_class(scan.id, picture, features, name)

    def _features(self, picture: Picture) -> torch.Tensor:
        """Outputs of the lower layers for one scan, shared by all classes."""
        resized = self.transform.resize(picture.pixels, picture.spacing_mm)
        return torch.from_numpy(outputs_of(self._below, resized[None])).to(training_device())

    def _explain_class(self, scan_id: str, picture: Picture, features: torch.Tensor, label: str) -> Explanation:
        with naming_out_of_memory():
            cam, (height, width) = self._cam(features, self.classes.index(label)), picture.pixels.shape[:2]
            heatmap = self._upscale(cam, height, width, picture.spacing_mm)
            return Explanation(scan_id, label, heatmap, _overlay(picture.pixels, heatmap))

    def _cam(self, features: torch.Tensor, label: int) -> np.ndarray:
        """The weighted sum of the maps, clipped at 0: float32 [rows, columns]."""
        from captum.attr import LayerGradCam  # importing it takes half a second

        cam = LayerGradCam(lambda below: _log_odds(self._above(below), label), self._maps)
        cells = cam.attribute(features, relu_attributions=True)
        maps = cells[0] if isinstance(cells, tuple) else cells
        return maps[0, 0].detach().cpu().numpy()

    @torch.inference_mode()
    def _decide(self, features: torch.Tensor) -> int:
        logits = self._above(features).cpu().numpy()
        return int(self._calibration.decide(logits, self._positive)[0])

    def _upscale(self, cells: np.ndarray, height: int, width: int, spacing: Spacing = None) -> np.ndarray:
        """The heat of each pixel of the scan: float32 [height, width], 0 to 1; 0 where the network does not look."""
        cells = np.nan_to_num(cells)
        strongest = cells.max()
        if strongest <= 0:
            return np.zeros((height, width), np.float32)
        view = self.transform.view(height, width, spacing)
        down, across = _positions(height, view.top, view.height), _positions(width, view.left, view.width)
        rows = _spline_weights(down, self.transform.height, len(cells), *self._architecture.cells)
        columns = _spline_weights(across, self.transform.width, cells.shape[1], *self._architecture.cells)
        heat: np.ndarray = rows @ (cells / strongest) @ columns.T
        return heat / (heat.max() or 1)  # no pixel of a very small scan may lie at the strongest cell


def _log_odds(logits: torch.Tensor, label: int) -> torch.Tensor:
    """ln p/(1 - p) of a class, [N], from logits [N, classes]. With two classes it is the difference of the logits."""
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    return logits[:, label] - others.logsumexp(1)


def _positions(pixels: int, begin: float, length: float) -> np.ndarray:
    """The centre of each pixel along a side of the scan, in [pixels]: 0 to 1 in the part that the network sees."""
    return (np.arange(pixels) + 0.5 - begin) / length


def _spline_weights(positions: np.ndarray, side: int, cells: int, step: float, first: float) -> np.ndarray:
    """Quadratic B-spline weights of the cells along one side of a scan: float32 [pixels, cells].

    Rows sum to 1, or to 0 where the network does not look. `positions`: see `_positions`; `side`: of the network's
    input, in pixels. In it, cells are `step` pixels apart, and the first one is at `first`.
    """
    in_cells = np.clip((positions * side - 0.5 - first) / step, 0, cells - 1)
    distance = np.abs(in_cells[:, None] - np.arange(cells))
    weights: np.ndarray = np.where(distance < 0.5, 0.75 - distance**2, np.maximum(0, 1.5 - distance) ** 2 / 2)
    weights /= weights.sum(1, keepdims=True)
    weights[(positions < 0) | (positions > 1)] = 0
    return weights.astype(np.float32)


# --- pictures --------------------------------------------------------------------------------------------------------


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
    """256 colours of three bytes each."""
    from matplotlib import colormaps

    table: np.ndarray = colormaps[COLOURS](np.arange(256), bytes=True)
    return table[:, :3].tobytes()


# --- maps ------------------------------------------------------------------------------------------------------------


class _Maps(nn.Module):
    """Tokens [N, 1 + side², channels] → maps [N, channels, side, side] and the class token, which has no position."""

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        patches = tokens[:, 1:].transpose(1, 2)
        side = round(patches.shape[2] ** 0.5)
        return patches.reshape(*patches.shape[:2], side, side), tokens[:, :1]


class _Tokens(nn.Module):
    """The inverse of `_Maps`."""

    def forward(self, parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """See the class."""
        maps, class_token = parts
        return torch.cat([class_token, maps.flatten(2).transpose(1, 2)], dim=1)


def _cut_at_maps(model: network.Model) -> tuple[nn.Sequential, nn.Sequential, nn.Module]:
    """(layers below the maps, layers above them, the module in the latter that outputs the maps).

    A transformer's last block is above as a whole, since its maps are inside the block.
    """
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
