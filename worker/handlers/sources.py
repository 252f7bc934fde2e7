"""A scan's bytes, from wherever they are: the store of blobs, or an address that a manifest named."""

import uuid
from dataclasses import dataclass
from pathlib import Path

from ml.runtime.errors import ImageError
from worker.execution.resources import Resources
from worker.handlers.fetch import FetchFailed, fetch


@dataclass(frozen=True)
class Wanted:
    """A scan to look at once, and the ordinals of its job that want it. It is stored, or to be fetched (`url`)."""

    ordinals: list[int]
    sha256: str | None
    url: str | None
    scan_id: uuid.UUID | None = None


class ScanUnavailable(ImageError):
    """The scan's bytes cannot be had: why, and whether another try may help."""

    def __init__(self, code: str, detail: str, retryable: bool = False) -> None:
        super().__init__(detail)
        self.code, self.retryable = code, retryable


def bring(resources: Resources, wanted: Wanted, folder: Path) -> bytes | Path:
    """The scan's content; a copy that had to be made does not stay in the folder.

    Raises:
        ScanUnavailable
    """
    try:
        if wanted.sha256 is None:
            path = fetch(wanted.url or "", folder, resources.settings)
        else:
            path = resources.artifacts.fetch(wanted.sha256, folder)
    except FetchFailed as error:
        raise ScanUnavailable(error.code, str(error), error.retryable) from error
    except FileNotFoundError as error:
        detail = "The scan is no longer stored. Store it again with POST /scans."
        raise ScanUnavailable("SCAN_MISSING", detail) from error
    if not path.is_relative_to(folder):
        return path
    content = path.read_bytes()
    path.unlink()
    return content
