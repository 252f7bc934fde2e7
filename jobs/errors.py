"""One exception per fact. The docstring is the message; keyword arguments fill it in.

    RenalQError
    ├── NotFound            404   JobNotFound DatasetNotFound ScanNotFound ModelNotFound KeyNotFound ArtifactNotFound
    │                             UploadNotFound WebhookNotFound DeliveryNotFound ResultNotFound TruthNotFound
    │                             StudyNotFound DeletionNotFound
    ├── Conflict            409   WrongState NoChampion PromotionRefused NothingBefore NoDataset DatasetNotReady
    │                             DatasetInUse DatasetGone ModelFileGone NoResults IdempotencyInFlight
    │                             UploadIncomplete WrongOffset TooManyWebhooks KeyEnded StillNeeded ScanDeleted
    ├── ResultsExpired      410
    ├── MalformedBody       400
    ├── TooSlow             408
    ├── Invalid             422   BadInput BadArchive IdempotencyConflict WeightsMissing
    ├── UnsupportedMedia    415   UnsupportedCoding
    ├── TooLarge            413
    ├── OtherTusVersion     412
    ├── UploadBusy          423
    ├── Unauthorized        401
    ├── ScopeMissing        403
    ├── QuotaExceeded       429
    ├── RateLimited         429
    ├── StorageQuotaExceeded 507
    ├── Unavailable         503   TooManyWatchers QueueFull
    └── LeaseLost                 inside a worker only: another worker holds the unit now

`status` is the HTTP status that the API answers with; `code` is a stable word for programs.
"""

from collections.abc import Sequence
from typing import Any


class RenalQError(Exception):
    """Something went wrong."""

    status = 500
    code = "INTERNAL"

    def __init__(self, detail: str | None = None, **facts: Any) -> None:
        self.facts = facts
        text = detail or (self.__doc__ or "").strip()
        super().__init__(text.format(**facts) if facts and not detail else text)


class NotFound(RenalQError):
    """There is no such thing, or it belongs to somebody else."""

    status, code = 404, "NOT_FOUND"


class JobNotFound(NotFound):
    """No job has this id. List yours with GET /jobs."""


class DatasetNotFound(NotFound):
    """No dataset has this id. List yours with GET /datasets, or upload one with POST /datasets."""


class ScanNotFound(NotFound):
    """No scan has this id. Store one with POST /scans."""


class ModelNotFound(NotFound):
    """No model has this version. List them with GET /models."""


class KeyNotFound(NotFound):
    """No key has this id. List them with GET /keys."""


class WebhookNotFound(NotFound):
    """No webhook has this id. List yours with GET /webhooks."""


class DeliveryNotFound(NotFound):
    """No delivery of this webhook has this id. List them with GET /webhooks/ID/deliveries."""


class ArtifactNotFound(NotFound):
    """This job has no artifact of that name. List them with GET /jobs/ID/artifacts."""


class ResultNotFound(NotFound):
    """This job has no result of that scan. List them with GET /jobs/ID/results."""


class StudyNotFound(NotFound):
    """No ended prediction has a result of this study. Its UID is what DICOM calls StudyInstanceUID."""


class TruthNotFound(NotFound):
    """Nobody has told what this scan shows. POST its label to this address."""


class DeletionNotFound(NotFound):
    """No receipt has this id. List yours with GET /deletions."""


class UploadNotFound(NotFound):
    """No upload has this id: it was used, has expired, or never was. Begin one with POST /uploads."""


class Conflict(RenalQError):
    """The thing is in a state that does not allow this."""

    status, code = 409, "CONFLICT"


class WrongState(Conflict):
    """The job is {state}: {verb} is possible only while it is {allowed}."""

    code = "WRONG_STATE"


class NoChampion(Conflict):
    """No model is champion yet. Train one with POST /jobs/train, or name a version in `model`."""

    code = "NO_CHAMPION"


class PromotionRefused(Conflict):
    """The gate refuses version {version}, and `reasons` says why. Train anew, or send `force` with a `reason`."""

    code = "PROMOTION_REFUSED"

    def __init__(self, version: int, reasons: Sequence[str]) -> None:
        super().__init__(version=version)
        self.reasons = list(reasons)


class NothingBefore(Conflict):
    """No champion came before this one, so there is nothing to go back to. Promote the version that you want."""

    code = "NOTHING_BEFORE"


class NoDataset(Conflict):
    """No dataset is ready to be trained on. Upload one with POST /datasets, and wait until it is checked."""

    code = "NO_DATASET"


class DatasetNotReady(Conflict):
    """The dataset is {state}. Wait until GET /datasets/ID says ready; if invalid, mend what it names and resend."""

    code = "DATASET_NOT_READY"


class DatasetInUse(Conflict):
    """Job {job_id} has not ended and needs this dataset. Cancel it, or wait for its end."""

    code = "DATASET_IN_USE"


class StillNeeded(Conflict):
    """Something that is kept needs this."""

    code = "STILL_NEEDED"


class ScanDeleted(Conflict):
    """A scan of this request was deleted just now. Send the same again: it is stored anew."""

    code = "SCAN_DELETED"


class NoResults(Conflict):
    """A {kind} job has no results per scan. Read GET /jobs/ID/metrics instead."""

    code = "NO_RESULTS"


