"""Errors of a run, one exception per fact.

PipelineError
├── BadDataset          BAD_DATASET          the dataset cannot be trained on
├── BadParams           BAD_PARAMS           a field of params or config is wrong
├── DownloadFailed      DOWNLOAD_FAILED      the source did not deliver the file
├── WeightsMissing      WEIGHTS_MISSING      initial weights cannot be found or downloaded
├── BadCheckpoint       BAD_CHECKPOINT       a checkpoint is damaged, or of another training
├── EngineNotAdmitted   ENGINE_NOT_ADMITTED  the requested precision is not supported, or not admitted for the network
├── DeviceOutOfMemory   DEVICE_OOM           the device or the machine has too little memory
└── StorageFull         STORAGE_FULL         the disk is full

ValueError
├── ItemError           one item cannot be read
│   └── ImageError      one scan cannot be read as a picture
├── ArchiveError        a zip is damaged or unsafe
└── ModelFileError      a file is not a RenalQ model file
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class PipelineError(Exception):
    """A failure with a stable `code`, a message that says what to do, and `retryable`: trying again can help."""

    code = "INTERNAL"
    retryable = False


class BadDataset(PipelineError):
    """The dataset cannot be trained on; the message has the reasons, with file names."""

    code = "BAD_DATASET"


class BadParams(PipelineError):
    """A field of the parameters or of the configuration is wrong; the message names it."""

    code = "BAD_PARAMS"


class DownloadFailed(PipelineError):
    """The source did not deliver the file. Networks recover, so trying again can help."""

    code = "DOWNLOAD_FAILED"
    retryable = True


class WeightsMissing(PipelineError):
    """Initial weights were not found and could not be downloaded; the message says which file to put where."""

    code = "WEIGHTS_MISSING"


class BadCheckpoint(PipelineError):
    """A checkpoint is damaged, no RenalQ checkpoint, or of another training; the message says which.

    Not retryable with the same file: resume from an older checkpoint, or start from the beginning.
    """

    code = "BAD_CHECKPOINT"


class EngineNotAdmitted(PipelineError):
    """The requested precision is not supported by the hardware, or changes this network's predictions too much."""

    code = "ENGINE_NOT_ADMITTED"


class DeviceOutOfMemory(PipelineError):
    """The device or the machine has too little memory even for half a batch. Trying again would not help."""

    code = "DEVICE_OOM"

    def __init__(self) -> None:
        super().__init__(
            "The device ran out of memory: use a smaller batch_size or image_size, or wait until the device is free."
        )


class StorageFull(PipelineError):
    """The disk is full; files written before are complete."""

    code = "STORAGE_FULL"
    retryable = True


class ItemError(ValueError):
    """One item cannot be read. The message contains neither patient data nor content of the file.

    `identity`: whose it is, where the file tells so nevertheless; never shown in the message.
    """

    code = "BAD_ITEM"
    retryable = False
    identity: Any = None


class ImageError(ItemError):
    """One scan cannot be read as a picture."""

    code = "BAD_IMAGE"


class ArchiveError(ValueError):
    """A zip is damaged or unsafe; nothing of it was extracted."""


class ModelFileError(ValueError):
    """A model file is not a RenalQ safetensors file."""


def as_pipeline_error(error: BaseException) -> PipelineError:
    """The pipeline error for any error; unexpected ones become INTERNAL, without their text."""
    if isinstance(error, PipelineError):
        return error
    if is_storage_full(error):
        return StorageFull("The disk is full: free some space and start the job again.")
    if isinstance(error, ArchiveError):
        return BadDataset(str(error))
    if isinstance(error, ModelFileError):
        return BadParams(f"The stage before has left no network to use: {error}")
    if is_out_of_memory(error):
        return DeviceOutOfMemory()
    return PipelineError(f"An unforeseen {type(error).__name__} ended the run; the log has its traceback.")


@contextmanager
def naming_out_of_memory() -> Iterator[None]:
    """Convert the out-of-memory errors of torch, OpenVINO and numpy to DeviceOutOfMemory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise DeviceOutOfMemory from error
        raise


def is_storage_full(error: BaseException) -> bool:
    """Whether the disk, or a quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine is out of memory.

    On CUDA torch raises OutOfMemoryError (a RuntimeError), but its CPU allocator, cuBLAS and cuDNN raise a plain
    RuntimeError; OpenVINO raises a RuntimeError with a text, or passes on C++'s bad_alloc.
    """
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS))


_SIGNS = ("out of memory", "can't allocate memory", "failed to allocate", "bad_alloc", "alloc_failed")
