"""A training's parameters: the keys of params.yaml. The worker's `ml.spec.image` has the same; a test compares the
two."""

import re
from collections.abc import Iterator
from typing import Any

import marshmallow as ma
from marshmallow import fields, validate

from api.http.fields import Boolean, Float, Integer, WordOrBoolean
from jobs.training_params import RENAMED

BLOCKS = {"efficientnet_b0": 9, "vit_b_16": 13}
LEAST_SIDE = {"inception_v3": 75}
FIXED_SIDE = {"vit_b_16": 224}
NETWORKS = ("vgg16", "resnet18", "resnet50", "inception_v3", "efficientnet_b0", "vit_b_16")
WEIGHTS = re.compile(r"(imagenet|none|version:[1-9][0-9]{0,8}|file:(?!.*\.\.)[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,254})\Z")


class ImageSizeField(fields.List):
    """[height, width, 3]."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(Integer(3, 1024), validate=_is_image_size, **kwargs)


def _is_image_size(value: list[int]) -> None:
    if len(value) != 3 or min(value[:2]) < 32 or value[2] != 3:
        raise ma.ValidationError("Must be [height, width, 3], with 32 to 1024 pixels each way.")


def _is_weights(value: str) -> None:
    if not WEIGHTS.match(value):
        raise ma.ValidationError(
            "Must be imagenet, none, version:N, or file:NAME with a plain name: no slash, no .., no dot in front."
        )


def _told(default: Any, description: str, **more: Any) -> dict[str, Any]:
    return {"default": default, "description": description, **more}


def _word(default: str, *others: str, told: str) -> fields.String:
    return fields.String(validate=validate.OneOf([default, *others]), metadata=_told(default, told))


def _whole(default: int | None, low: int, high: int, told: str) -> Integer:
    return Integer(low, high, allow_none=default is None, metadata=_told(default, told))


def _real(default: float | None, low: float, high: float | None, told: str, bounds: str = "[]") -> Float:
    checks = validate.Range(low, high, min_inclusive=bounds[0] == "[", max_inclusive=bounds[1] == "]")
    # apispec writes a bound as if it were allowed itself.
    excluded: dict[str, float | None] = {"exclusiveMinimum": low} if bounds[0] == "(" else {}
    excluded |= {"exclusiveMaximum": high} if bounds[1] == ")" else {}
    return Float(validate=checks, allow_none=default is None, metadata=_told(default, told, **excluded))


def _flag(default: bool, told: str) -> Boolean:
    return Boolean(metadata=_told(default, told))


def _flag_or(word: str, default: bool | str, told: str) -> WordOrBoolean:
    return WordOrBoolean(word, metadata=_told(default, told))


class ParamsSchema(ma.Schema):
    """A training's parameters; what is left out has its default."""

    # The network.
    network = _word(*NETWORKS, told="architecture, by torchvision's name")
    head = _word(
        *("auto", "vgg", "gap"),
        told="vgg: two hidden layers of 4096; gap: global average and one layer; auto: vgg for vgg16",
    )
    dropout = _real(0.5, 0, 1, "in the head, while learning", "[)")
    image_size = ImageSizeField(
        metadata=_told(
            [224, 224, 3], "height, width (pixels) and channels of the network's input", minItems=3, maxItems=3
        )
    )
    weights = fields.String(
        validate=_is_weights,
        metadata=_told(
            "imagenet",
            "what the network begins with: imagenet, none, file:NAME, or version:N of the registry",
            pattern=r"^(imagenet|none|version:[1-9][0-9]{0,8}|file:[^./\\][^/\\]{0,254})$",
        ),
    )
    include_top = _flag(False, "start from ImageNet's 4096-4096 classifier layers; needs ImageNet weights")
    # The scans.
    classes = _whole(None, 2, 1000, "if given, the dataset must have this many class folders")
    window_center = _real(None, -2000, 5000, "centre of the CT window in Hounsfield units; null: the file's own window")
    window_width = _real(None, 1, 10000, "width of the CT window in Hounsfield units")
    test_size = _real(0.2, 0.05, 0.5, "share of the scans that only the evaluation sees")
    validation_size = _real(0.1, 0.05, 0.4, "share of the scans that choose epoch, temperature and threshold")
    folds = _whole(0, 0, 20, "0, or so many trainings more that test each scan once")
    balance = _word(
        *("none", "weights", "sampler"),
        told="rare classes count more in the loss (weights), or are drawn more often (sampler)",
    )
    augmentation = _flag_or(
        "randaugment",
        True,
        "true: rotate, mirror, shift, scale the training scans anew in each epoch; or RandAugment",
    )
    horizontal_flip = _flag(True, "mirror in the augmentation; off where left and right matter")
    # Learning.
    epochs = _whole(2, 1, 1000, "passes over the training scans with the backbone frozen")
    batch_size = _whole(32, 1, 1024, "scans whose gradient is computed at once")
    accumulate = _whole(1, 1, 256, "batches whose gradients make one step of the optimizer")
    optimizer = _word("sgd", "adamw", told="sgd with momentum, or adamw")
    learning_rate = _real(0.001, 0, 10, "of the optimizer, before the schedule", "(]")
    momentum = _real(0.9, 0, 1, "of SGD", "[)")
    weight_decay = _real(0.0, 0, 1, "of the optimizer; decoupled in adamw")
    schedule = _word(
        *("constant", "cosine", "step", "plateau"),
        told="how the learning rate falls: by cosine to 0, by gamma every step_epochs, or when stuck",
    )
    warmup_epochs = _whole(0, 0, 100, "epochs in which the learning rate rises to its value")
    step_epochs = _whole(10, 1, 1000, "of schedule step; epochs without gain, of plateau")
    gamma = _real(0.1, 0, 1, "factor of the schedules step and plateau", "()")
    clip_norm = _real(None, 0, None, "largest norm of all gradients together; null: any", "(]")
    label_smoothing = _real(0.0, 0, 1, "share of each label that is spread over all classes", "[)")
    standardize = _flag_or("auto", "auto", "features to mean 0, std 1; auto: when weights is none")
    fine_tune_epochs = _whole(0, 0, 1000, "epochs that follow with the top blocks unfrozen")
    fine_tune_blocks = _whole(1, 1, 13, "how many of the backbone's top blocks these unfreeze")
    fine_tune_learning_rate = _real(None, 0, 10, "of these epochs; null: a tenth of learning_rate", "(]")
    monitor = _word(
        *("val_loss", "val_accuracy", "val_f1"),
        told="what decides the best epoch, early stopping and the schedule plateau",
    )
    keep = _word("best", "last", told="which epoch's network is evaluated and saved")
    patience = _whole(0, 0, 1000, "stop after so many epochs without gain; 0: never")
    # The machine.
    precision = _word("auto", "fp32", "bf16", told="auto: bf16 where the device multiplies it")
    devices = _whole(1, 1, 64, "GPUs of this machine (without any: processes) that share a batch")
    seed = _whole(0, 0, 2**31 - 1, "of split, head, shuffling, dropout and augmentation")

    def handle_error(self, error: ma.ValidationError, data: Any, **kwargs: Any) -> None:
        """A name that a parameter had before leads to the one that it has now."""
        for old, new in RENAMED.items():
            if old in error.messages_dict:
                error.messages_dict[old] = [f"It is called {new} now."]

    @ma.validates_schema
    def _agree(self, data: dict[str, Any], **kwargs: Any) -> None:
        """The rules that `ml.spec.image` has for fields which are each right."""
        defaults = {name: field.metadata["default"] for name, field in self.fields.items()}
        found: dict[str, list[str]] = {}
        for field, complaint in _contradictions({**defaults, **data}):
            found.setdefault(field, []).append(complaint)
        if found:
            raise ma.ValidationError(found)  # type: ignore[arg-type]


