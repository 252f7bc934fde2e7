"""All settings: each with its default, its unit and one line of help. Read from the environment, `RENALQ_…`.

`Settings()` reads the environment anew; a process does so once, at its start, and hands the object on. No other module
of ours reads `os.environ` for a setting.
"""

import math
from pathlib import Path

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.addresses import Host, parse_hosts

GIB = 1024**3
MIB = 1024**2


class Settings(BaseSettings):
    """The settings of every process of a stack. `docs/settings.md` lists them; a test keeps the list whole."""

    model_config = SettingsConfigDict(env_prefix="RENALQ_", extra="ignore")

    home: Path = Field(Path(".renalq"), description="Folder that keeps all state of `renalq up`.")
    host: str = Field("127.0.0.1", description="Address that the API binds.")
    port: int = Field(8080, ge=1, le=65535, description="Port that the API binds.")
    database_url: str = Field(
        "postgresql+psycopg2://renalq@127.0.0.1:5432/renalq",
        description="Postgres, as an SQLAlchemy URL. `renalq up` starts its own where this is not set.",
    )
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="Redis, Celery's broker. `renalq up` starts its own where this is not set.",
    )
    artifacts_url: str = Field(
        "",
        description="Where blobs are kept: a folder or an fsspec URL (s3://bucket/prefix). Empty: HOME/artifacts.",
    )
    mlflow_url: str = Field("", description="MLflow tracking server. Empty: runs are not tracked.")
    mlflow_public_url: str = Field(
        "",
        description="MLflow's address for people's browsers: a job links to its run there. Empty: no links.",
    )
    mlflow_log_weights: bool = Field(True, description="Also copy each network's weights (537 MB) to MLflow.")
    track_again_seconds: float = Field(
        60, gt=0, description="Time between two tries to record what MLflow missed while it was away (s)."
    )
    weights_dir: Path | None = Field(
        None,
        description="Folder of the workers with weights: ImageNet's (vgg16-397923af.pth), and those of `file:NAME`.",
    )
    work_dir: Path | None = Field(None, description="Scratch space of workers. Empty: HOME/work.")
    feature_cache_bytes: int = Field(
        8 * GIB, ge=0, description="Most that decoded scans and features in HOME/cache may hold (bytes). 0: no cache."
    )

    lease_seconds: float = Field(45, gt=0, description="A claim is lost after this time without a beat (s).")
    beat_seconds: float = Field(10, gt=0, description="Time between two beats of a worker (s).")
    give_up_seconds: float = Field(30, gt=0, description="A worker that could not beat for so long stops its unit (s).")
    stall_seconds: float = Field(900, gt=0, description="A unit without progress for so long is ended (s).")
    sweep_seconds: float = Field(1.0, gt=0, description="Time between two sweeps of the dispatcher (s).")
    ring_again_seconds: float = Field(
        15,
        gt=0,
        description="A unit that nobody claimed is rung again after this, doubling up to eight times it (s).",
    )
    process_seconds: float = Field(5, gt=0, description="Time between two signs of life of a process (s).")
    max_failures: int = Field(3, ge=1, description="A unit fails for good at this many failures.")
    retry_base_seconds: float = Field(
        2, ge=0, description="Full-jitter back-off after a first failure: at most this (s)."
    )
    retry_cap_seconds: float = Field(60, ge=0, description="Back-off never exceeds this (s).")
    cancel_grace_seconds: float = Field(5, gt=0, description="A cancelled training is killed after this (s).")
    watch_seconds: float = Field(
        0.25, gt=0, description="Time between two looks of a worker at whether its unit is still wanted (s)."
    )
    checkpoint_seconds: float = Field(
        30, ge=0, description="A training writes a checkpoint at an epoch's end once so much time has passed (s)."
    )
    chunk_seconds: float = Field(10.0, gt=0, description="Work in one unit of a batch, by the pace of the latest ones.")
    chunk_scans: int = Field(128, ge=1, description="Scans in one unit of a batch where no pace is known yet.")
    chunks_rung_per_job: int = Field(4, ge=1, description="Units of one job that are rung at the same time.")
    reuse_results: bool = Field(
        True, description="A scan that the same model has seen on the same engine gets its result from there: `cached`."
    )
    rung_ahead_seconds: float = Field(
        0.25, ge=0, description="Work of short units that is promised to busy workers, beyond what idle ones take (s)."
    )
    newcomer_seconds: float = Field(
        5, ge=0, description="A tenant that had nothing rung for so long need not wait for a chunk's end (s)."
    )

    quota_scans: int = Field(200_000, ge=1, description="Most scans that one tenant may have in the queue.")
    quota_batches: int = Field(100, ge=1, description="Most batches that one tenant may have in the queue.")
    queue_ceiling: int = Field(1_000_000, ge=1, description="Most scans in the queue, of all tenants.")
    idempotency_hours: float = Field(24, gt=0, description="An Idempotency-Key is remembered for so long (h).")

    results_days: float = Field(
        0, ge=0, description="A prediction's results are deleted so long after its end (days). 0: kept for ever."
    )

    max_upload_bytes: int = Field(4 * GIB, gt=0, description="Largest request body that is taken (bytes).")
    upload_hours: float = Field(24, gt=0, description="An upload in pieces is forgotten after so long (h).")
    max_scan_bytes: int = Field(256 * MIB, gt=0, description="Largest single scan (bytes).")
    max_pixels: int = Field(50_000_000, gt=0, description="Largest declared image (pixels).")
    max_archive_members: int = Field(100_000, gt=0, description="Most files in one zip.")
    max_archive_bytes: int = Field(20 * GIB, gt=0, description="Most bytes that a zip may unpack to.")
    max_archive_ratio: float = Field(200, gt=1, description="Most times that a zip may be larger unpacked.")

    fetch_hosts: str = Field(
        "",
        description="Hosts that workers may fetch scans from, such as `pacs.example,10.0.0.5:8042`. Empty: none.",
    )
    fetch_seconds: float = Field(30, gt=0, description="Longest that fetching one scan may take (s).")

    webhook_hosts: str = Field(
        "",
        description="Hosts inside the network that webhooks may be sent to, such as `ris.example,10.0.0.7:8443`. "
        "Public ones need no mention.",
    )
    webhook_seconds: float = Field(10, gt=0, description="Longest that a webhook's receiver may take to answer (s).")
    webhook_retry_seconds: str = Field(
        "5,300,1800,7200,18000,36000,50400,72000,86400",
        description="Waits between the tries of one delivery (s); after the last of them it has failed.",
    )
    delivery_days: float = Field(
        30,
        ge=3,
        description="A webhook's deliveries are listed for so long (days). At least 3: drift is looked for in two days "
        "and would be told again once its delivery is forgotten.",
    )

    wait_slots: int = Field(
        200, ge=1, le=240, description="Clients that may wait (Prefer: wait, event streams, older calls) at once."
    )
    db_pool: int = Field(16, ge=1, description="Database connections of one process.")
    promote_min_f1: float = Field(0.85, ge=0, le=1, description="The first champion needs at least this F1.")
    promote_min_sensitivity: float = Field(
        0.80, ge=0, le=1, description="Every champion needs at least this sensitivity (recall), but by force."
    )
    promote_max_calibration_error: float = Field(
        0.10, ge=0, le=1, description="Every champion's calibration error beyond chance is at most this, but by force."
    )
    indeterminate_above: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Up to this probability of the positive class, of two, a scan's disposition is the negative one.",
    )
    indeterminate_below: float = Field(
        0.7,
        ge=0,
        le=1,
        description="From this probability on a class is a scan's disposition: of two the positive one, of more any.",
    )
    drift_bound: float = Field(
        0.25, gt=0, description="A champion's figure has drifted beyond this (population stability index)."
    )
    drift_least_scans: int = Field(
        50, ge=1, description="Scans that a verdict on drift needs; a day with fewer is taken with those before it."
    )
    drift_seconds: float = Field(60, gt=0, description="Time between two looks for drift, which webhooks hear of (s).")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")

    @field_validator("fetch_hosts", "webhook_hosts")
    @classmethod
    def _readable_hosts(cls, text: str) -> str:
        parse_hosts(text)
        return text

    @field_validator("webhook_retry_seconds")
    @classmethod
    def _readable_seconds(cls, text: str) -> str:
        if not all(0 < wait < math.inf for wait in _numbers(text)):
            raise ValueError("write seconds greater than 0, such as 5,300,1800")
        return text

    @model_validator(mode="after")
    def _leaves_room_for_doubt(self) -> "Settings":
        if self.indeterminate_above >= self.indeterminate_below:
            raise ValueError("RENALQ_INDETERMINATE_ABOVE must be less than RENALQ_INDETERMINATE_BELOW")
        return self

    @property
    def artifacts(self) -> str:
        """Where blobs are kept, resolved."""
        return self.artifacts_url or str(self.home.resolve() / "artifacts")

    @property
    def allowed_hosts(self) -> frozenset[Host]:
        """`fetch_hosts`, read."""
        return parse_hosts(self.fetch_hosts)

    @property
    def receiver_hosts(self) -> frozenset[Host]:
        """`webhook_hosts`, read."""
        return parse_hosts(self.webhook_hosts)

    @property
    def webhook_retries(self) -> tuple[float, ...]:
        """`webhook_retry_seconds`, read."""
        return _numbers(self.webhook_retry_seconds)

    @property
    def work(self) -> Path:
        """Scratch space of workers, resolved."""
        return (self.work_dir or self.home / "work").resolve()

    @property
    def feature_cache(self) -> Path:
        """Features and pixels that trainings keep for the next one, resolved."""
        return (self.home / "cache").resolve()


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(",") if number.strip())


def as_markdown() -> str:
    """The table in `docs/settings.md`: `python -m jobs.settings > docs/settings.md` writes it anew."""
    rows = [
        f"| `RENALQ_{name.upper()}` | {_shown(field.default)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    head = ["# Settings", "", "Read from the environment by every process, once, at its start.", ""]
    return "\n".join([*head, "| variable | default | what it is |", "| --- | --- | --- |", *rows, ""])


def _shown(default: object) -> str:
    return "–" if default in (None, "") else f"`{default}`"


if __name__ == "__main__":
    print(as_markdown(), end="")
