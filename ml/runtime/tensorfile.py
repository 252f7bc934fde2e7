"""A safetensors file that is either whole or not there: a temporary file beside it, fsync, rename, fsync of the folder.

After a kill -9 a temporary file may stay (its name begins with a dot); the file itself is the old one or the new one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write `path` at once. OSError where the system refuses; whatever was there before is then still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _save(tensors, partial, metadata)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(ready, str(path), metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise _as_os_error(error) from error


def _as_os_error(error: SafetensorError) -> OSError:
    # safetensors is Rust: a refused write comes without its errno, as "… I/O error: … (os error 28)".
    for number in (errno.ENOSPC, errno.EDQUOT):
        if f"(os error {number})" in str(error):
            return OSError(number, os.strerror(number))
    return OSError(errno.EIO, f"safetensors could not write the file ({error}).")


def reserve(descriptor: int, size: int) -> None:
    """Take a file's blocks before it is mapped: a full disk is an OSError here, and would be a SIGBUS in the map."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(descriptor, 0, size)


def sync(path: Path) -> None:
    """fsync of a file or, so that a rename survives a power cut, of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
