"""Content-addressed blob store: in a local folder, or at any fsspec URL such as S3.

A blob is written to a temporary file, flushed to disk and then renamed, so that no partial blob is ever visible. Equal
bytes are stored once.
"""

import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

BLOCK = 1024 * 1024
ASIDE = "released"
"""Folder of blobs that no row refers to and that are deleted soon."""
INCOMING = "incoming"
"""Folder of files that are being written."""


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
        # No cache of listings: other processes change the store, and a listing of all of it would stay in memory.
        self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
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
        try:
            stream: IO[bytes] = self._fs.open(self._key(sha256), "rb")
        except FileNotFoundError:
            stream = self._fs.open(self._aside(sha256), "rb")
        return stream

    def exists(self, sha256: str) -> bool:
        """Whether the blob is stored."""
        return bool(self._fs.exists(self._key(sha256)))

    def holds(self, sha256: str) -> bool:
        """Whether `open` and `fetch` find the blob: also one that was set aside."""
        return self.exists(sha256) or bool(self._fs.exists(self._aside(sha256)))

    def fetch(self, sha256: str, folder: Path) -> Path:
        """A local file with the blob's content: the stored file itself if local, otherwise a copy in `folder`."""
        if self._local is not None:
            stored, aside = Path(self._key(sha256)), Path(self._aside(sha256))
            return aside if aside.exists() and not stored.exists() else stored
        target = folder / sha256
        if not target.exists():
            try:
                self._fs.get_file(self._key(sha256), str(target))
            except FileNotFoundError:
                self._fs.get_file(self._aside(sha256), str(target))
        return target

    # --- deletion, in two steps: see jobs/retention/blobs.py ---

    def set_aside(self, sha256: str) -> None:
        """Move a blob aside: `open` and `fetch` still find it, `put` stores it anew. A missing one is no error."""
        self._rename(self._key(sha256), self._aside(sha256))

    def put_back(self, sha256: str) -> None:
        """Undo `set_aside`."""
        if self.exists(sha256):
            self.delete_aside(sha256)
        else:
            self._rename(self._aside(sha256), self._key(sha256))

    def delete_aside(self, sha256: str) -> None:
        """Delete a blob that was set aside. A missing one is no error."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._aside(sha256))

    def remove_partial(self, seconds: float) -> None:
        """Remove what processes that died have left half-written in the local folder, if it is older than this."""
        for path in (self._local / INCOMING).glob("*") if self._local is not None else ():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - seconds:
                    path.unlink()

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

    def entries(self, folder: str) -> list[str]:
        """Names of what is in a folder, as the store is now; none if it is missing."""
        try:
            return [Path(entry).name for entry in self._fs.ls(f"{self._root}/{folder}", detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove_folder(self, name: str) -> None:
        """Remove a folder with its contents. A missing one is no error."""
        with suppress(FileNotFoundError):
            self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _key(self, sha256: str, above: str = "") -> str:
        # Two levels of folders: one with a million files is slow on most file systems.
        return f"{self._root}/{above}{sha256[:2]}/{sha256[2:4]}/{sha256}"

    def _aside(self, sha256: str) -> str:
        return self._key(sha256, f"{ASIDE}/")

    def _rename(self, source: str, target: str) -> None:
        if self._local is None:
            with suppress(FileNotFoundError):
                self._fs.cp_file(source, target)
                self._fs.rm_file(source)
        elif Path(source).exists():
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            Path(source).replace(target)

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
        folder = self._local / INCOMING if self._local else Path(tempfile.gettempdir())
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
