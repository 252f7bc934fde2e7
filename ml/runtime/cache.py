"""A disk cache for decoded pixels and frozen features, of bounded size; least recently used entries are removed first.

A key is a hash of everything that the content depends on, so entries never become outdated. An entry is written to a
temporary folder and renamed: readers see all of it or nothing, and several trainings may share the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ml.spec.pipeline import CACHE_OWNERS

log = logging.getLogger("ml")


def key_of(**parts: object) -> str:
    """The key for content that depends on these parts, which must be JSON-serializable: 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """A folder of entries, each a folder of files, with at most `max_bytes` in total. `owners`: ids that new entries
    name (`ml.spec.pipeline.CACHE_OWNERS`): whoever deletes one of these deletes the entry."""

    folder: Path
    max_bytes: int
    owners: tuple[str, ...] = ()

    def find(self, key: str) -> Path | None:
        """The entry's folder, which counts as used now; None if there is no such entry."""
        entry = self.folder / key
        try:
            os.utime(entry)
        except OSError:
            return None
        return entry

    def store(self, key: str, files: Mapping[str, np.ndarray | bytes]) -> None:
        """Store an entry, replacing an older one, and removing others if necessary. A full disk is only logged."""
        if self.owners:
            files = {**files, CACHE_OWNERS: "\n".join(self.owners).encode()}
        size = sum(len(content) if isinstance(content, bytes) else content.nbytes for content in files.values())
        if size > self.max_bytes:
            return
        partial = self.folder / f".{uuid.uuid4().hex}.partial"
        try:
            partial.mkdir(parents=True)
            self._make_room(size, key)
            for name, content in files.items():
                if isinstance(content, bytes):
                    (partial / name).write_bytes(content)
                else:
                    np.save(partial / name, content)
            self._replace(partial, self.folder / key)
        except OSError as error:
            log.warning(
                "The cache entry could not be stored (%s); the training continues.", error.strerror or error
            )  # numpy's errors have no strerror
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _replace(self, partial: Path, entry: Path) -> None:
        shutil.rmtree(entry, ignore_errors=True)  # processes that have it open keep their memory maps
        with suppress(OSError):  # another training was faster; its entry is the same
            partial.rename(entry)

    def _make_room(self, size: int, key: str) -> None:
        entries = []
        for entry in self.folder.iterdir():
            if entry.name == key:
                continue  # it will be replaced
            with suppress(OSError):  # removed by another training in the meantime
                used = sum(file.stat().st_size for file in entry.iterdir())
                entries.append((entry.stat().st_mtime, used, entry))
        total = sum(used for _, used, _ in entries)
        for _, used, entry in sorted(entries):
            if total + size <= self.max_bytes:
                return
            shutil.rmtree(entry, ignore_errors=True)
            total -= used


@dataclass(frozen=True)
class Cached:
    """The cache entry for a dataset's features below one cut of a network."""

    cache: Cache
    key: str

    def entry(self) -> Path | None:
        """The entry's folder, if it exists."""
        return self.cache.find(self.key)

    def store(self, features: np.ndarray, known: np.ndarray) -> None:
        """Store features [scans, …] with the mask of computed ones, bool [scans], unless the cache has all of them."""
        entry = self.entry()
        found = None if entry is None else read_features(entry)
        if found is None or found[1].shape != known.shape or (known & ~found[1]).any():
            self.cache.store(self.key, {"features.npy": features, "known.npy": known})


def read_features(entry: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Memory-mapped features, float32 [scans, …], and which of them were computed, bool [scans].

    None if the entry is being removed.
    """
    try:
        return np.load(entry / "features.npy", mmap_mode="r"), np.load(entry / "known.npy")
    except (OSError, ValueError, EOFError):
        return None
