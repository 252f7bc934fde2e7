"""The transform from decoded pixels to network input; it is stored with the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Transform:
    """Resizing (Pillow, bilinear with antialiasing), then (x/255 - mean) / std.

    `window`: centre and width in Hounsfield units for decoding CT; None: the window stored in each file.
    """

    height: int = 224
    width: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    window: tuple[float, float] | None = None

    def resize(self, image: np.ndarray) -> np.ndarray:
        """uint8 [any, any, 3] → uint8 [height, width, 3]."""
        if image.shape[:2] == (self.height, self.width):
            return image
        picture = Image.fromarray(image)
        return np.asarray(picture.resize((self.width, self.height), Image.Resampling.BILINEAR))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, height, width, 3] → float32 [N, 3, height, width]. The engines fuse this into their graph."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def as_dict(self) -> dict[str, Any]:
        """For the model file's metadata."""
        return {"resize": "bilinear-antialias", **asdict(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Transform:
        """The inverse of `as_dict`."""
        mean, std = (tuple(float(value) for value in fields[name]) for name in ("mean", "std"))
        window = fields.get("window")
        return cls(int(fields["height"]), int(fields["width"]), mean, std, tuple(window) if window else None)  # type: ignore[arg-type]
