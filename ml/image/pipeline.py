"""The image pipeline, as workers and their children use it (`ml.pipelines.Pipeline`).

Everything is imported inside the methods: a worker's parent process never loads torch, and a process that only checks
datasets loads no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml.pipelines import (
    DatasetCheck,
    Disposition,
    Explainer,
    Explanation,
    Item,
    Pipeline,
    Prediction,
    Predictor,
    Report,
    SharedFile,
    Source,
    TrainingJob,
)
from ml.runtime.events import Emit
from ml.spec.pipeline import BLANK_NOTE, HEATMAP, OVERLAY

if TYPE_CHECKING:
    from ml.image.serving.gradcam import Explainer as GradCam
    from ml.runtime.config import PipelineConfig


class ImagePipeline(Pipeline):
    """Networks on pictures in one folder a class."""

    def check(self, archive: Path, folder: Path, report: Report) -> DatasetCheck:
        """See `ml.image.dataset.scans.check_dataset`."""
        from ml.image.dataset.scans import check_dataset
        from ml.runtime.archives import extract_zip
        from ml.runtime.errors import ArchiveError

        try:
            warnings = extract_zip(archive, folder)
        except ArchiveError as error:
            return DatasetCheck({}, "", (str(error),))
        found = check_dataset(folder, on_progress=report)
        inspection = {**asdict(found.inspection), "passed_over": list(found.passed_over)}
        return DatasetCheck(found.classes, found.digest, found.problems, (*warnings, *found.warnings), inspection)

    def readable_weights(self, folder: Path) -> list[str]:
        """See `ml.image.networks.weights.readable`."""
        from ml.image.networks.weights import readable

        return readable(folder)

    def train(self, job: TrainingJob, emit: Emit) -> None:
        """All four stages (see `ml.image.stages`)."""
        from ml.image.stages import runner
        from ml.image.stages.run import RunEnvironment
        from ml.runtime.cache import Cache
        from ml.runtime.config import CheckpointPlan, parse_params

        environment = RunEnvironment(
            weights_dir=job.weights_dir,
            base_weights=job.base_model,
            cache=Cache(job.cache, job.cache_bytes, tuple(job.cache_owners)) if job.cache else None,
            checkpoints=CheckpointPlan(job.checkpoints, job.checkpoint_seconds, job.resume),
            revision=job.revision,
            champion=job.champion,
            champion_threshold=job.champion_threshold,
            champion_pooling=job.champion_pooling,
            locked_test=job.test_archive,
            titles=job.titles,
        )
        runner.run_all(_config(job), parse_params(dict(job.params)), emit, environment)

    def item(self, id_: str, source: Source, keep: bool = False) -> Item:
        """A scan; one that is kept is read and decoded once for all who look at it."""
        from ml.image.serving.predictor import CachedScan, ScanInput

        return (CachedScan if keep else ScanInput)(id_, source)

    def frame(self, id_: str, source: SharedFile, frame: int) -> Item:
        """A frame of a DICOM file, or a slice of a NIfTI volume."""
        from ml.image.serving.predictor import FrameInput

        return FrameInput(id_, source, frame)

    def open(self, model: Path, options: Mapping[str, Any]) -> Predictor:
        """`options`: `precision`, see `ml.image.engines.admission`."""
        from ml.image.serving.predictor import Predictor as ImagePredictor

        return ImagePredictor.load(model, options.get("precision", "auto"))

    def explainer(self, model: Path, options: Mapping[str, Any]) -> Explainer:
        """Grad-CAM; `options` as in `open`."""
        from ml.image.serving.gradcam import Explainer as GradCam

        return _Overlays(GradCam.load(model, options.get("precision", "auto")))

    def dispose(
        self, prediction: Prediction, low: float, high: float, positive: Sequence[str] | None = None
    ) -> Disposition | None:
        """See `ml.image.serving.disposition`."""
        from ml.image.serving.disposition import disposition_of, of_file

        found = disposition_of(
            prediction.probabilities, prediction.ood_score, low, high, prediction.ood_reason, prediction.label, positive
        )
        return of_file(found, prediction.output)


def _config(job: TrainingJob) -> PipelineConfig:
    """The places of config/config.yaml below the job's folder."""
    from ml.runtime.config import PipelineConfig

    config = PipelineConfig.below(job.folder / "artifacts")
    scans = {"source_url": None, "local_data_file": job.archive or job.folder / "data.zip"}
    return config.model_copy(update={"data_ingestion": config.data_ingestion.model_copy(update=scans)})


class _Overlays:
    """Grad-CAM's answers as files: an overlay, a heatmap, and a note where the heatmap is empty."""

    def __init__(self, explainer: GradCam) -> None:
        self._explainer = explainer
        self.classes = explainer.classes

    def explanations(self, item: Any, label: str, every_class: bool) -> Iterator[Explanation]:
        """See `ml.pipelines.Explainer`."""
        made = self._explainer.each_class(item, label) if every_class else self._explainer.explain([item], label)
        for each in made:
            if each.overlay is None:
                yield Explanation(each.label, {})
                continue
            files = {OVERLAY: each.overlay, HEATMAP: each.heatmap_png()}
            if each.is_blank:
                text = f"Nothing in this scan speaks for {each.label}: the heatmap is 0 everywhere.\n"
                files[BLANK_NOTE] = text.encode()
            yield Explanation(each.label, files)
