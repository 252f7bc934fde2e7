"""All error codes that clients see: of requests, of jobs, of scans.

`python -m jobs.error_codes > docs/errors.md` writes the documentation, which a test compares. The API serves each at
`/problems/CODE`, which is the `type` of its problem details (RFC 9457).
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ErrorCode:
    """A code, and where it appears.

    Args:
        code: stable, for programs.
        title: what it means; the same at every occurrence.
        remedy: what to do.
        status: HTTP status of the response to a request; None: no request is answered so.
        of_job: it may be the error of a job.
        of_scan: it may be the error of a scan in a job.
        of_warning: it may be a warning of a job, and no error.
    """

    code: str
    title: str
    remedy: str
    status: int | None = None
    of_job: bool = False
    of_scan: bool = False
    of_warning: bool = False


ERROR_CODES = {
    one.code: one
    for one in (
        # Of requests
        ErrorCode("BAD_REQUEST", "The request is not valid HTTP", "Correct it; `detail` says more.", 400),
        ErrorCode("MALFORMED_BODY", "The body cannot be parsed", "Correct its syntax; `detail` says where.", 400),
        ErrorCode("UNAUTHORIZED", "There is no valid key", "Send `Authorization: Bearer rq_…`.", 401),
        ErrorCode("SCOPE_MISSING", "The key lacks a scope", "Use a key with the scope that `detail` names.", 403),
        ErrorCode("NOT_FOUND", "There is nothing at this address", "Check path and id.", 404),
        ErrorCode("METHOD_NOT_ALLOWED", "The address does not take this method", "See the header `Allow`.", 405),
        ErrorCode(
            "TOO_SLOW",
            "The request came too slowly",
            "Send it again on a new connection; large files by `POST /uploads`.",
            408,
        ),
        ErrorCode("CONFLICT", "The state of a resource does not allow this", "See `detail`.", 409),
        ErrorCode(
            "NO_CHAMPION",
            "No model is champion",
            "Train a version that passes the gate, or name one in `model`.",
            409,
        ),
        ErrorCode(
            "PROMOTION_REFUSED",
            "The gate refuses this version",
            "See `reasons`; train again, or promote with `force` and a `reason`.",
            409,
        ),
        ErrorCode("NOTHING_BEFORE", "There was no champion before", "Promote the version that you want.", 409),
        ErrorCode("NO_DATASET", "No dataset is ready", "Upload one with `POST /datasets`; wait until `ready`.", 409),
        ErrorCode(
            "DATASET_NOT_READY",
            "The dataset is not ready",
            "Wait for `ready`; if `invalid`, correct it and upload it again.",
            409,
        ),
        ErrorCode("DATASET_GONE", "The dataset was deleted", "Upload it, and train again.", 409),
        ErrorCode(
            "DATASET_IN_USE", "An unfinished job needs the dataset", "Wait for that job's end, or cancel it.", 409
        ),
        ErrorCode(
            "STILL_NEEDED",
            "Something that is kept needs what is to be deleted",
            "`detail` says what, and what to do.",
            409,
        ),
        ErrorCode("SCAN_DELETED", "The scan was deleted", "Send the scan again.", 409, of_scan=True),
        ErrorCode("NO_RESULTS", "Such a job has no results per scan", "Read the metrics of a training.", 409),
        ErrorCode("WRONG_STATE", "The job's state does not allow this", "`detail` names the states that do.", 409),
        ErrorCode("TOO_MANY_WEBHOOKS", "No more webhooks are allowed", "Delete one.", 409),
        ErrorCode("KEY_ENDED", "The API key was revoked or has expired", "Make a new key with `POST /keys`.", 409),
        ErrorCode(
            "IDEMPOTENCY_IN_FLIGHT",
            "The first request with this key is still being answered",
            "Repeat it after `Retry-After`.",
            409,
        ),
        ErrorCode(
            "UPLOAD_INCOMPLETE", "Bytes of the upload are missing", "Ask for the offset with HEAD, send the rest.", 409
        ),
        ErrorCode(
            "WRONG_OFFSET",
            "The chunk does not start at the upload's offset",
            "Ask for the offset with HEAD, and send from there.",
            409,
        ),
        ErrorCode(
            "RESULTS_EXPIRED",
            "The results were deleted, `RENALQ_RESULTS_DAYS` after the end",
            "Submit the scans again.",
            410,
        ),
        ErrorCode("TUS_VERSION", "This is not the tus version spoken here", "Send `Tus-Resumable: 1.0.0`.", 412),
        ErrorCode(
            "TOO_LARGE",
            "It is larger than the limit",
            "Split it, or raise the setting that `detail` names.",
            413,
            of_scan=True,
        ),
        ErrorCode("UNSUPPORTED_MEDIA_TYPE", "This kind of body is not taken here", "Send what `detail` names.", 415),
        ErrorCode("INVALID", "Fields are missing, unknown or wrong", "Correct what `errors` points at.", 422),
        ErrorCode("NOT_AN_IMAGE", "The file is no image", "`detail` says what can be read.", 422, of_scan=True),
        ErrorCode(
            "BAD_INPUT",
            "The file is no input of its pipeline",
            "`detail` says what the pipeline reads.",
            422,
            of_scan=True,
        ),
        ErrorCode(
            "BAD_ARCHIVE", "The zip cannot be taken", "Make it again; `detail` names the member.", 422, of_scan=True
        ),
        ErrorCode(
            "IDEMPOTENCY_KEY_REUSED",
            "The key came with a different request before",
            "Use a new `Idempotency-Key` for a new request.",
            422,
        ),
        ErrorCode("UPLOAD_BUSY", "Another request holds the upload", "Repeat after `Retry-After`.", 423),
        ErrorCode(
            "QUOTA_EXCEEDED",
            "Too much of yours is in the queue",
            "Wait for your jobs to end (`Retry-After`), or cancel some.",
            429,
        ),
        ErrorCode("RATE_LIMITED", "Too many requests in a short time", "Wait `Retry-After`, then send fewer.", 429),
        ErrorCode(
            "STORAGE_QUOTA_EXCEEDED",
            "Your share of the storage is full",
            "Delete what you do not need (`GET /usage`), or ask for a higher `RENALQ_QUOTA_STORAGE_BYTES`.",
            507,
        ),
        ErrorCode("UNAVAILABLE", "Postgres does not respond", "Repeat after `Retry-After`.", 503),
        ErrorCode("SERVER_BUSY", "Other large bodies are being read", "Repeat after `Retry-After`.", 503),
        ErrorCode(
            "TOO_MANY_CONNECTIONS",
            "Too many connections come from one address",
            "Use fewer at once; a proxy needs `RENALQ_ADDRESS_CONNECTIONS=0`.",
            503,
        ),
        ErrorCode("TOO_MANY_WATCHERS", "Too many clients wait", "Poll instead of streaming.", 503),
        ErrorCode(
            "NOT_DONE_YET",
            "An older client's call took too long; its job continues",
            "Follow `Location`.",
            503,
        ),
        ErrorCode("QUEUE_FULL", "The queue of all tenants is full", "Repeat after `Retry-After`.", 503),
        ErrorCode("NOT_READY", "Jobs are not being processed", "See `reasons`.", 503),
        # Of requests and jobs
        ErrorCode(
            "INTERNAL",
            "A defect of RenalQ",
            "Give the `request_id`, or the job's id, to your administrator.",
            500,
            of_job=True,
        ),
        ErrorCode(
            "NOT_EXPLAINED",
            "A scan could not be explained",
            "The worker's log says why; submit it again.",
            500,
            of_job=True,
        ),
        ErrorCode("STORAGE_FULL", "The disk is full", "Free space on the server or worker.", 503, of_job=True),
        # Of jobs
        ErrorCode(
            "BAD_DATASET",
            "The dataset cannot be trained on",
            "See its `problems`: a damaged zip, names that no disk takes, too few patients of a class.",
            of_job=True,
        ),
        ErrorCode(
            "BAD_PARAMS",
            "A parameter does not suit",
            "`detail` names it; an infinite loss needs a smaller `learning_rate`, or `clip_norm`.",
            of_job=True,
        ),
        ErrorCode(
            "WEIGHTS_MISSING",
            "The initial weights are not there",
            "Do what `detail` says (`renalq weights fetch`, or a file), or use `weights: none`.",
            422,
            of_job=True,
        ),
        ErrorCode(
            "DOWNLOAD_FAILED",
            "`source_url` could not be fetched",
            "See `RENALQ_FETCH_HOSTS`; check that the workers reach it and that it is shared publicly.",
            of_job=True,
        ),
        ErrorCode(
            "ENGINE_NOT_ADMITTED",
            "The worker lacks this `precision`, or it changes the predictions",
            "Use `auto`.",
            of_job=True,
        ),
        ErrorCode("DEVICE_OOM", "Out of memory", "Use a smaller `batch_size` or `image_size`.", of_job=True),
        ErrorCode(
            "TRAINING_DIED",
            "The training's process was killed, often for memory",
            "Use a smaller `batch_size` or `image_size`.",
            of_job=True,
        ),
        ErrorCode("WORKER_LOST", "Its workers died", "See the worker's log.", of_job=True),
        ErrorCode("STALLED", "It made no progress", "See the worker's log.", of_job=True),
        ErrorCode("DATABASE_LOST", "Postgres went away during the job", "Retry the job.", of_job=True),
        ErrorCode(
            "MODEL_MISSING",
            "The version's file is gone, or cannot be read",
            "Train it again, or name another version.",
            409,
            of_job=True,
        ),
        ErrorCode("PIPELINE_MISSING", "The worker lacks the pipeline", "Install it on the workers too.", of_job=True),
        ErrorCode("ALL_SCANS_FAILED", "Every scan failed", "See `/results?state=failed`.", of_job=True),
        # Of scans
        ErrorCode("BAD_IMAGE", "The image cannot be decoded", "Export the scan again.", of_scan=True),
        ErrorCode("BAD_ITEM", "The item cannot be read by its pipeline", "See `detail`.", of_scan=True),
        ErrorCode("SCAN_MISSING", "Its bytes are no longer stored", "Upload the scan again.", of_scan=True),
        ErrorCode(
            "FETCH_REFUSED",
            "The host is not allowed, or the scan is too large",
            "See `RENALQ_FETCH_HOSTS`, or send the file.",
            of_scan=True,
        ),
        ErrorCode("FETCH_FAILED", "The server refused the scan", "Check the `url` of the manifest.", of_scan=True),
        ErrorCode("FETCH_UNREACHABLE", "The server did not answer in time", "Retry the job.", of_scan=True),
        # Of jobs that did not fail
        ErrorCode(
            "FILES_PASSED_OVER",
            "Files of a zip are no scans by their names",
            "Rename what is a scan, and send it again.",
            of_warning=True,
        ),
        ErrorCode(
            "NAMES_GUESSED",
            "Names in a zip are not UTF-8, and were read as cp437",
            "Pack with UTF-8 names, if these are wrong.",
            of_warning=True,
        ),
    )
}


# --- documentation ---

INTRODUCTION = """# Error codes

