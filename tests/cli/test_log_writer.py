"""What services print comes whole into files of bounded size, whatever happens to the log writer."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.stack.log_writer import OLD_COPIES, LogWriter
from tests.process_tree import alive, eventually

REPOSITORY = Path(__file__).parents[2]
LOG_BYTES = 100_000
LINE = "print(f'line {n:06} of many, with a name in it: Müller ✓', flush=True)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "logs"


@pytest.fixture
def writer(tmp_path: Path, folder: Path) -> Iterator[LogWriter]:
    lock = os.open(tmp_path / "stack.lock", os.O_CREAT | os.O_RDWR)
    writer = LogWriter(folder, lock, LOG_BYTES)
    yield writer
    writer.close()
    assert alive([writer.pid]) == []
    os.close(lock)


def print_lines(writer: LogWriter, first: int, last: int) -> None:
    """A service that prints numbered lines, and ends."""
    command = [sys.executable, "-X", "utf8", "-c", f"for n in range({first}, {last}): {LINE}"]
    subprocess.run(command, stdout=writer.pipe("api"), check=True, timeout=30)


def numbers(text: str) -> list[int]:
    return [int(line.split()[1]) for line in text.splitlines() if line.startswith("line ")]


def files(folder: Path) -> list[Path]:
    """All files of the log, oldest first."""
    return [*sorted(folder.glob("api.log.*"), reverse=True), folder / "api.log"]


def written(folder: Path) -> list[int]:
    return numbers("".join(file.read_text() for file in files(folder)))


def test_no_line_is_lost_or_divided_by_rotation(writer: LogWriter, folder: Path) -> None:
    print_lines(writer, 0, 5_000)
    writer.flush("api")
    assert written(folder) == list(range(5_000))
    assert len(files(folder)) > 2
    assert all(file.read_text().startswith("line ") for file in files(folder))


def test_the_files_do_not_grow_beyond_their_number_and_size(writer: LogWriter, folder: Path) -> None:
    print_lines(writer, 0, 20_000)
    writer.flush("api")
    assert len(files(folder)) == 1 + OLD_COPIES
    assert sum(file.stat().st_size for file in folder.iterdir()) <= (1 + OLD_COPIES) * LOG_BYTES
    kept = written(folder)
    assert kept == list(range(kept[0], 20_000)), "the newest, without a gap"


def test_what_is_printed_while_no_writer_lives_comes_later(writer: LogWriter, folder: Path) -> None:
    print_lines(writer, 0, 100)
    writer.flush("api")
    os.kill(writer.pid, signal.SIGSTOP)
    print_lines(writer, 100, 200)
    os.kill(writer.pid, signal.SIGKILL)
    eventually(lambda: not alive([writer.pid]), what="it is dead")
    writer.ensure()
    eventually(lambda: len(written(folder)) == 200, what="another one has written the rest")
    assert written(folder) == list(range(200))


def test_a_full_disk_stops_no_service_and_lines_come_again_when_there_is_room(writer: LogWriter, folder: Path) -> None:
    print_lines(writer, 0, 10)
    room = resource.prlimit(writer.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (20_000, room[1]))
    print_lines(writer, 10, 5_000)  # it would wait for ever if nobody read its pipe
    writer.flush("api")
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, room)
    print_lines(writer, 5_000, 5_010)
    writer.flush("api")
    assert written(folder)[-10:] == list(range(5_000, 5_010))
    assert len(written(folder)) < 1_000


def test_a_line_without_end_is_written_in_parts(writer: LogWriter, folder: Path) -> None:
    log = folder / "api.log"
    os.write(writer.pipe("api"), b"." * 40_000)
    eventually(lambda: log.exists() and log.stat().st_size > 0)
    os.write(writer.pipe("api"), b"\n")
    eventually(lambda: log.stat().st_size == 40_001)


def test_logs_follows_a_log_through_its_rotations(writer: LogWriter, folder: Path, tmp_path: Path) -> None:
    print_lines(writer, 0, 100)
    writer.flush("api")
    seen = tmp_path / "seen"
    with seen.open("wb") as stream:
        command = [sys.executable, "-m", "cli", "logs", "-f", "-n", "1000", "api"]
        environ = {**os.environ, "RENALQ_HOME": str(tmp_path)}
        following = subprocess.Popen(command, stdout=stream, stderr=subprocess.DEVNULL, cwd=REPOSITORY, env=environ)
    try:
        eventually(lambda: len(numbers(seen.read_text())) == 100, what="what stood there before")
        for first in range(100, 5_100, 1_000):
            print_lines(writer, first, first + 1_000)
            eventually(lambda last=first + 999: last in numbers(seen.read_text()), what="the new lines")  # type: ignore[misc]
        assert numbers(seen.read_text()) == list(range(5_100))
        assert len(files(folder)) > 2
    finally:
        following.kill()
        following.wait()
