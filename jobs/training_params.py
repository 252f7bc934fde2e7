"""What jobs itself reads of a training's parameters. Their schema is `ml.spec.image`; the API has the same one."""

import re

from jobs.tables import Json

NETWORK = "vgg16"
"""The default of `network`, and what every version was before there was a choice."""
RENAMED = {"held_out": "test_size"}
_VERSION = re.compile(r"version:([1-9][0-9]{0,8})")
_FILE = re.compile(r"file:(.+)")


def current(params: Json) -> Json:
    """Parameters of a row that an earlier version of our code wrote, under the names that they have now."""
    return {RENAMED.get(name, name): value for name, value in params.items()}


def network(params: Json) -> str:
    """The architecture."""
    return str(params.get("network", NETWORK))


def head(params: Json) -> str:
    """The layers that end in the logits. Every version had VGG16's own before there was a choice."""
    told = str(params.get("head", "auto"))
    return told if told != "auto" else "vgg" if network(params) == NETWORK else "gap"


def transform(params: Json) -> Json:
    """How a scan becomes the network's input: height and width in pixels, and a CT's window in Hounsfield units as
    [centre, width]; None for that which its file names."""
    height, width = [*params.get("image_size", ()), None, None][:2]
    window = [params.get("window_center"), params.get("window_width")]
    return {"height": height, "width": width, "window": None if None in window else window}


def base_version(params: Json) -> int | None:
    """N of `weights: version:N`."""
    found = _VERSION.fullmatch(str(params.get("weights", "")))
    return int(found[1]) if found else None


def base_file(params: Json) -> str | None:
    """NAME of `weights: file:NAME`."""
    found = _FILE.fullmatch(str(params.get("weights", "")))
    return found[1] if found else None