class DatasetGone(Conflict):
    """The dataset of this training was deleted, so that it cannot be done again. Upload it, and train anew."""

    code = "DATASET_GONE"


class ModelFileGone(Conflict):
    """The file of version {version} is not stored any more. Train it again, or name another version."""

    code = "MODEL_MISSING"


class IdempotencyInFlight(Conflict):
    """The first request with this Idempotency-Key is still being answered. Send the same again shortly."""

    code = "IDEMPOTENCY_IN_FLIGHT"


class TooManyWebhooks(Conflict):
    """You have {most} webhooks, as many as are allowed. Delete one with DELETE /webhooks/ID."""

    code = "TOO_MANY_WEBHOOKS"


class KeyEnded(Conflict):
    """This key was revoked or has expired, so that nothing can follow it. Make a new one with POST /keys."""

    code = "KEY_ENDED"


class ResultsExpired(RenalQError):
    """This job's results were deleted: they are kept for RENALQ_RESULTS_DAYS days. Submit the scans anew."""

    status, code = 410, "RESULTS_EXPIRED"


class UploadIncomplete(Conflict):
    """Only {offset} of the upload's {size} bytes are here. PATCH /uploads/{id} from there on, then send this again."""

    code = "UPLOAD_INCOMPLETE"


class WrongOffset(Conflict):
    """The piece begins at {given}, but the upload is at {offset} of {size} bytes. Send it on from there."""

    code = "WRONG_OFFSET"


class MalformedBody(RenalQError):
    """The body cannot be parsed."""

    status, code = 400, "MALFORMED_BODY"


class TooSlow(RenalQError):
    """The body came too slowly (see RENALQ_BODY_SECONDS). Send it again; a large file goes on by POST /uploads."""

    status, code = 408, "TOO_SLOW"


class Invalid(RenalQError):
    """The request cannot be understood as it stands."""

    status, code = 422, "INVALID"

    def __init__(self, detail: str | None = None, pointer: str | None = None, **facts: Any) -> None:
        super().__init__(detail, **facts)
        self.pointer = pointer


class BadInput(Invalid):
    """This is no input that the pipeline can read."""

    code = "BAD_INPUT"

    def __init__(self, detail: str | None = None, code: str | None = None) -> None:
        super().__init__(detail)
        self.code = code or self.code


class WeightsMissing(Invalid):
    """No live worker can read the weights that the training would begin from."""

    code = "WEIGHTS_MISSING"


class BadArchive(Invalid):
    """The zip cannot be taken."""

    code = "BAD_ARCHIVE"


class IdempotencyConflict(Invalid):
    """This Idempotency-Key came with another request before. Take a new key for a new request."""

    code = "IDEMPOTENCY_KEY_REUSED"


class UnsupportedMedia(RenalQError):
    """This kind of file is not taken here."""

    status, code = 415, "UNSUPPORTED_MEDIA_TYPE"


class UnsupportedCoding(UnsupportedMedia):
    """This Content-Encoding is not taken. Send the body as it is, or in one of {accepted}, once."""


class TooLarge(RenalQError):
    """The upload is larger than the {limit} bytes that are taken. Split it, or raise {setting}."""

    status, code = 413, "TOO_LARGE"


class OtherTusVersion(RenalQError):
    """Uploads speak tus {version}: send the header `Tus-Resumable: {version}`."""

    status, code = 412, "TUS_VERSION"


class UploadBusy(RenalQError):
    """Another request holds this upload. Ask HEAD /uploads/ID for its offset shortly, and go on from there."""

    status, code = 423, "UPLOAD_BUSY"


class Unauthorized(RenalQError):
    """Send a key: `Authorization: Bearer rq_…`. An administrator makes one with POST /keys."""

    status, code = 401, "UNAUTHORIZED"


class ScopeMissing(RenalQError):
    """This key lacks the scope {scope}. Ask an administrator for a key that has it."""

    status, code = 403, "SCOPE_MISSING"


class QuotaExceeded(RenalQError):
    """You have {queued} unfinished {what}; {limit} are allowed. Wait for some to end, cancel them, or send fewer."""

    status, code = 429, "QUOTA_EXCEEDED"


class RateLimited(RenalQError):
    """Too many requests: {amount} in one {unit} are allowed {whose}. Wait {seconds} s, then go on more slowly."""

    status, code = 429, "RATE_LIMITED"

    @property
    def seconds(self) -> int:
        """When the next request is taken (s)."""
        return int(self.facts["seconds"])


class StorageQuotaExceeded(RenalQError):
    """You store {used} of {limit} bytes: {more} more do not fit. Delete what you do not need (GET /usage shows it)."""

    status, code = 507, "STORAGE_QUOTA_EXCEEDED"


class Unavailable(RenalQError):
    """This cannot be served now. Try again shortly."""

    status, code = 503, "UNAVAILABLE"


class TooManyWatchers(Unavailable):
    """Too many clients wait for events at once. Poll GET /jobs/ID instead, or come back later."""

    code = "TOO_MANY_WATCHERS"


class QueueFull(Unavailable):
    """The queue of all tenants together is full. Nothing was stored: send the same again later."""

    code = "QUEUE_FULL"


class LeaseLost(RenalQError):
    """Another worker holds this unit now, or it has ended: nothing more may be written for it."""

    code = "LEASE_LOST"
