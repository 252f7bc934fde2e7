"""Atomic safetensors files: a temporary file beside the target, fsync, rename, fsync of the folder.

After a kill -9 a temporary file may remain (its name begins with a dot); the target is either the old or the new one.

Equal contents give equal bytes: safetensors sorts the tensors, and writes several keys of metadata in the order of a
hash table, which differs from process to process. So there is one key, with a JSON text in the order of its names.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write(tensors: Mapping[str, Tensor], path: Path, key: str, metadata: Mapping[str, Any]) -> None:
    """Write `path` atomically, with `metadata` as JSON under `key`.

    OSError if the system refuses; an existing file is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _save(tensors, partial, {key: json.dumps(metadata, sort_keys=True)})
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(plain, str(path), metadata)
    except SafetensorError as error:
        raise _as_os_error(error) from error


def _as_os_error(error: SafetensorError) -> OSError:
    # safetensors is written in Rust: its errors have no errno, only the text "… I/O error: … (os error 28)".
    for number in (errno.ENOSPC, errno.EDQUOT):
        if f"(os error {number})" in str(error):
            return OSError(number, os.strerror(number))
    return OSError(errno.EIO, f"safetensors could not write the file ({error}).")


def reserve(descriptor: int, size: int) -> None:
    """Allocate a file's blocks before mapping it: a full disk is an OSError here, but a SIGBUS in mapped memory."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(descriptor, 0, size)


def sync(path: Path) -> None:
    """fsync of a file, or of a folder, so that a rename survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
