"""Schemas of model versions, their promotions and comparisons."""

from typing import Any

import marshmallow as ma
from marshmallow import fields, validate

from api.http.context import services
from api.http.fields import Answer, Boolean, ModelChoice, Part, Time, links_schema, one_of
from api.http.paging import NumberedQuery, PageSchema
from api.http.pipelines.fields import PipelineName, TaskName
from api.http.versioning import address
from jobs.models.cards import mlflow_model_name
from jobs.tables import Json, ModelVersion, PromotionMethod
from ml.spec import operating_point
from ml.spec.pipeline import DEFAULT_TASK, IMAGE
from ml.spec.positive_class import of_metrics
from ml.spec.registry import spec_of


class ReportedSchema(ma.Schema):
    """The leading figure without what selection on one test set adds to it."""

    figure = fields.String()
    value = fields.Float(
        allow_none=True,
        metadata={"description": "The champion's before it, unless its own was better beyond chance."},
    )
    choices = fields.Integer(metadata={"description": "How often these test scans have chosen, this time included."})
    test_digest = fields.String(allow_none=True)


class DriftedSchema(ma.Schema):
    """A champion's latest day with predictions (UTC), if its figures have drifted; see GET /models/{version}/drift."""

    day = fields.String(metadata={"format": "date"})
    figures = fields.List(fields.String())


class GateSchema(ma.Schema):
    """The promotion gate's verdict."""

    promoted = fields.Boolean()
    reasons = fields.List(fields.String())
    reported = fields.Nested(ReportedSchema, metadata={"description": "Absent for versions of earlier releases."})


class TransformSchema(ma.Schema):
    """Transform of a scan to the network's input: size in pixels, CT window, spacing."""

    height = fields.Integer(allow_none=True)
    width = fields.Integer(allow_none=True)
    window = fields.List(
        fields.Float(),
        allow_none=True,
        metadata={"description": "Centre and width of the window; null: those in the file."},
    )
    spacing_mm = fields.Float(
        allow_none=True,
        metadata={"description": "Spacing of the input in mm, where files say theirs; null: whole scans are resized."},
    )


class CalibrationSchema(ma.Schema):
    """Temperature and threshold, chosen on validation scans; calibration error on test scans."""

    temperature = fields.Float(allow_none=True)
    threshold = fields.Float(
        allow_none=True, metadata={"description": "Decision threshold of the positive class, if there are two classes."}
    )
    positive = fields.Function(
        lambda metrics: only_positive(metrics),
        metadata={"type": ["string", "null"], "description": "The positive class; null if there are several, or none."},
    )
    positives = fields.Function(
        lambda metrics: of_metrics(metrics) or [],
        metadata={"type": "array", "items": {"type": "string"}, "description": "The positive classes."},
    )
    ece = fields.Float(allow_none=True, metadata={"description": "Expected calibration error."})
    ece_chance = fields.Float(
        allow_none=True, metadata={"description": "Calibration error that chance alone would cause."}
    )


class ShareSchema(ma.Schema):
    """A share of scans; no interval where the groups (patients) are too few."""

    value = fields.Float(allow_none=True)
    low = fields.Float(allow_none=True, metadata={"description": "Lower end of its 95 % interval."})
    high = fields.Float(allow_none=True)
    groups = fields.Integer()


class OperatingPointSchema(ma.Schema):
    """The threshold in force, the rule that chose it, and what it gave on the scans that it was chosen on."""

    rule = fields.String(metadata={"enum": ["f1", "sensitivity", "specificity", "threshold"]})
    wanted = fields.Float(allow_none=True, metadata={"description": "The rule's number."})
    threshold = fields.Float()
    sensitivity = fields.Nested(ShareSchema)
    specificity = fields.Nested(ShareSchema)
    scans = fields.Integer()
    chosen_on = fields.String()
    best_f1 = fields.Float(metadata={"description": "The threshold that the rule f1 would choose."})
    changes = fields.Integer(dump_default=0, metadata={"description": "How often it was set anew."})


class SplitSchema(ma.Schema):
    """Number of scans in each split."""

    train = fields.Integer()
    validation = fields.Integer()
    test = fields.Integer()


ModelLinks = links_schema("ModelLinks", ("self", "job", "card", "weights", "drift"), ("compare", "mlflow"))
PromotionLinks = links_schema("PromotionLinks", ("model",))


class ModelSchema(Answer):
    """A model version, with its data, parameters, code and environment."""

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
    transform = Part(TransformSchema, lambda row: declared(row).get("transform"), allow_none=True)
    calibration = Part(CalibrationSchema, lambda row: row.metrics, allow_none=True)
    operating_point = Part(OperatingPointSchema, lambda row: row.metrics.get("operating_point"), allow_none=True)
    split = Part(SplitSchema, lambda row: row.metrics.get("counts"), allow_none=True)
    params = fields.Dict()
    metrics = fields.Dict()
    gate = fields.Nested(GateSchema)
    drift = Part(
        DriftedSchema,
        lambda row: row.drift if row.champion else None,
        allow_none=True,
        metadata={"description": "Of a champion whose latest predictions have drifted. Else null."},
    )
    code_revision = fields.String(allow_none=True)
    environment = fields.Dict()
    mlflow_run_id = fields.String(allow_none=True)
    mlflow_version = fields.String(allow_none=True, metadata={"description": "Its version in MLflow's registry."})
    created_at = Time()
    promoted_at = Time(allow_none=True)
    links = Part(ModelLinks, lambda row: links(row))


def only_positive(metrics: Json) -> str | None:
    """The positive class, where there is just one."""
    named = of_metrics(metrics) or []
    return named[0] if len(named) == 1 else None


