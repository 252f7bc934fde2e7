"""All settings, each with its default, unit and one line of help. Read from environment variables `RENALQ_…`.

A process creates `Settings()` once, at its start, and passes it on. No other module reads settings from `os.environ`.
"""

import math
import re
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from jobs.addresses import Host, parse_hosts
from jobs.policy_settings import PolicySettings

GIB = 1024**3
MIB = 1024**2
RATE = re.compile(r"[1-9][0-9]{0,8}/(second|minute|hour|day)")


def _port_of(what: str, offset: int) -> str:
    return (
        f"Port at which `renalq up` serves {what}, on loopback. Empty: RENALQ_PORT + {offset}, or another if that is "
        "taken; kept in HOME/ports.json."
    )


class Settings(PolicySettings):
    """The settings of all processes. `docs/settings.md` lists them; a test keeps it up to date."""

    model_config = SettingsConfigDict(env_prefix="RENALQ_", extra="ignore")

    home: Path = Field(Path(".renalq"), description="Folder for all state of `renalq up`.")
    host: str = Field("127.0.0.1", description="Address that the API binds to.")
    port: int = Field(8080, ge=1, le=65535, description="Port that the API binds to.")
    flower_port: int | None = Field(None, ge=1, le=65535, description=_port_of("Flower", 100))
    mlflow_port: int | None = Field(None, ge=1, le=65535, description=_port_of("MLflow", 200))
    postgres_port: int | None = Field(None, ge=1, le=65535, description=_port_of("its own Postgres", 300))
    redis_port: int | None = Field(None, ge=1, le=65535, description=_port_of("its own Redis", 400))
    log_bytes: int = Field(
        10 * MIB,
        ge=64 * 1024,
        description="Size at which `renalq up` rotates a log in HOME/logs; it keeps three older files (bytes).",
    )
    database_url: str = Field(
        "postgresql+psycopg2://renalq@127.0.0.1:5432/renalq",
        description="Postgres, as an SQLAlchemy URL. If not set, `renalq up` starts its own.",
    )
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="Redis, Celery's broker. If not set, `renalq up` starts its own.",
    )
    artifacts_url: str = Field(
        "",
        description="Blob store: a folder or an fsspec URL (s3://bucket/prefix). Empty: HOME/artifacts.",
    )
    run_as: str = Field(
        "",
        description="User that Postgres and Redis run as where root starts `renalq up`. Empty: `renalq` if there is "
        "one, else `daemon`.",
    )
    mlflow_url: str = Field(
        "",
        description="MLflow tracking server. Empty: runs are not tracked. MLflow's client logs in there with "
        "`MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`.",
    )
    mlflow_store: str = Field(
        "",
        description="Database of the MLflow that `renalq up` starts, as an SQLAlchemy URL whose role owns nothing "
        "else. Empty: one beside ours, or with a given Postgres a file in HOME/mlflow.",
    )
    mlflow_public_url: str = Field(
        "",
        description="MLflow's address for browsers: jobs link to their runs there. Empty: no links.",
    )
    mlflow_log_weights: bool = Field(True, description="Also copy each network's weights (537 MB) to MLflow.")
    track_again_seconds: float = Field(
        60, gt=0, description="Interval of attempts to backfill what MLflow missed while it was unreachable (s)."
    )
    weights_dir: Path | None = Field(
        None,
        description="Folder on the workers with weights: ImageNet's (vgg16-397923af.pth), and those of `file:NAME`. "
        "Empty: HOME/weights.",
    )
    work_dir: Path | None = Field(None, description="Scratch space of workers. Empty: HOME/work.")
    feature_cache_bytes: int = Field(
        8 * GIB, ge=0, description="Size limit of decoded scans and features in HOME/cache (bytes). 0: no cache."
    )

    lease_seconds: float = Field(45, gt=0, description="A lease expires after this time without a heartbeat (s).")
    beat_seconds: float = Field(10, gt=0, description="Interval of a worker's heartbeats, which renew its lease (s).")
    give_up_seconds: float = Field(
        30, gt=0, description="A worker whose heartbeats fail for so long stops its unit (s)."
    )
    stall_seconds: float = Field(
        900, gt=0, description="A unit without progress for so long is taken back from its worker (s)."
    )
    sweep_seconds: float = Field(1.0, gt=0, description="Longest time between two rounds of the dispatcher (s).")
    ring_again_seconds: float = Field(
        15,
        gt=0,
        description="An unclaimed unit is dispatched again after this time, doubled each time up to eightfold (s).",
    )
    process_seconds: float = Field(5, gt=0, description="Interval of a process' heartbeats, for readiness (s).")
    max_failures: int = Field(3, ge=1, description="A unit fails for good after this many failures.")
    retry_base_seconds: float = Field(
        2, ge=0, description="Upper bound of the full-jitter back-off after the first failure (s)."
    )
    retry_cap_seconds: float = Field(60, ge=0, description="Upper bound of any back-off (s).")
    cancel_grace_seconds: float = Field(
        5, gt=0, description="A cancelled training that does not stop is killed after this time (s)."
    )
    watch_seconds: float = Field(
        0.25, gt=0, description="Interval at which a worker polls whether its unit was cancelled (s)."
    )
    checkpoint_seconds: float = Field(
        30,
        ge=0,
        description="Shortest time between two checkpoints of a training, written at the end of an epoch (s).",
    )
    chunk_seconds: float = Field(
        10.0, gt=0, description="Target duration of one unit of a batch, by the pace of the latest units (s)."
    )
    chunk_scans: int = Field(128, ge=1, description="Scans in one unit of a batch while the pace is unknown.")
    reuse_results: bool = Field(
        True,
        description="Reuse the result of a scan that the same model has predicted on the same engine (`cached`).",
    )
    rung_ahead_seconds: float = Field(
        0.25,
        ge=0,
        description="Work in short units that is reserved for busy workers, beyond what idle workers take (s).",
    )
    newcomer_seconds: float = Field(
        5, ge=0, description="A tenant with nothing dispatched for so long may interrupt another tenant's chunk (s)."
    )

    quota_scans: int = Field(200_000, ge=1, description="Limit of scans that one tenant may have in the queue.")
    quota_batches: int = Field(100, ge=1, description="Limit of batches that one tenant may have in the queue.")
    queue_ceiling: int = Field(1_000_000, ge=1, description="Limit of scans in the queue, of all tenants together.")
    quota_storage_bytes: int = Field(
        1024 * GIB,
        ge=0,
        description="Limit of bytes that one tenant may store: scans, datasets and open uploads. 0: none.",
    )
    idempotency_hours: float = Field(24, gt=0, description="How long an Idempotency-Key is kept (h).")

    results_days: float = Field(
        0,
        ge=0,
        description="A prediction's results and explanations are deleted so long after its end (days). 0: never.",
    )
    job_days: float = Field(
        0,
        ge=0,
        description="An ended job is deleted, with all that belongs to it, so long after its end (days). 0: never.",
    )
    scan_days: float = Field(
        0,
        ge=0,
        description="A stored scan that no kept result and no feedback needs is deleted so long after it was last sent "
        "(days). 0: never.",
    )
    model_days: float = Field(
        0,
        ge=0,
        description="A model version is deleted, with its training, so long after it was made or last promoted, unless "
        "it is champion or an unfinished job needs it (days). 0: never.",
    )
    dataset_days: float = Field(
        0,
        ge=0,
        description="A dataset is deleted so long after its upload and the end of the last job that used it (days). "
        "0: never.",
    )
    feedback_days: float = Field(0, ge=0, description="Feedback is deleted so long after it was sent (days). 0: never.")
    checkpoint_days: float = Field(
        7,
        ge=0,
        description="Checkpoints of a failed or cancelled training are deleted so long after its end, unless it is "
        "being retried (days). 0: never.",
    )
    orphan_days: float = Field(
        7,
        ge=0,
        description="A file in the blob store that no row refers to is deleted so long after it was found (days). "
        "0: never.",
    )

    deletion_grace_seconds: float = Field(
        3600,
        gt=0,
        description="A file without a row, and a deleted model version, are kept for so long (s): longer than any "
        "request takes from finding them to committing what refers to them.",
    )

    max_upload_bytes: int = Field(4 * GIB, gt=0, description="Largest accepted request body (bytes).")
    upload_hours: float = Field(24, gt=0, description="A resumable upload expires after so long (h).")
    max_scan_bytes: int = Field(256 * MIB, gt=0, description="Largest single scan (bytes).")
    max_pixels: int = Field(50_000_000, gt=0, description="Largest declared image (pixels).")
    max_archive_members: int = Field(100_000, gt=0, description="Limit of files in a zip.")
    max_archive_bytes: int = Field(20 * GIB, gt=0, description="Limit of the unpacked size of a zip (bytes).")
    max_archive_ratio: float = Field(
        200, gt=1, description="Limit of the compression ratio of a zip (unpacked ÷ packed size)."
    )

    fetch_hosts: str = Field(
        "",
        description="Hosts that workers may fetch scans and datasets from, such as `pacs.example,10.0.0.5:8042`. "
        "Empty: none.",
    )
    fetch_seconds: float = Field(30, gt=0, description="Time limit of fetching one scan (s).")

    webhook_hosts: str = Field(
        "",
        description="Non-public hosts that webhooks may be sent to, such as `ris.example,10.0.0.7:8443`. "
        "Public hosts are always allowed.",
    )
    webhook_seconds: float = Field(10, gt=0, description="Time limit of a webhook's receiver to respond (s).")
    webhook_retry_seconds: str = Field(
        "5,300,1800,7200,18000,36000,50400,72000,86400",
        description="Waits between the attempts of a delivery (s); after the last one it fails.",
    )
    delivery_days: float = Field(
        30,
        ge=3,
        description="A webhook's deliveries are kept for so long (days). At least 3: drift is checked over two days, "
        "and its event would be sent again once the delivery is deleted.",
    )

    connections: int = Field(
        4096,
        ge=16,
        description="Connections to the API at once; one without a request gives way to a new one. Fewer where the "
        "limit of open files is lower.",
    )
    address_connections: int = Field(
        512,
        ge=0,
        description="Connections at once from one address (IPv6: one /64). 0: any number, such as behind a proxy that "
        "limits them itself.",
    )
    proxies: int = Field(
        0,
        ge=0,
        description="Proxies in front of the API, each of which writes the address of its client into "
        "X-Forwarded-For: failed logins are counted by it. 0: the header is not believed.",
    )
    head_seconds: float = Field(
        10, gt=0, description="The head of a request must arrive within this time, or the connection is closed (s)."
    )
    body_seconds: float = Field(
        15,
        gt=0,
        description="A client may be silent for so long within a body, and four times as long while it is answered; "
        "what it was silent counts until its bytes make up for it (s).",
    )
    least_pace: float = Field(
        500, gt=0, description="Bytes that make up for a second of silence: the least pace of a body (bytes/s)."
    )
    wait_slots: int = Field(
        200,
        ge=1,
        le=240,
        description="Clients that may wait at once (Prefer: wait, streams, legacy calls), in equal shares by tenant, "
        "then by key.",
    )
    rate_key: str = Field(
        "1000/second",
        description="Limit of requests with one key, such as `1000/second` or `100/second;2000/minute`. Empty: none.",
    )
    rate_failed_login: str = Field(
        "30/minute",
        description="Limit of requests with an invalid key from one address (IPv6: from one /64). Empty: none.",
    )
    db_pool: int = Field(16, ge=1, description="Database connections per process.")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")

    @field_validator("fetch_hosts", "webhook_hosts")
    @classmethod
    def _parseable_hosts(cls, text: str) -> str:
        parse_hosts(text)
        return text

    @field_validator("rate_key", "rate_failed_login")
    @classmethod
    def _parseable_rates(cls, text: str) -> str:
        if not all(RATE.fullmatch(rate.strip()) for rate in text.split(";") if text.strip()):
            raise ValueError("write NUMBER/second, /minute, /hour or /day, such as 100/second;2000/minute")
        return text

    @field_validator("webhook_retry_seconds")
    @classmethod
    def _parseable_seconds(cls, text: str) -> str:
        if not all(0 < wait < math.inf for wait in _numbers(text)):
            raise ValueError("write seconds greater than 0, such as 5,300,1800")
        return text

    @property
    def artifacts(self) -> str:
        """The blob store's folder or URL, resolved."""
        return self.artifacts_url or str(self.home.resolve() / "artifacts")

    @property
    def allowed_hosts(self) -> frozenset[Host]:
        """`fetch_hosts`, parsed."""
        return parse_hosts(self.fetch_hosts)

    @property
    def receiver_hosts(self) -> frozenset[Host]:
        """`webhook_hosts`, parsed."""
        return parse_hosts(self.webhook_hosts)

    @property
    def webhook_retries(self) -> tuple[float, ...]:
        """`webhook_retry_seconds`, parsed."""
        return _numbers(self.webhook_retry_seconds)

    @property
    def weights(self) -> Path:
        """The workers' folder of weights, resolved. Nobody makes it before `renalq weights fetch` does."""
        return (self.weights_dir or self.home / "weights").resolve()

    @property
    def work(self) -> Path:
        """Scratch space of workers, resolved."""
        return (self.work_dir or self.home / "work").resolve()

    @property
    def feature_cache(self) -> Path:
        """Cache of features and pixels, shared by trainings, resolved."""
        return (self.home / "cache").resolve()


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(",") if number.strip())


def as_markdown() -> str:
    """The content of `docs/settings.md`. Regenerate it with `python -m jobs.settings > docs/settings.md`."""
    rows = [
        f"| `RENALQ_{name.upper()}` | {_default_cell(field.default)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    head = ["# Settings", "", "Read from the environment by every process, once, at its start.", ""]
    return "\n".join([*head, "| variable | default | description |", "| --- | --- | --- |", *rows, ""])


def _default_cell(default: object) -> str:
    return "–" if default in (None, "") else f"`{default}`"


if __name__ == "__main__":
    print(as_markdown(), end="")
