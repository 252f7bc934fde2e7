"""Content-addressed blob store: in a local folder, or at any fsspec URL such as S3.

A blob is written to a temporary file, flushed to disk and then renamed, so that no partial blob is ever visible. Equal
bytes are stored once.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

BLOCK = 1024 * 1024


@dataclass(frozen=True)
class Blob:
    """Stored bytes: their SHA-256 in hex, and their number."""

    sha256: str
    size: int


class BlobStore:
    """A store of blobs.

    Args:
        url: a folder, or an fsspec URL such as `s3://bucket/prefix`.
    """

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = Path(self._root) if "file" in _protocols(self._fs) else None

    def put(self, stream: IO[bytes]) -> Blob:
        """Store the rest of the stream. Raises OSError if the disk is full; nothing is left behind then."""
        with self._temporary() as (temporary, file):
            digest, size = hashlib.sha256(), 0
            while block := stream.read(BLOCK):
                digest.update(block)
                size += len(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            blob = Blob(digest.hexdigest(), size)
            self._name(temporary, blob.sha256)
        return blob

    def put_file(self, path: Path) -> Blob:
        """Store a file's content."""
        with path.open("rb") as stream:
            return self.put(stream)

    def open(self, sha256: str) -> IO[bytes]:
        """A blob for reading. Raises FileNotFoundError."""
        stream: IO[bytes] = self._fs.open(self._key(sha256), "rb")
        return stream

    def exists(self, sha256: str) -> bool:
        """Whether the blob is stored."""
        return bool(self._fs.exists(self._key(sha256)))

    def fetch(self, sha256: str, folder: Path) -> Path:
        """A local file with the blob's content: the stored file itself if local, otherwise a copy in `folder`."""
        if self._local is not None:
            return Path(self._key(sha256))
        target = folder / sha256
        if not target.exists():
            self._fs.get_file(self._key(sha256), str(target))
        return target

    def delete(self, sha256: str) -> None:
        """Remove a blob. A missing one is no error."""
        if self.exists(sha256):
            self._fs.rm_file(self._key(sha256))

    # --- named files, which are hashed but not addressed by their hash: checkpoints ---

    def move_in(self, path: Path, name: str) -> Blob:
        """Move a complete, flushed file into the store under a name: by rename if on the same file system."""
        blob = _hashed(path)
        target = f"{self._root}/{name}"
        self._fs.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH120  (a name is a URL's path, not ours)
        if self._local is None:
            self._fs.put_file(str(path), target)
            path.unlink()
        else:
            _move(path, Path(target))
        return blob

    def fetch_named(self, name: str, sha256: str, folder: Path) -> Path | None:
        """A local file with that name's content; None if it is missing or has another hash."""
        target = Path(self._root) / name if self._local is not None else folder / Path(name).name
        try:
            if self._local is None:
                self._fs.get_file(f"{self._root}/{name}", str(target))
            return target if _hashed(target).sha256 == sha256 else None
        except FileNotFoundError:
            return None

    def remove_named(self, name: str) -> None:
        """Remove a named file. A missing one is no error."""
        if self._fs.exists(f"{self._root}/{name}"):
            self._fs.rm_file(f"{self._root}/{name}")

    def folders(self, name: str) -> list[str]:
        """Names of the entries of a folder; none if it is missing."""
        if not self._fs.exists(f"{self._root}/{name}"):
            return []
        return [Path(entry).name for entry in self._fs.ls(f"{self._root}/{name}", detail=False)]

    def remove_folder(self, name: str) -> None:
        """Remove a folder with its contents."""
        self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _key(self, sha256: str) -> str:
        # Two levels of folders: one with a million files is slow on most file systems.
        return f"{self._root}/{sha256[:2]}/{sha256[2:4]}/{sha256}"

    def _name(self, temporary: Path, sha256: str) -> None:
        key = self._key(sha256)
        if self._fs.exists(key):
            return
        self._fs.makedirs(os.path.dirname(key), exist_ok=True)  # noqa: PTH120  (a key is a URL's path, not ours)
        if self._local is None:
            self._fs.put_file(str(temporary), key)
        else:
            temporary.replace(key)
            sync(Path(key).parent)

    @contextmanager
    def _temporary(self) -> Iterator[tuple[Path, IO[bytes]]]:
        """A temporary file on the store's file system, removed at the end unless it was renamed."""
        folder = self._local / "incoming" if self._local else Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                yield Path(name), file
        finally:
            Path(name).unlink(missing_ok=True)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _hashed(path: Path) -> Blob:
    with path.open("rb") as file:
        return Blob(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def _move(path: Path, target: Path) -> None:
    """Rename; between file systems, copy to a temporary file beside the target first."""
    try:
        path.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f".{target.name}.partial")
        try:
            shutil.copyfile(path, beside)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        path.unlink()
    sync(target.parent)


def sync(path: Path) -> None:
    """fsync a file, or a folder so that the names in it survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
