"""What was computed once and is the same next time, on disk: decoded pixels and frozen features. Bounded; what was not
used for longest goes first.

A key is a hash of everything that the content depends on, so nothing in here is ever out of date. An entry is written
beside its place and renamed: a reader finds all of it or nothing, and several trainings may share a folder.
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

log = logging.getLogger("ml")


def key_of(**parts: object) -> str:
    """A name for what depends on these parts: hex, 64 digits. They must be JSON-able."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """A folder of entries, each a folder of files, together at most `max_bytes`."""

    folder: Path
    max_bytes: int

    def find(self, key: str) -> Path | None:
        """The entry's folder, marked as used just now; None where there is none."""
        entry = self.folder / key
        try:
            os.utime(entry)
        except OSError:
            return None
        return entry

    def store(self, key: str, files: Mapping[str, np.ndarray | bytes]) -> None:
        """Keep an entry, in place of an older one; make room first. A full disk is only logged: a cache saves time."""
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
                "Nothing was left in the cache (%s); the training goes on.", error.strerror or error
            )  # numpy's has no errno
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _replace(self, partial: Path, entry: Path) -> None:
        shutil.rmtree(entry, ignore_errors=True)  # who has it open keeps its maps
        with suppress(OSError):  # another training was first: its entry is as good
            partial.rename(entry)

    def _make_room(self, size: int, key: str) -> None:
        entries = []
        for entry in self.folder.iterdir():
            if entry.name == key:
                continue  # its place is what the new one takes
            with suppress(OSError):  # removed by another training meanwhile
                held = sum(file.stat().st_size for file in entry.iterdir())
                entries.append((entry.stat().st_mtime, held, entry))
        total = sum(held for _, held, _ in entries)
        for _, held, entry in sorted(entries):
            if total + size <= self.max_bytes:
                return
            shutil.rmtree(entry, ignore_errors=True)
            total -= held


@dataclass(frozen=True)
class Cached:
    """A dataset's features under one backbone, in a cache."""

    cache: Cache
    key: str

    def entry(self) -> Path | None:
        """The folder that they are in, where they are."""
        return self.cache.find(self.key)

    def store(self, features: np.ndarray, known: np.ndarray) -> None:
        """Keep them, unless all of them are there already."""
        entry = self.entry()
        found = None if entry is None else read_features(entry)
        if found is None or found[1].shape != known.shape or (known & ~found[1]).any():
            self.cache.store(self.key, {"features.npy": features, "known.npy": known})


def read_features(entry: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Features float32 [scans, …], mapped from the file, and which scans have any: bool [scans]. None where half of
    the entry was removed just now."""
    try:
        return np.load(entry / "features.npy", mmap_mode="r"), np.load(entry / "known.npy")
    except (OSError, ValueError, EOFError):
        return None
