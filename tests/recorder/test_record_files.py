"""Records that count as written can be read, even if their files are renamed, truncated, removed or the disk is full."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drafttrain.data_gen.serving_logs.exchange import Refused
from drafttrain.recorder.capture import Capture
from drafttrain.recorder.record_files import RecordFiles


def capture(number: int) -> Capture:
    return Capture(str(number), "/v1/completions", b"", b"", False, 0.0)


def line(capture: Capture) -> bytes:
    return f'{{"id": "{capture.id}"}}\n'.encode()


class Recording:
    """Files that are written capture by capture.

    Args:
        rotate_bytes: Two lines are more.
    """

    def __init__(self, folder: Path, *, rotate_bytes: int = 2**20) -> None:
        self.folder = folder
        self.files = RecordFiles(folder, line, rotate_bytes=rotate_bytes, queue_bytes=2**20)

    def write(self, *numbers: int) -> None:
        for number in numbers:
            self.files._write([capture(number)])

    @property
    def lines(self) -> list[str]:
        return [one for path in sorted(self.folder.iterdir()) for one in path.read_text().splitlines()]


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    (tmp_path / "out").mkdir()
    return Recording(tmp_path / "out")


def wanted(*numbers: int) -> list[str]:
    return [line(capture(number)).decode().strip() for number in numbers]


def test_two_recorders_that_open_a_file_in_the_same_second_write_two_files(tmp_path):
    # In containers, both may have process id 1.
    first, second = Recording(tmp_path), Recording(tmp_path)
    first.write(1)
    second.write(2)
    assert (first.files.written, second.files.written) == (1, 1)
    assert sorted(first.lines) == wanted(1, 2)


def test_after_a_file_is_removed_a_new_one_is_written(recording):
    recording.write(1)
    (recording.folder / recording.files.file).unlink()
    recording.write(2, 3)
    assert recording.files.written == 3
    assert recording.lines == wanted(2, 3)
    shutil.rmtree(recording.folder)
    recording.write(4)
    assert recording.lines == wanted(4)
    assert not recording.files.dropped


def test_after_a_file_is_copied_and_truncated_writing_continues_at_its_start(recording):
    recording.write(1, 2)
    path = recording.folder / recording.files.file
    shutil.copy(path, path.with_suffix(".old"))
    os.truncate(path, 0)
    recording.write(3)
    assert path.read_text().splitlines() == wanted(3)
    assert sorted(recording.lines) == wanted(1, 2, 3)


def test_after_a_file_is_renamed_no_record_is_lost(recording):
    recording.write(1)
    path = recording.folder / recording.files.file
    path.rename(path.with_suffix(".1"))
    recording.write(2)
    assert recording.lines == wanted(1, 2)


@contextlib.contextmanager
def no_room(limit: int) -> Iterator[None]:
    """Let no file grow beyond a limit in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_complete_lines_and_no_empty_files(recording):
    recording.write(1)
    with no_room(len(line(capture(1))) + 5):
        recording.write(2)
    with no_room(5):
        recording.write(*range(3, 8))
    recording.write(8)
    assert recording.files.written == 2
    assert recording.files.dropped == {"disk": 6}
    assert sorted(recording.lines) == wanted(1, 8)
    assert len(list(recording.folder.iterdir())) == 2


def test_a_full_disk_drops_only_the_lines_that_do_not_fit(recording):
    size = len(line(capture(1)))
    with no_room(2 * size + 5):
        recording.files._write([capture(number) for number in range(1, 6)])
    assert recording.lines == wanted(1, 2, 4, 5)
    assert recording.files.written == 4
    assert recording.files.dropped == {"disk": 1}


def test_a_line_that_does_not_fit_costs_no_other_line(tmp_path):
    def uneven(capture: Capture) -> bytes:
        return b'"' + b"x" * (90 if capture.id == "2" else 5) + b'"\n'

    files = RecordFiles(tmp_path, uneven, rotate_bytes=2**20, queue_bytes=2**20)
    with no_room(20):
        files._write([capture(number) for number in range(1, 4)])
    assert files.written == 2
    assert files.dropped == {"disk": 1}
    assert [len(path.read_bytes()) for path in sorted(tmp_path.iterdir())] == [8, 8]


def test_records_not_written_in_time_are_dropped_and_counted(tmp_path):
    going, go_on = threading.Event(), threading.Event()

    def slow(capture: Capture) -> bytes:
        if capture.id == "2":
            going.set()
            go_on.wait(30)
            raise Refused("unreadable", "the line worker was stopped")
        return line(capture)

    files = RecordFiles(tmp_path, slow, rotate_bytes=10, queue_bytes=2**20)
    files.start()
    for number in (1, 2, 3):
        files.offer(capture(number))
    assert going.wait(30)
    files.close(within_seconds=0.0, interrupt=go_on.set)
    assert files.written == 1
    assert files.dropped == {"stopped": 2}
