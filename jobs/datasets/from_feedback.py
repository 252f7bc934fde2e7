"""A dataset of truths: scans whose true class was told, as a zip with one folder a class.

Scans of one patient, as the client's keys tell patients, lie in one folder: `Tumor/patient_NUMBER/scan-HASH.png`, which
the check of a dataset reads (ml/image/dataset/patients.py). The number is a hash of tenant and key: a pseudonym, so
that the key itself does not leave its row. No file's own name is taken over, since it may be a patient's; DICOM
tells its patient by itself.
"""

import datetime as dt
import hashlib
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
from jobs.storage.blobs import Artifacts
from jobs.tables import Scan, Truth

PATIENTS = 10**15
"""More than anybody's patients: two of a million have the same number with a chance of one in two thousand."""
LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The time of every file, so that the same truths make the same bytes."""


@dataclass(frozen=True)
class Labelled:
    """A stored scan (its bytes' hash, size, kind) with its true class, and whose it is, as far as a client told."""

    sha256: str
    size: int
    media_type: str
    label: str
    patient: str | None

    def path(self, tenant_id: str) -> str:
        """Its place in the zip."""
        folder = [self.label] if self.patient is None else [self.label, _pseudonym(tenant_id, self.patient)]
        suffix = self.media_type.rpartition("/")[2].replace("tiff", "tif")
        return "/".join([*folder, f"scan-{self.sha256[:32]}.{suffix}"])


def _pseudonym(tenant_id: str, patient: str) -> str:
    digest = hashlib.sha256(f"{tenant_id}\0{patient}".encode()).digest()
    return f"patient_{int.from_bytes(digest) % PATIENTS:015}"


def labelled(
    session: Session, tenant_id: str, since: dt.datetime | None = None, model_id: uuid.UUID | None = None
) -> list[Labelled]:
    """Each scan with the latest truth that was told of it; `since` then, of predictions by this model. Whose scan it is
    any truth may say, whenever and of whichever model it was told.

    Raises:
        Invalid: there is none.
    """
    told = select(Truth.scan_id, Truth.label, Truth.patient).where(Truth.tenant_id == tenant_id)
    patients = _latest(told.where(Truth.patient.is_not(None)))
    if since is not None:
        told = told.where(Truth.at >= since)
    if model_id is not None:
        told = told.where(Truth.model_id == model_id)
    last = _latest(told)
    rows = session.execute(
        select(Scan.sha256, Scan.size, Scan.media_type, last.c.label, patients.c.patient)
        .join(last, last.c.scan_id == Scan.id)
        .join(patients, patients.c.scan_id == Scan.id, isouter=True)
        .order_by(Scan.sha256)
    )
    found = [Labelled(*row) for row in rows]
    if not found:
        detail = "No such truth is known. Tell some with POST /jobs/ID/results/SCAN_ID/truth, or ask for more of them."
        raise Invalid(detail, "/truths")
    return found


def _latest(told: Select[uuid.UUID, str, str | None]) -> Subquery:
    """Of each scan's truths the latest."""
    return told.ext(distinct_on(Truth.scan_id)).order_by(Truth.scan_id, Truth.id.desc()).subquery()


def write_zip(target: IO[bytes], tenant_id: str, scans: Sequence[Labelled], artifacts: Artifacts) -> None:
    """Write the zip. Images are packed already, so they are stored as they are.

    Raises:
        Invalid: the bytes of a scan are no longer stored.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for scan in scans:
            member = zipfile.ZipInfo(scan.path(tenant_id), LONG_AGO)
            member.file_size = scan.size
            try:
                with artifacts.open(scan.sha256) as source, archive.open(member, "w") as sink:
                    shutil.copyfileobj(source, sink)
            except FileNotFoundError:
                detail = f"The scan with the SHA-256 {scan.sha256} is no longer stored. Store it with POST /scans."
                raise Invalid(detail, "/truths") from None
