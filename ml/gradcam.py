"""Grad-CAM (Selvaraju et al. 2017): where in a scan the network sees what speaks for a class.

The maps of one layer (see ml.architectures), each weighed by the mean gradient of the class's logit, added up, and the
positive part of it: by captum's LayerGradCam. No weight asks for a gradient here, so torch keeps a graph only from that
layer on, and what is below it costs a plain forward.

Everybody stretches the few cells of these maps over the whole picture. But a cell looks at a place that strides and
paddings give: ResNet's first one at the very corner, so that stretching shows its findings 15 pixels of 224 too far
right and down. Here each cell lies where its receptive field has its centre.
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

from ml import network
from ml.admission import whole
from ml.architectures import ARCHITECTURES
from ml.calibration import Calibration
from ml.errors import BadParams, ImageError, naming_out_of_memory
from ml.images import decode
from ml.learning import device
from ml.metrics import positive_index
from ml.predict import ScanInput

COLOURS = "inferno"  # perceptually uniform, and told apart by the colour-blind
OPACITY = 0.6  # of the colour where the heat is 1; at heat 0 the scan is as it was


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where a class was seen in a scan, or (`error_code` set) why nobody could look at it.

    `heatmap`: float32 [height, width] of the scan itself, 0 to 1 at the strongest cell; 0 everywhere where nothing
    speaks for the class. `overlay`: a PNG of that size, the grey scan with the heat in colour.
    """

    id: str
    label: str | None = None
    heatmap: np.ndarray | None = None
    overlay: bytes | None = None
    error_code: str | None = None
    error_detail: str | None = None


class Explainer:
    """A model that stays loaded, in fp32 by torch, and belongs to the explainer. Not for two threads at once."""

    def __init__(self, model: network.Model) -> None:
        self.classes, self.transform = model.classes, model.transform
        self._of = ARCHITECTURES[model.architecture]
        self._calibration = Calibration.of(model.metadata)
        self._layer = _maps_of(model.network, self._of.cam)
        with naming_out_of_memory():
            self._network = whole(model).requires_grad_(False).eval().to(device())

    @classmethod
    def load(cls, path: Path) -> Explainer:
        """Read a model file; ModelFileError for any other file, DeviceOutOfMemory where the device has no room."""
        return cls(network.load(path))

    def explain(self, scans: Iterable[ScanInput], label: str | None = None) -> Iterator[Explanation]:
        """Explanations of the class `label`, one after another in the order of `scans`, which may be endless.

        None: of the class that the network finds in each scan, in fp32: where an engine's rounding decides, a
        prediction may name the other. BadParams for a class that the network does not know.
        """
        if label is not None and label not in self.classes:
            raise BadParams(f"label: the network knows no such class; choose one of {', '.join(self.classes)}.")
        return (self._explanation(scan, label) for scan in scans)

    def _explanation(self, scan: ScanInput, label: str | None) -> Explanation:
        try:
            pixels = decode(scan.content(), self.transform.window)
        except ImageError as error:
            return Explanation(scan.id, error_code=error.code, error_detail=str(error))
        with naming_out_of_memory():
            found, cells = self._weighed(pixels, label)
            heatmap = self._over(cells, *pixels.shape[:2])
            return Explanation(scan.id, found, heatmap, _overlay(pixels, heatmap))

    def _weighed(self, pixels: np.ndarray, label: str | None) -> tuple[str, np.ndarray]:
        """The class, and what each cell of the maps says for it: float32 [rows, columns], not negative."""
        from captum.attr import LayerGradCam  # it takes half a second to import

        found: list[int] = []

        def score(images: torch.Tensor) -> torch.Tensor:
            logits = self._network(images)
            found.append(self._decided(logits) if label is None else self.classes.index(label))
            return logits[:, found[-1]]  # type: ignore[no-any-return]

        resized = torch.from_numpy(np.stack([self.transform.resize(pixels)])).to(device())
        cells = LayerGradCam(score, self._layer).attribute(self.transform.normalize(resized), relu_attributions=True)
        maps = cells[0] if isinstance(cells, tuple) else cells
        return self.classes[found[-1]], maps[0, 0].detach().cpu().numpy()

    def _decided(self, logits: torch.Tensor) -> int:
        return int(self._calibration.decide(logits.detach().cpu().numpy(), positive_index(self.classes))[0])

    def _over(self, cells: np.ndarray, height: int, width: int) -> np.ndarray:
        """The heat of each pixel of a scan: float32 [height, width], 0 to 1."""
        cells = np.nan_to_num(cells)
        strongest = cells.max()
        if strongest > 0:
            cells = cells / strongest
        rows = _shares(height, self.transform.height, len(cells), *self._of.cells)
        columns = _shares(width, self.transform.width, cells.shape[1], *self._of.cells)
        heat: np.ndarray = rows @ cells @ columns.T
        heat.clip(0, 1, out=heat)  # rounding
        return heat


def _shares(pixels: int, side: int, cells: int, step: float, first: float) -> np.ndarray:
    """What each pixel of a scan's side takes of each cell, linearly between two: float32 [pixels, cells].

    `side`: of the network's input, that the scan was resized to; there the cells are `step` apart, from `first` on.
    """
    places = (np.arange(pixels) + 0.5) * (side / pixels) - 0.5
    in_cells = np.clip((places - first) / step, 0, cells - 1)
    shares: np.ndarray = np.maximum(0, 1 - np.abs(in_cells[:, None] - np.arange(cells)))
    return shares.astype(np.float32)


# --- the overlay -----------------------------------------------------------------------------------------------------


def _overlay(pixels: np.ndarray, heatmap: np.ndarray) -> bytes:
    levels = Image.fromarray(np.rint(heatmap * 255).astype(np.uint8))
    colours, sink = levels.copy(), io.BytesIO()
    colours.putpalette(_palette())
    grey = Image.fromarray(pixels).convert("L").convert("RGB")
    blended = Image.composite(colours.convert("RGB"), grey, levels.point(lambda level: round(level * OPACITY)))
    blended.save(sink, "PNG", compress_level=1)
    return sink.getvalue()


@cache
def _palette() -> bytes:
    """256 colours, three bytes each."""
    from matplotlib import colormaps

    table: np.ndarray = colormaps[COLOURS](np.arange(256), bytes=True)
    return table[:, :3].tobytes()


# --- the maps --------------------------------------------------------------------------------------------------------


def _maps_of(of: nn.Module, path: str) -> nn.Module:
    """The layer of the network whose output are maps [N, channels, rows, columns]. Where it gives tokens, two layers
    are put behind it: one that makes them maps, and one that makes them tokens again."""
    layer = of.get_submodule(path)
    if not isinstance(layer, nn.LayerNorm):
        return layer
    holder, _, name = path.rpartition(".")
    maps = _Maps()
    setattr(of.get_submodule(holder), name, nn.Sequential(layer, maps, _Tokens()))
    return maps


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
