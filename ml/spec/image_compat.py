"""The image pipeline's parameters as rows hold them: perhaps not all, and under names of an earlier version.

`Params` does not check them here, so that what was stored stays readable when a range or a default changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ml.spec.image import head_kind
from ml.spec.pipeline import FILE, NeededWeights

NETWORK = "vgg16"
"""The default of `network`, and what every version was before there was a choice."""
IMAGENET = "imagenet"
"""The default of `weights`."""
RENAMED = {"held_out": "test_size"}
_VERSION = re.compile(r"version:([1-9][0-9]{0,8})")
_FILE = re.compile(r"file:(.+)")


def current(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same parameters under the names that they have now."""
    return {RENAMED.get(name, name): value for name, value in params.items()}


def network(params: Mapping[str, Any]) -> str:
    """The architecture."""
    return str(params.get("network", NETWORK))


def head(params: Mapping[str, Any]) -> str:
    """The layers that end in the logits. Every version had VGG16's own before there was a choice."""
    return head_kind(network(params), params.get("head", "auto"))


def transform(params: Mapping[str, Any]) -> dict[str, Any]:
    """How a scan becomes the network's input: height and width in pixels, a CT's window in Hounsfield units as
    [centre, width], and the millimetres of a pixel; None for what the scan's file decides."""
    height, width = [*params.get("image_size", ()), None, None][:2]
    window = [params.get("window_center"), params.get("window_width")]
    seen = {"height": height, "width": width, "window": None if None in window else window}
    return {**seen, "spacing_mm": params.get("spacing_mm")}


def base_version(params: Mapping[str, Any]) -> int | None:
    """N of `weights: version:N`."""
    found = _VERSION.fullmatch(str(params.get("weights", "")))
    return int(found[1]) if found else None


def base_file(params: Mapping[str, Any]) -> str | None:
    """NAME of `weights: file:NAME`."""
    found = _FILE.fullmatch(str(params.get("weights", "")))
    return found[1] if found else None


def needed_weights(params: Mapping[str, Any]) -> NeededWeights | None:
    """ImageNet's of the network, or a file; None where the workers need nothing of their own."""
    begins = str(params.get("weights", IMAGENET))
    if begins == IMAGENET:
        chosen = network(params)
        remedy = f"Run renalq weights fetch {chosen} where the workers run, or train from scratch with weights: none."
        return NeededWeights(f"{IMAGENET}:{chosen}", remedy)
    if (file := base_file(params)) is None:
        return None
    return NeededWeights(
        f"{FILE}{file}", "Put it into the workers' folder RENALQ_WEIGHTS_DIR, or set weights: imagenet or none."
    )
