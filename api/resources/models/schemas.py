"""Schemas of model versions, their promotions and comparisons."""

from collections.abc import Callable
from typing import Any

import marshmallow as ma
from marshmallow import fields, validate

from api.http.context import services
from api.http.fields import Boolean, ModelChoice, Time, one_of
from api.http.paging import NumberedQuery, PageSchema
from api.http.pipeline_fields import PipelineName, TaskName
from jobs.models.cards import mlflow_model_name
from jobs.tables import Json, ModelVersion, PromotionMethod
from ml.spec.pipeline import DEFAULT_TASK, IMAGE
from ml.spec.registry import spec_of


class Part(fields.Nested):
    """A nested object that is read out of the whole row: two fields may not share an attribute otherwise."""

    def __init__(self, schema: type[ma.Schema], read: Callable[[ModelVersion], Json | None]) -> None:
        super().__init__(schema, allow_none=True)
        self._read = read

    def get_value(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """What `read` finds."""
        return self._read(obj)


class GateSchema(ma.Schema):
    """The promotion gate's verdict."""

    promoted = fields.Boolean()
    reasons = fields.List(fields.String())


class TransformSchema(ma.Schema):
    """How a scan becomes the network's input: resized to height × width (pixels), a CT decoded in the window."""

    height = fields.Integer(allow_none=True)
    width = fields.Integer(allow_none=True)
    window = fields.List(
        fields.Float(),
        allow_none=True,
        metadata={"description": "Centre and width in Hounsfield units; null: those that the file names."},
    )


class CalibrationSchema(ma.Schema):
    """How outputs become probabilities and labels: chosen on validation scans, judged on test scans."""

    temperature = fields.Float(allow_none=True)
    threshold = fields.Float(allow_none=True, metadata={"description": "Of the positive class, where there are two."})
    positive = fields.String(allow_none=True)
    ece = fields.Float(allow_none=True, metadata={"description": "Expected calibration error."})
    ece_chance = fields.Float(allow_none=True, metadata={"description": "What chance alone would show."})


class SplitSchema(ma.Schema):
    """How many scans it learnt from, was chosen by, and was tested on."""

    train = fields.Integer()
    validation = fields.Integer()
    test = fields.Integer()


class ModelSchema(ma.Schema):
    """A model version: what a training made, and all that it was made of."""

    version = fields.String()
    pipeline = fields.String()
    task = fields.String(metadata={"description": "Each pipeline and task has a champion of its own."})
    champion = fields.Boolean()
    job_id = fields.UUID()
    dataset_id = fields.UUID(allow_none=True)
    dataset_digest = fields.String(allow_none=True)
    weights_sha256 = fields.String()
    classes = fields.List(fields.String())
    network = fields.Function(lambda row: declared(row).get("network"), metadata={"type": "string"})
    head = fields.Function(lambda row: declared(row).get("head"), metadata={"type": "string"})
    transform = Part(TransformSchema, lambda row: declared(row).get("transform"))
    calibration = Part(CalibrationSchema, lambda row: row.metrics)
    split = Part(SplitSchema, lambda row: row.metrics.get("counts"))
    params = fields.Dict()
    metrics = fields.Dict()
    gate = fields.Nested(GateSchema)
    code_revision = fields.String(allow_none=True)
    environment = fields.Dict()
    mlflow_run_id = fields.String(allow_none=True)
    mlflow_version = fields.String(allow_none=True, metadata={"description": "Its number in MLflow's registry."})
    created_at = Time()
    promoted_at = Time(allow_none=True)
    links = fields.Function(lambda row: links(row), metadata={"type": "object"})


def declared(row: ModelVersion) -> dict[str, Any]:
    """What the version's pipeline says of its parameters."""
    return spec_of(row.pipeline).card.details(row.params)


def links(row: ModelVersion) -> dict[str, str]:
    """A version's addresses."""
    own = f"/models/{row.version}"
    found = {"self": own, "job": f"/jobs/{row.job_id}"}
    found |= {name: f"{own}/{name}" for name in ("card", "weights", "drift")}
    if not row.champion and (row.pipeline, row.task) == (IMAGE, DEFAULT_TASK):
        found["compare"] = f"/models/compare?a=champion&b={row.version}"
    mlflow = services().settings.mlflow_public_url.rstrip("/")
    if mlflow and row.mlflow_version:
        found["mlflow"] = f"{mlflow}/#/models/{mlflow_model_name(row.tenant_id)}/versions/{row.mlflow_version}"
    elif mlflow and row.mlflow_run_id:
        found["mlflow"] = f"{mlflow}/#/runs/{row.mlflow_run_id}"
    return found


class ModelsPage(PageSchema):
    """Model versions, newest first."""

    data = fields.List(fields.Nested(ModelSchema), required=True)


class PromotionSchema(ma.Schema):
    """A change of the champion: what to, from what, how, why, and by whom."""

    id = fields.Integer()
    version = fields.String()
    pipeline = fields.String()
    task = fields.String()
    replaced = fields.String(allow_none=True, metadata={"description": "The champion before; null: there was none."})
    how = fields.String(
        validate=one_of(PromotionMethod),
        metadata={
            "description": "gate: at its training's end; request: somebody asked, and the gate agreed; force: against "
            "the gate, or past it; rollback: the champion before came back."
        },
    )
    reason = fields.String(allow_none=True, metadata={"description": "In the words of whoever asked."})
    verdict = fields.Nested(GateSchema, allow_none=True, metadata={"description": "What the gate said then."})
    key_id = fields.UUID(attribute="by_key", allow_none=True, metadata={"description": "Whose request it was."})
    at = Time()
    links = fields.Function(lambda row: {"model": f"/models/{row.version}"}, metadata={"type": "object"})


class PromotionsPage(PageSchema):
    """Changes of the champion, newest first."""

    data = fields.List(fields.Nested(PromotionSchema), required=True)


class SideSchema(ModelSchema):
    """One of two versions, in short."""

    class Meta:
        fields = ("version", "champion", "created_at", "network", "head", "classes", "dataset_digest", "gate", "links")


class ComparisonSchema(ma.Schema):
    """Two versions beside each other: figures on the same test scans, and what they were made of."""

    a = fields.Nested(SideSchema)
    b = fields.Nested(SideSchema)
    scans = fields.Integer(allow_none=True, metadata={"description": "Test scans that both were scored on."})
    test_digest = fields.String(allow_none=True)
    metrics = fields.Dict(
        keys=fields.String(),
        values=fields.List(fields.Float(allow_none=True)),
        metadata={"description": "Figures as [a's, b's]; empty without common test scans."},
    )
    differences = fields.Dict(metadata={"description": "What differs, as [a's, b's]."})
    note = fields.String(metadata={"description": "What the figures do and do not tell."})


class Reason(fields.String):
    """Why somebody changes the champion; it is kept with the change."""

    def __init__(self) -> None:
        checks = [validate.Length(max=1000), validate.Regexp(r"\s*\S", error="Must not be blank.")]
        super().__init__(validate=checks, load_default=None, allow_none=True)


class PromoteRequest(ma.Schema):
    """A new champion; with `force` also against the gate, and then with a reason."""

    force = Boolean(load_default=False)
    reason = Reason()

    @ma.validates_schema
    def _force_has_reason(self, data: dict[str, Any], **kwargs: Any) -> None:
        if data["force"] and data["reason"] is None:
            raise ma.ValidationError("Say why the gate is passed over.", "reason")


class RollbackRequest(ma.Schema):
    """The champion before, back again: of which pipeline and task."""

    pipeline = PipelineName(load_default=IMAGE)
    task = TaskName(load_default=DEFAULT_TASK)
    reason = Reason()


class ModelsQuery(NumberedQuery):
    """Which versions to list."""

    pipeline = PipelineName(load_default=None)
    task = TaskName(load_default=None)


class ChampionQuery(ma.Schema):
    """Whose champion is meant; a version named by its number must be of these."""

    pipeline = PipelineName(load_default=None)
    task = TaskName(load_default=None)


class CompareQuery(ma.Schema):
    """Which two versions to compare."""

    a = ModelChoice(required=True)
    b = ModelChoice(required=True)
