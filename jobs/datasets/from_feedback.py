"""A dataset from feedback: scans with their true labels, as a zip with one folder per class.

Scans with the same patient key are in one folder, `Tumor/patient_NUMBER/scan-HASH.png`, and patients.csv says the same,
as it overrules what DICOM files say of their patients. The number is a hash of tenant and key: a pseudonym, so that the
key stays in the database. Original file names are not used, since they may contain a patient's name; a DICOM file
without a key has its own patient id.
"""

import csv
import datetime as dt
import hashlib
import io
import shutil
import uuid
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from sqlalchemy import Select, Subquery, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from jobs.errors import Invalid
from jobs.storage.blobs import BlobStore
from jobs.tables import Scan, Truth
from ml.spec.junk_files import PATIENT_LIST

PSEUDONYMS = 10**15
"""Number of pseudonyms: among a million patients, the chance of any collision is one in two thousand."""
ZIP_TIMESTAMP = (1980, 1, 1, 0, 0, 0)
"""Timestamp of every file, so that equal feedback makes equal bytes."""


@dataclass(frozen=True)
class LabelledScan:
    """A stored scan with its true label, and the client's patient key if there is one."""

    sha256: str
    size: int
    media_type: str
    label: str
    patient: str | None

    def path(self, tenant_id: str) -> str:
        """The file's name in the zip."""
        folder = (
            [self.label] if self.patient is None else [self.label, f"patient_{_pseudonym(tenant_id, self.patient)}"]
        )
        suffix = self.media_type.rpartition("/")[2]
        return "/".join([*folder, f"scan-{self.sha256[:32]}.{suffix}"])


def _pseudonym(tenant_id: str, patient: str) -> str:
    digest = hashlib.sha256(f"{tenant_id}\0{patient}".encode()).digest()
    return f"{int.from_bytes(digest) % PSEUDONYMS:015}"


def labelled_scans(
    session: Session, tenant_id: str, since: dt.datetime | None = None, model_id: uuid.UUID | None = None
) -> list[LabelledScan]:
    """Scans with their latest feedback; only feedback `since` then, and on predictions by this model, if given. The
    patient key may come from any feedback on the scan.

    Raises:
        Invalid: there is no such feedback.
    """
    feedback = select(Truth.scan_id, Truth.label, Truth.patient).where(Truth.tenant_id == tenant_id)
    patients = _latest(feedback.where(Truth.patient.is_not(None)))
    if since is not None:
        feedback = feedback.where(Truth.at >= since)
    if model_id is not None:
        feedback = feedback.where(Truth.model_id == model_id)
    last = _latest(feedback)
    rows = session.execute(
        select(Scan.sha256, Scan.size, Scan.media_type, last.c.label, patients.c.patient)
        .join(last, last.c.scan_id == Scan.id)
        .join(patients, patients.c.scan_id == Scan.id, isouter=True)
        .order_by(Scan.sha256)
    )
    found = [LabelledScan(*row) for row in rows]
    if not found:
        detail = "No such truth is known. Tell some with POST /jobs/ID/results/SCAN_ID/truth, or ask for more of them."
        raise Invalid(detail, "/truths")
    return found


def _latest(feedback: Select[uuid.UUID, str, str | None]) -> Subquery:
    """The latest feedback of each scan."""
    return feedback.ext(distinct_on(Truth.scan_id)).order_by(Truth.scan_id, Truth.id.desc()).subquery()


def write_zip(target: IO[bytes], tenant_id: str, scans: Sequence[LabelledScan], store: BlobStore) -> None:
    """Write the zip without compression, since images are compressed already.

    Raises:
        Invalid: a scan's file is no longer stored.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for scan in scans:
            member = zipfile.ZipInfo(scan.path(tenant_id), ZIP_TIMESTAMP)
            member.file_size = scan.size
            try:
                with store.open(scan.sha256) as source, archive.open(member, "w") as sink:
                    shutil.copyfileobj(source, sink)
            except FileNotFoundError:
                detail = f"The scan with the SHA-256 {scan.sha256} is no longer stored. Store it with POST /scans."
                raise Invalid(detail, "/truths") from None
        keyed = [
            (scan.path(tenant_id), _pseudonym(tenant_id, scan.patient)) for scan in scans if scan.patient is not None
        ]
        if keyed:
            archive.writestr(zipfile.ZipInfo(PATIENT_LIST, ZIP_TIMESTAMP), _patient_list(keyed))


def _patient_list(rows: Sequence[tuple[str, str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([("path", "patient"), *rows])
    return text.getvalue()