Generated by `python -m jobs.error_codes > docs/errors.md`. `GET /problems/CODE` serves one of them.
[api.md](api.md#errors) shows how errors look.
"""
OF_SCANS = """
The error of a scan in `/results`. A scan whose whole chunk failed has the code of a job.
"""
OF_WARNINGS = """
In `warnings` of a job, which may also hold a job's errors that failed no scan.
"""


def documentation() -> str:
    """The page docs/errors.md."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    found = sorted(ERROR_CODES.values(), key=lambda one: one.code)
    yield INTRODUCTION
    yield "## Requests\n\n| status | code | meaning | what to do |\n| --- | --- | --- | --- |"
    yield from (f"| {one.status} {_row(one)}" for one in sorted(found, key=lambda one: one.status or 0) if one.status)
    yield "\n## Jobs\n\n| code | meaning | what to do |\n| --- | --- | --- |"
    yield from (_row(one) for one in found if one.of_job)
    yield f"\n## Scans\n{OF_SCANS}\n| code | meaning | what to do |\n| --- | --- | --- |"
    yield from (_row(one) for one in found if one.of_scan)
    yield f"\n## Warnings\n{OF_WARNINGS}\n| code | meaning | what to do |\n| --- | --- | --- |"
    yield from (_row(one) for one in found if one.of_warning)


def _row(one: ErrorCode) -> str:
    return f"| `{one.code}` | {one.title} | {one.remedy} |"


if __name__ == "__main__":
    print(documentation(), end="")
