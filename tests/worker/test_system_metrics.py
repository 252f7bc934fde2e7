"""What is measured while a training runs, and what is not there to be measured."""

import subprocess
import sys
import time

import pytest

from worker.tracking import system_metrics
from worker.tracking.system_metrics import SystemMetrics, parse_nvidia_smi

WORK = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"


def test_a_process_is_measured_with_its_children() -> None:
    measured = SystemMetrics()
    parent = subprocess.Popen([sys.executable, "-c", WORK], start_new_session=True)
    try:
        measured.measure(parent.pid)
        time.sleep(0.5)
        first = measured.sample()
        assert "system/training_cpu_utilization_percentage" not in first, "a share needs two looks"
        time.sleep(1)
        second = measured.sample()
    finally:
        import os
        import signal

        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    assert second["system/training_cpu_utilization_percentage"] > 20
    assert second["system/training_memory_usage_megabytes"] > 5
    assert 0 < second["system/system_memory_usage_percentage"] <= 100


def test_an_ended_process_only_lacks_its_own_metrics() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    measured = SystemMetrics()
    measured.measure(ended.pid)
    found = measured.sample()
    assert "system/system_memory_usage_megabytes" in found
    assert "system/training_memory_usage_megabytes" not in found


def test_a_failing_program_only_lacks_its_own_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "_nvidia_smi", lambda: "/bin/false")
    assert "system/system_memory_usage_megabytes" in SystemMetrics().sample()


def test_gpus_are_read_from_what_nvidia_smi_prints() -> None:
    assert parse_nvidia_smi("0, 87, 20480\n1, [N/A], 3\n") == {
        "gpu_0_utilization_percentage": 87,
        "gpu_0_memory_usage_megabytes": 20480,
        "gpu_1_memory_usage_megabytes": 3,
    }
