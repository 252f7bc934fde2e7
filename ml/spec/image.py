"""The image pipeline's parameters, declared once: params.yaml, `python -m ml train`, the API's schema and OpenAPI, the
worker's check and the table in docs/api.md are made from `Params`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict

from ml.spec import operating_point, positive_class
from ml.spec.operating_point import OperateAt

NetworkName = Literal["vgg16", "resnet18", "resnet50", "inception_v3", "efficientnet_b0", "vit_b_16"]
NETWORKS: tuple[str, ...] = get_args(NetworkName)
Head = Literal["vgg", "gap"]
HeadName = Literal["auto", "vgg", "gap"]
LEAST_SIDE = {"inception_v3": 75}
"""Pixels below which a network's maps shrink to nothing; 32 for all others."""
BLOCKS = {"efficientnet_b0": 9, "vit_b_16": 13}
"""What fine-tuning can unfreeze, bottom to top; 5 in all others (see ml.image.networks.architectures)."""
FIXED_SIDE = {"vit_b_16": 224}
"""A vision transformer has one position embedding for each patch of a picture of one size."""


PLAIN_FILE_NAMES: JsonDict = {
    "pattern": r"^(imagenet|none|version:[1-9][0-9]{0,8}|file:[^./\\][^/\\]{0,254})$",
    "refused": r"\.\.|[\x00-\x1f]",
    "message": "Must be imagenet, none, version:N, or file:NAME with a plain name: no slash, no .., no dot in front.",
}
"""What the API accepts as `weights`: a client names a file in the workers' folder, and must not reach out of it. The
command line runs with its user's own rights, and takes any path."""


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def head_kind(network: str, head: HeadName) -> Head:
    """The head that `auto` means for a network."""
    if head != "auto":
        return head
    return "vgg" if network == "vgg16" else "gap"


Side = Annotated[int, Field(ge=32, le=1024)]
ImageSize = Annotated[tuple[Side, Side, Literal[3]], BeforeValidator(_as_tuple)]
ClassName = Annotated[str, Field(min_length=1, max_length=100)]
ClassNames = Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=999), BeforeValidator(_as_tuple)]


