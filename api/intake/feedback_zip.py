"""A dataset's zip made of scans with feedback, in a temporary file."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from api.http.body.spool import SPOOL_FOLDER
from api.http.context import admit, services, tenant, transaction
from jobs.datasets import from_feedback
from jobs.datasets.from_feedback import LabelledScan
from jobs.errors import Invalid, TooLarge
from jobs.models import registry


@contextmanager
def feedback_zip(wanted: dict[str, Any]) -> Iterator[IO[bytes]]:
    """A zip of the scans with feedback that match, each in the folder of its label.

    Raises:
        ModelNotFound, NoChampion, QuotaExceeded, QueueFull
        Invalid: there are none, or too many.
        TooLarge: together they are larger than an upload may be.
    """
    with transaction() as session:
        model = registry.resolve(session, tenant(), wanted["model"]) if "model" in wanted else None
        scans = from_feedback.labelled_scans(session, tenant(), wanted.get("since"), model.id if model else None)
    _refuse_beyond_limits(scans)
    admit()
    folder = services().settings.home / SPOOL_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        from_feedback.write_zip(file, tenant(), scans, services().blobs)
        yield file


def _refuse_beyond_limits(scans: Sequence[LabelledScan]) -> None:
    settings = services().settings
    if len(scans) > settings.max_archive_members:
        most = settings.max_archive_members
        raise Invalid(f"There are {len(scans)}, and a dataset takes {most}: ask for those `since` a time.", "/truths")
    if sum(scan.size for scan in scans) > settings.max_upload_bytes:
        raise TooLarge(limit=settings.max_upload_bytes, setting="RENALQ_MAX_UPLOAD_BYTES")
