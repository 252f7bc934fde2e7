"""System metrics during a training: CPU, memory, GPUs. What cannot be measured is left out."""

import shutil
import subprocess
import time
from functools import cache
from typing import Any

import structlog

log = structlog.get_logger()

MIB = 1024**2
GPU_SECONDS = 5.0
"""Timeout of nvidia-smi, which hangs if the driver does."""
NVIDIA_SMI_QUERY = ("--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits")


class SystemMetrics:
    """Measures the whole machine, and one process with all its children.

    The names are those of MLflow's own monitor; `training_…` are the process. CPU in percent: 100 is all CPUs of the
    machine, or one CPU of the process.
    """

    def __init__(self) -> None:
        self._pid: int | None = None
        self._used: tuple[float, float] | None = None  # CPU seconds, and when they were read

    def measure(self, pid: int | None) -> None:
        """Measure this process from now on, or none."""
        self._pid, self._used = pid, None

    def sample(self) -> dict[str, float]:
        """The metrics now; CPU as the mean since the previous sample. Raises nothing."""
        figures: dict[str, float] = {}
        for part in (_system_figures, self._process, _gpu_figures):
            try:
                figures |= part()
            except Exception as error:  # psutil, /proc and nvidia-smi raise many kinds of errors
                log.debug("metric_unavailable", source=part.__name__, error=type(error).__name__)
        return {f"system/{name}": value for name, value in figures.items()}

    def _process(self) -> dict[str, float]:
        if self._pid is None:
            return {}
        seconds, memory = _usage_of_tree(self._pid)
        read, before = time.monotonic(), self._used
        self._used = seconds, read
        found = {"training_memory_usage_megabytes": memory / MIB}
        if before is not None and read > before[1]:
            share = max(0.0, seconds - before[0]) / (read - before[1])  # the seconds of ended children are gone
            found["training_cpu_utilization_percentage"] = 100 * share
        return found


def _system_figures() -> dict[str, float]:
    import psutil

    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MIB,
        "system_memory_usage_percentage": memory.percent,
    }


def _usage_of_tree(pid: int) -> tuple[float, float]:
    """CPU seconds and resident bytes of a process and its children."""
    import psutil

    parent, seconds, memory = psutil.Process(pid), 0.0, 0.0
    for process in (parent, *parent.children(recursive=True)):
        try:
            times: Any = process.cpu_times()
            seconds += times.user + times.system
            memory += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return seconds, memory


def _gpu_figures() -> dict[str, float]:
    program = _nvidia_smi()
    if program is None:
        return {}
    done = subprocess.run([program, *NVIDIA_SMI_QUERY], capture_output=True, text=True, timeout=GPU_SECONDS, check=True)
    return parse_nvidia_smi(done.stdout)


@cache
def _nvidia_smi() -> str | None:
    return shutil.which("nvidia-smi")


def parse_nvidia_smi(lines: str) -> dict[str, float]:
    """Metrics from lines `index, utilization in %, memory in MiB`; unavailable values ([N/A]) are left out."""
    found: dict[str, float] = {}
    for line in lines.splitlines():
        index, utilization, memory = (cell.strip() for cell in line.split(","))
        figures = {"utilization_percentage": utilization, "memory_usage_megabytes": memory}
        found |= {f"gpu_{index}_{name}": float(cell) for name, cell in figures.items() if cell.isdigit()}
    return found
