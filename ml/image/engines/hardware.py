"""What this machine can compute: devices, dtypes and CPU features."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from ml.image.engines import openvino_import
from ml.image.engines.engine import Dtype


def training_device() -> torch.device:
    """The device that training and explanations run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def supported_dtypes() -> tuple[Dtype, ...]:
    """The dtypes that this machine computes in hardware, fastest first; the last one is fp32."""
    if torch.cuda.is_available():
        return ("bf16", "fp32") if torch.cuda.is_bf16_supported() else ("fp32",)
    if not openvino_import.is_installed():
        return ("fp32",)
    int8: tuple[Dtype, ...] = ("int8",) if cpu_flags() & {"amx_int8", "avx512_vnni", "avx_vnni"} else ()
    bf16: tuple[Dtype, ...] = ("bf16",) if cpu_has_bf16() else ()
    return *int8, *bf16, "fp32"


def device_name() -> str:
    """A description of the device for people, and for a model's metadata."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads" + (", bf16" if cpu_has_bf16() else "")


def device_has_bf16() -> bool:
    """Whether the training device multiplies bf16 in hardware."""
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; emulated bf16 is slower than fp32."""
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16"})


@cache
def cpu_flags() -> frozenset[str]:
    """The CPU's feature flags under their Linux names; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())
