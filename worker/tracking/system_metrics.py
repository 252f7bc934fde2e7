"""What the machine does while a training runs: processors, memory, GPUs. What cannot be measured is left out."""

import shutil
import subprocess
import time
from functools import cache
from typing import Any

import structlog

log = structlog.get_logger()

MIB = 1024**2
GPU_SECONDS = 5.0
"""nvidia-smi hangs where a driver does; then nobody waits for it longer."""
QUERY = ("--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits")


class Machine:
    """Measures the whole machine, and one process with all its children. The names are those of MLflow's own monitor,
    `training_…` beside them is the process. Percent of processors: 100 is all of the machine's, or one of a process's.
    """

    def __init__(self) -> None:
        self._pid: int | None = None
        self._used: tuple[float, float] | None = None  # processor seconds, and when they were read

    def watch(self, pid: int | None) -> None:
        """Measure this process from now on, or none."""
        self._pid, self._used = pid, None

    def sample(self) -> dict[str, float]:
        """The figures now; of processors, the mean since the sample before. Raises nothing."""
        figures: dict[str, float] = {}
        for part in (_machine, self._process, _gpus):
            try:
                figures |= part()
            except Exception as error:  # psutil, /proc and nvidia-smi each fail in ways of their own
                log.debug("not_measured", what=part.__name__, error=type(error).__name__)
        return {f"system/{name}": value for name, value in figures.items()}

    def _process(self) -> dict[str, float]:
        if self._pid is None:
            return {}
        seconds, memory = _tree(self._pid)
        read, before = time.monotonic(), self._used
        self._used = seconds, read
        found = {"training_memory_usage_megabytes": memory / MIB}
        if before is not None and read > before[1]:
            share = max(0.0, seconds - before[0]) / (read - before[1])  # a child that ended takes its seconds along
            found["training_cpu_utilization_percentage"] = 100 * share
        return found


def _machine() -> dict[str, float]:
    import psutil

    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MIB,
        "system_memory_usage_percentage": memory.percent,
    }


def _tree(pid: int) -> tuple[float, float]:
    """Processor seconds, and resident bytes, of a process and its children."""
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


def _gpus() -> dict[str, float]:
    program = _nvidia_smi()
    if program is None:
        return {}
    done = subprocess.run([program, *QUERY], capture_output=True, text=True, timeout=GPU_SECONDS, check=True)
    return gpu_figures(done.stdout)


@cache
def _nvidia_smi() -> str | None:
    return shutil.which("nvidia-smi")


def gpu_figures(lines: str) -> dict[str, float]:
    """nvidia-smi's lines `index, utilization in %, memory in MiB`; what a GPU does not tell ([N/A]) is left out."""
    found: dict[str, float] = {}
    for line in lines.splitlines():
        index, utilization, memory = (cell.strip() for cell in line.split(","))
        figures = {"utilization_percentage": utilization, "memory_usage_megabytes": memory}
        found |= {f"gpu_{index}_{name}": float(cell) for name, cell in figures.items() if cell.isdigit()}
    return found
