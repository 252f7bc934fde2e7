"""Blobs under their content hash: in a local folder, or at any fsspec URL (S3 and the like).

A blob is written whole to a temporary file, flushed to the disk, and only then given its name: nobody ever sees half of
one. The same bytes are stored once.
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
    """Stored bytes: their SHA-256 in hex, and how many they are."""

    sha256: str
    size: int


class Artifacts:
    """A store of blobs.

    Args:
        url: a folder, or an fsspec URL such as `s3://bucket/prefix`.
    """

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = Path(self._root) if "file" in _protocols(self._fs) else None

    def put(self, stream: IO[bytes]) -> Blob:
        """Store what the stream still holds. Raises OSError where the disk is full; nothing is left behind then."""
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
        """Whether the blob is here."""
        return bool(self._fs.exists(self._key(sha256)))

    def fetch(self, sha256: str, folder: Path) -> Path:
        """A local file with the blob's content: the store's own where it is a folder, else a copy in `folder`."""
        if self._local is not None:
            return Path(self._key(sha256))
        target = folder / sha256
        if not target.exists():
            self._fs.get_file(self._key(sha256), str(target))
        return target

    def delete(self, sha256: str) -> None:
        """Remove a blob; one that is not here is removed already."""
        if self.exists(sha256):
            self._fs.rm_file(self._key(sha256))

    # --- files under a name of their own, which are hashed but not found by their hash: checkpoints ---

    def take_in(self, path: Path, name: str) -> Blob:
        """Move a whole, flushed file into the store under a name. On one file system it is not copied."""
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
        """A local file with that name's content; None where it is missing or its content is another."""
        target = Path(self._root) / name if self._local is not None else folder / Path(name).name
        try:
            if self._local is None:
                self._fs.get_file(f"{self._root}/{name}", str(target))
            return target if _hashed(target).sha256 == sha256 else None
        except FileNotFoundError:
            return None

    def remove_named(self, name: str) -> None:
        """Remove a file; one that is not here is removed already."""
        if self._fs.exists(f"{self._root}/{name}"):
            self._fs.rm_file(f"{self._root}/{name}")

    def folders(self, name: str) -> list[str]:
        """The names of the folders in a folder."""
        if not self._fs.exists(f"{self._root}/{name}"):
            return []
        return [Path(entry).name for entry in self._fs.ls(f"{self._root}/{name}", detail=False)]

    def remove_folder(self, name: str) -> None:
        """Remove a folder with all that is in it."""
        self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _key(self, sha256: str) -> str:
        # Two levels of folders: a single one with a million files is slow to walk on most file systems.
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
        """A temporary file on the store's own file system, gone at the end unless it was given a name."""
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
    """Rename, by way of a copy beside the target where they lie on two file systems."""
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
    """Make a file, or the names in a folder, last through a power cut (fsync(2): the folder holds the name)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