def declared(row: ModelVersion) -> dict[str, Any]:
    """What the version's pipeline says of its parameters."""
    return spec_of(row.pipeline).card.details(row.params)


def links(row: ModelVersion) -> dict[str, str]:
    """URLs of a version."""
    own = address(f"/models/{row.version}")
    found = {"self": own, "job": address(f"/jobs/{row.job_id}")}
    found |= {name: f"{own}/{name}" for name in ("card", "weights", "drift")}
    if not row.champion and (row.pipeline, row.task) == (IMAGE, DEFAULT_TASK):
        found["compare"] = address(f"/models/compare?a=champion&b={row.version}")
    mlflow = services().settings.mlflow_public_url.rstrip("/")
    if mlflow and row.mlflow_version:
        found["mlflow"] = f"{mlflow}/#/models/{mlflow_model_name(row.tenant_id)}/versions/{row.mlflow_version}"
    elif mlflow and row.mlflow_run_id:
        found["mlflow"] = f"{mlflow}/#/runs/{row.mlflow_run_id}"
    return found


class ModelsPage(PageSchema):
    """Model versions, newest first."""

    data = fields.List(fields.Nested(ModelSchema), required=True)


class PromotionSchema(Answer):
    """A change of the champion: new and previous version, how, why, and by which key."""

    id = fields.Integer()
    version = fields.String()
    pipeline = fields.String()
    task = fields.String()
    replaced = fields.String(allow_none=True, metadata={"description": "The previous champion; null: there was none."})
    how = fields.String(
        validate=one_of(PromotionMethod),
        metadata={
            "description": "gate: at the end of its training; request: on request, with the gate's consent; force: on "
            "request, regardless of the gate; rollback: the previous champion was restored."
        },
    )
    reason = fields.String(allow_none=True, metadata={"description": "Reason given in the request."})
    verdict = fields.Nested(GateSchema, allow_none=True, metadata={"description": "The gate's verdict at that time."})
    key_id = fields.UUID(attribute="by_key", allow_none=True, metadata={"description": "Key of the request."})
    at = Time()
    links = Part(PromotionLinks, lambda row: {"model": address(f"/models/{row.version}")})


class PromotionsPage(PageSchema):
    """Changes of the champion, newest first."""

    data = fields.List(fields.Nested(PromotionSchema), required=True)


class SideSchema(ModelSchema):
    """One of two compared versions."""

    class Meta:
        fields = ("version", "champion", "created_at", "network", "head", "classes", "dataset_digest", "gate", "links")


class DifferenceSchema(ma.Schema):
    """A figure of two versions on the same patients, and the 95 % interval of a's less b's."""

    a = fields.Float(attribute="ours")
    b = fields.Float(attribute="theirs")
    difference = fields.Float()
    low = fields.Float(allow_none=True)
    high = fields.Float(allow_none=True)


class TestSchema(ma.Schema):
    """A statistic, and its p if both versions are equally good."""

    statistic = fields.Float()
    p = fields.Float()


class PairedSchema(ma.Schema):
    """Paired tests by patient, from the training that scored one version beside the other."""

    scans = fields.Integer()
    groups = fields.Integer(metadata={"description": "Patients, or groups of scans that belong together."})
    differences = fields.Dict(keys=fields.String(), values=fields.Nested(DifferenceSchema))
    mcnemar = fields.Nested(TestSchema)
    delong = fields.Nested(TestSchema, allow_none=True)


class ComparisonSchema(ma.Schema):
    """Comparison of two versions: figures on common test scans, and differences in data and parameters."""

    a = fields.Nested(SideSchema)
    b = fields.Nested(SideSchema)
    scans = fields.Integer(allow_none=True, metadata={"description": "Number of test scans that both were scored on."})
    test_digest = fields.String(allow_none=True)
    metrics = fields.Dict(
        keys=fields.String(),
        values=fields.List(fields.Float(allow_none=True)),
        metadata={"description": "Figures as [a, b]; empty without common test scans."},
    )
    paired = fields.Nested(PairedSchema, allow_none=True)
    differences = fields.Dict(metadata={"description": "Differing fields as [a, b]."})
    note = fields.String(metadata={"description": "How to read the figures."})


class Reason(fields.String):
    """Reason for a change of the champion; stored with it."""

    def __init__(self, required: bool = False) -> None:
        checks = [validate.Length(max=1000), validate.Regexp(r"\s*\S", error="Must not be blank.")]
        if required:
            super().__init__(validate=checks, required=True)
        else:
            super().__init__(validate=checks, load_default=None, allow_none=True)


def _is_rule(value: Any) -> None:
    try:
        operating_point.parse(value)
    except ValueError as error:
        raise ma.ValidationError(str(error)) from None


class PromoteRequest(ma.Schema):
    """Promotion to champion; with `force` regardless of the gate, which needs a reason."""

    force = Boolean(load_default=False)
    reason = Reason()

    @ma.validates_schema
    def _force_has_reason(self, data: dict[str, Any], **kwargs: Any) -> None:
        if data["force"] and data["reason"] is None:
            raise ma.ValidationError("Say why the gate is passed over.", "reason")


class PatchRequest(ma.Schema):
    """What to change of a version: its operating point, with the reason."""

    operate_at = fields.Raw(required=True, validate=_is_rule, metadata=operating_point.json_schema())
    reason = Reason(required=True)


class RollbackRequest(ma.Schema):
    """Restoration of the previous champion of a pipeline and task."""

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
    """The two versions to compare."""

    a = ModelChoice(required=True)
    b = ModelChoice(required=True)
