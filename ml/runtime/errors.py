"""What can go wrong in the pipeline, one exception for each fact.

PipelineError
├── BadDataset          BAD_DATASET       the scans cannot be trained on
├── BadParams           BAD_PARAMS        a field of params or config is wrong
├── DownloadFailed      DOWNLOAD_FAILED   the source did not hand out the file
├── WeightsMissing      WEIGHTS_MISSING   ImageNet weights are nowhere to be had
├── BadCheckpoint       BAD_CHECKPOINT    a checkpoint is torn, foreign, or of another training
├── EngineNotAdmitted   ENGINE_NOT_ADMITTED  the precision asked for is not here, or changes what the network says
├── DeviceOutOfMemory   DEVICE_OOM        the device or the machine has too little memory
└── StorageFull         STORAGE_FULL      the disk is full

ValueError
├── ImageError          one scan cannot be read
├── ArchiveError        a zip is broken or unsafe
└── ModelFileError      a model file is not one of ours
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class PipelineError(Exception):
    """A failure with a stable code, a sentence that says what to do, and whether trying again can help."""

    code = "INTERNAL"
    retryable = False


class BadDataset(PipelineError):
    """The scans cannot be trained on; the message names the reasons and the files."""

    code = "BAD_DATASET"


class BadParams(PipelineError):
    """A field of the parameters or of the configuration is wrong; the message names it."""

    code = "BAD_PARAMS"


class DownloadFailed(PipelineError):
    """The source did not hand out the file. Networks recover, so trying again can help."""

    code = "DOWNLOAD_FAILED"
    retryable = True


class WeightsMissing(PipelineError):
    """ImageNet weights are in no cache and could not be downloaded; the message says what to put where."""

    code = "WEIGHTS_MISSING"


class BadCheckpoint(PipelineError):
    """A checkpoint is torn, is no checkpoint of ours, or belongs to another training; the message says which.

    Not retryable with the same file: whoever has an older checkpoint resumes from that one, else from the beginning.
    """

    code = "BAD_CHECKPOINT"


class EngineNotAdmitted(PipelineError):
    """The precision asked for is not in the machine's hardware, or changes too much of what this network says."""

    code = "ENGINE_NOT_ADMITTED"


class DeviceOutOfMemory(PipelineError):
    """The device or the machine has too little memory, also for half a batch. The same again would end the same."""

    code = "DEVICE_OOM"

    def __init__(self) -> None:
        super().__init__(
            "The device ran out of memory: use a smaller batch_size or image_size, or wait until the device is free."
        )


class StorageFull(PipelineError):
    """The disk has no room left; files written before are whole."""

    code = "STORAGE_FULL"
    retryable = True


class ItemError(ValueError):
    """One item cannot be read. The sentence carries neither patient data nor content of the file."""

    code = "BAD_ITEM"
    retryable = False


class ImageError(ItemError):
    """One scan cannot be read as a picture."""

    code = "BAD_IMAGE"


class ArchiveError(ValueError):
    """A zip is broken or unsafe; nothing of it was kept."""


class ModelFileError(ValueError):
    """A model file is not a RenalQ safetensors file."""


def as_pipeline_error(error: BaseException) -> PipelineError:
    """The pipeline error that says the same as `error`; what nobody foresaw becomes INTERNAL, without its text."""
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
    """DeviceOutOfMemory in place of whatever torch, OpenVINO or numpy raise for want of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise DeviceOutOfMemory from error
        raise


def is_storage_full(error: BaseException) -> bool:
    """Whether the disk, or the owner's quota on it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the machine.

    torch raises OutOfMemoryError (a RuntimeError) on CUDA, but a plain RuntimeError from its CPU allocator and from
    cuBLAS and cuDNN; OpenVINO says it in a RuntimeError's text, or passes C++'s bad_alloc on.
    """
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS))


_SIGNS = ("out of memory", "can't allocate memory", "failed to allocate", "bad_alloc", "alloc_failed")