def _contradictions(params: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if params["include_top"] and params["weights"] != "imagenet":
        yield "include_top", "Only ImageNet's network has a classifier to keep; set weights: imagenet."
    if params["include_top"] and (params["network"], _head(params)) != ("vgg16", "vgg"):
        yield "include_top", "Only vgg16 with head: vgg has hidden layers to keep; leave it false."
    if (params["window_center"] is None) != (params["window_width"] is None):
        missing = "window_width" if params["window_width"] is None else "window_center"
        yield missing, "A CT window has a centre and a width; give both or neither."
    if params["fine_tune_blocks"] > (most := BLOCKS.get(params["network"], 5)):
        yield "fine_tune_blocks", f"{params['network']} has {most} blocks."
    if params["folds"] == 1:
        yield "folds", "Cross-validation needs 2 or more; 0 turns it off."
    if params["test_size"] + params["validation_size"] > 0.7:
        yield "validation_size", "With test_size it leaves less than 0.3 of the scans to learn from; make one smaller."
    yield from _wrong_size(params["network"], *params["image_size"][:2])


def _head(params: dict[str, Any]) -> str:
    if params["head"] != "auto":
        return str(params["head"])
    return "vgg" if params["network"] == "vgg16" else "gap"


def _wrong_size(network: str, height: int, width: int) -> Iterator[tuple[str, str]]:
    fixed, least = FIXED_SIDE.get(network), LEAST_SIDE.get(network, 32)
    if fixed and (height, width) != (fixed, fixed):
        yield "image_size", f"{network} takes [{fixed}, {fixed}, 3] only."
    if min(height, width) < least:
        yield "image_size", f"{network} needs at least {least} pixels a side."