class Params(BaseModel):
    """Everything that shapes a training. Unknown keys and ill-typed values are errors that name the field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # The network.
    network: NetworkName = Field("vgg16", description="architecture, by torchvision's name")
    head: HeadName = Field(
        "auto", description="vgg: two hidden layers of 4096; gap: global average and one layer; auto: vgg for vgg16"
    )
    dropout: float = Field(0.5, ge=0, lt=1, description="in the head, while learning")
    image_size: ImageSize = Field(
        (224, 224, 3),
        description="height, width (pixels) and channels of the network's input",
        json_schema_extra={"api": {"message": "Must be [height, width, 3], with 32 to 1024 pixels each way."}},
    )
    weights: str = Field(
        "imagenet",
        pattern=r"^(imagenet|none|file:.{1,400}|version:[1-9][0-9]{0,8})$",
        description="what the network begins with: imagenet, none, file:NAME, or version:N of the registry",
        examples=["imagenet", "none", "file:NAME", "version:N"],
        json_schema_extra={"api": PLAIN_FILE_NAMES},
    )
    include_top: bool = Field(
        False, description="start from ImageNet's 4096-4096 classifier layers; needs ImageNet weights"
    )
    # The scans.
    classes: int | None = Field(
        None, ge=2, le=1000, description="if given, the dataset must have this many class folders"
    )
    positive: ClassName | ClassNames | None = Field(
        None,
        description="the class, or classes, of the finding; null: of two, the one beside normal, healthy, no_… or such",
        examples=["NAME", "[NAME, NAME]"],
        json_schema_extra={"api": {"message": "Must be the name of a class, a list of such names, or null."}},
    )
    window_center: float | None = Field(
        None, ge=-2000, le=5000, description="centre of the CT window in Hounsfield units; null: the file's own window"
    )
    window_width: float | None = Field(None, ge=1, le=10000, description="width of the CT window in Hounsfield units")
    spacing_mm: float | None = Field(
        None, ge=0.05, le=10, description="mm of a pixel of the input, where files say theirs; null: whole pictures"
    )
    test_size: float = Field(0.2, ge=0.05, le=0.5, description="share of the scans that only the evaluation sees")
    validation_size: float = Field(
        0.1, ge=0.05, le=0.4, description="share of the scans that choose epoch, temperature and threshold"
    )
    split: Literal["patients", "folders"] = Field(
        "patients", description="sides drawn anew by patients, or those of the folders train, validation and test"
    )
    folds: int = Field(
        0, ge=0, le=20, description="0, or so many trainings more; each scan but the test's is tested by one of them"
    )
    ensemble: Literal["none", "folds"] = Field(
        "none", description="what predicts: the network, or the mean of the folds' heads (head: gap) on its backbone"
    )
    balance: Literal["none", "weights", "sampler"] = Field(
        "none", description="rare classes count more in the loss (weights), or are drawn more often (sampler)"
    )
    augmentation: bool | Literal["randaugment"] = Field(
        True, description="true: rotate, mirror, shift, scale the training scans anew in each epoch; or RandAugment"
    )
    horizontal_flip: bool = Field(True, description="mirror in the augmentation; off where left and right matter")
    # Learning.
    epochs: int = Field(2, ge=1, le=1000, description="passes over the training scans with the backbone frozen")
    batch_size: int = Field(32, ge=1, le=1024, description="scans whose gradient is computed at once")
    accumulate: int = Field(1, ge=1, le=256, description="batches whose gradients make one step of the optimizer")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd with momentum, or adamw")
    learning_rate: float = Field(0.001, gt=0, le=10, description="of the optimizer, before the schedule")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(0.0, ge=0, le=1, description="of the optimizer; decoupled in adamw")
    schedule: Literal["constant", "cosine", "step", "plateau"] = Field(
        "constant", description="how the learning rate falls: by cosine to 0, by gamma every step_epochs, or when stuck"
    )
    warmup_epochs: int = Field(0, ge=0, le=100, description="epochs in which the learning rate rises to its value")
    step_epochs: int = Field(10, ge=1, le=1000, description="of schedule step; epochs without gain, of plateau")
    gamma: float = Field(0.1, gt=0, lt=1, description="factor of the schedules step and plateau")
    clip_norm: float | None = Field(None, gt=0, description="largest norm of all gradients together; null: any")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each label that is spread over all classes")
    standardize: Literal["auto"] | bool = Field(
        "auto", description="features to mean 0, one spread; auto: of untrained weights, or large below a new head"
    )
    fine_tune_epochs: int = Field(0, ge=0, le=1000, description="epochs that follow with the top blocks unfrozen")
    fine_tune_blocks: int = Field(1, ge=1, le=13, description="how many of the backbone's top blocks these unfreeze")
    fine_tune_learning_rate: float | None = Field(
        None, gt=0, le=10, description="of these epochs; null: a tenth of learning_rate"
    )
    monitor: Literal["val_loss", "val_accuracy", "val_f1"] = Field(
        "val_loss", description="what decides the best epoch, early stopping and the schedule plateau"
    )
    keep: Literal["best", "last"] = Field("best", description="which epoch's network is evaluated and saved")
    patience: int = Field(0, ge=0, le=1000, description="stop after so many epochs without gain; 0: never")
    operate_at: OperateAt = Field(
        "f1",
        description="what chooses the threshold on validation scans: the best F1, a least figure, or its own number",
        examples=["f1", "{sensitivity: 0.95}", "{specificity: 0.9}", "{threshold: 0.3}"],
        json_schema_extra={"api": {"message": operating_point.EXPECTED}},
    )
    # The machine.
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device multiplies it")
    devices: int = Field(1, ge=1, le=64, description="GPUs of this machine (without any: processes) that share a batch")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of split, head, shuffling, dropout and augmentation")

    @property
    def asked_positive(self) -> tuple[str, ...] | None:
        """The classes that `positive` names."""
        return (self.positive,) if isinstance(self.positive, str) else self.positive

    @property
    def standardizes(self) -> bool | None:
        """Whether the features are standardized with the training set's mean and std; None: their scale decides."""
        if self.standardize != "auto":
            return self.standardize
        return True if self.weights == "none" else None

    @property
    def window(self) -> tuple[float, float] | None:
        """Centre and width of the CT window, in Hounsfield units."""
        if self.window_center is None or self.window_width is None:
            return None
        return self.window_center, self.window_width

    @property
    def head_kind(self) -> Head:
        """The head that `auto` means here."""
        return head_kind(self.network, self.head)

    @property
    def tuning_rate(self) -> float:
        """The learning rate while blocks are unfrozen."""
        return self.fine_tune_learning_rate or self.learning_rate / 10

    @property
    def total_epochs(self) -> int:
        """Epochs of both phases."""
        return self.epochs + self.fine_tune_epochs

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """(field, what is wrong and what to do) for fields that are each right, but not together."""
        if self.include_top and self.weights != "imagenet":
            yield "include_top", "Only ImageNet's network has a classifier to keep; set weights: imagenet."
        if self.include_top and (self.network, self.head_kind) != ("vgg16", "vgg"):
            yield "include_top", "Only vgg16 with head: vgg has hidden layers to keep; leave it false."
        if (self.window_center is None) != (self.window_width is None):
            missing = "window_width" if self.window_width is None else "window_center"
            yield missing, "A CT window has a centre and a width; give both or neither."
        if self.fine_tune_blocks > (most := BLOCKS.get(self.network, 5)):
            yield "fine_tune_blocks", f"{self.network} has {most} blocks."
        if self.folds == 1:
            yield "folds", "Cross-validation needs 2 or more; 0 turns it off."
        if self.folds and self.split == "folders":
            yield "folds", "Cross-validation draws its own sides; set folds: 0, or split: patients."
        yield from self._wrong_ensemble()
        if self.test_size + self.validation_size > 0.7:
            left = "With test_size it leaves less than 0.3 of the scans to learn from; make one smaller."
            yield "validation_size", left
        yield from self._wrong_size()

    def _wrong_ensemble(self) -> Iterator[tuple[str, str]]:
        if self.ensemble == "none":
            return
        if not self.folds:
            yield "ensemble", "There are no folds to take the heads of; set folds to 2 or more, or ensemble: none."
        if self.head_kind != "gap":
            yield "ensemble", "Heads with hidden layers have no mean, and five of them are 2.4 GB; set head: gap."
        if self.fine_tune_epochs:
            yield "ensemble", "Heads of folds that fine-tune stand on different backbones; set fine_tune_epochs: 0."

    def misfits(self, classes: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(field, what is wrong and what to do) for fields that do not fit a dataset's classes."""
        try:
            positive = positive_class.resolve(classes, self.asked_positive)
        except positive_class.Unclear as error:
            yield "positive", str(error)
            return
        if not positive and self.operate_at != operating_point.F1:
            yield "operate_at", f"No class is positive: set positive to one or several of {', '.join(classes)}."

    def _wrong_size(self) -> Iterator[tuple[str, str]]:
        height, width = self.image_size[:2]
        fixed, least = FIXED_SIDE.get(self.network), LEAST_SIDE.get(self.network, 32)
        if fixed and (height, width) != (fixed, fixed):
            yield "image_size", f"{self.network} takes [{fixed}, {fixed}, 3] only."
        if min(height, width) < least:
            yield "image_size", f"{self.network} needs at least {least} pixels a side."
