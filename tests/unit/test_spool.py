"""The spool: a bound in memory, a bound on disk, and nothing left behind."""

import subprocess
import sys

import pytest

from app.core.errors import ConfigError
from app.core.metrics import WorkerMetrics
from worker.spool import LOCK, Spool


@pytest.fixture
def metrics():
    return WorkerMetrics()


@pytest.fixture
def spool(tmp_path, metrics):
    return Spool(tmp_path, memory_bytes=100, disk_bytes=100, metrics=metrics)


def files(folder):
    return [file for file in folder.glob("*/*") if file.name != LOCK]


def waiting(metrics):
    places = ("memory", "disk")
    return tuple(metrics.registry.get_sample_value("safelight_unstored_bytes", {"place": place}) for place in places)


def test_what_does_not_fit_into_memory_is_in_a_file_and_reads_the_same(spool, tmp_path, metrics):
    bodies = [bytes([i]) * 60 for i in range(3)]
    kept = [spool.keep(body) for body in bodies]
    assert [each.read() for each in kept] == bodies
    assert [each.body is None for each in kept] == [False, True, True]
    assert (len(files(tmp_path)), waiting(metrics)) == (2, (60, 120))


def test_there_is_room_until_both_bounds_are_reached_and_again_when_something_was_dropped(spool, tmp_path, metrics):
    kept = []
    while spool.has_room:
        kept.append(spool.keep(b"x" * 50))
    assert len(kept) == 4
    late = spool.keep(b"y" * 50)  # a run in flight ended: it is not refused
    assert late.read() == b"y" * 50
    for each in (*kept, *kept, late):
        spool.drop(each)
    assert spool.has_room
    assert (files(tmp_path), waiting(metrics)) == ([], (0, 0))


def test_a_disk_that_takes_nothing_leaves_the_picture_in_memory(spool, tmp_path, metrics):
    spool.keep(b"x" * 100)
    for folder in tmp_path.iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    kept = spool.keep(b"y" * 50)
    assert (kept.read(), waiting(metrics)) == (b"y" * 50, (150, 0))


def test_files_of_the_living_stay_and_those_of_the_dead_go(tmp_path, metrics):
    code = (
        "import sys; from pathlib import Path\n"
        "from app.core.metrics import WorkerMetrics; from worker.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1]), memory_bytes=0, disk_bytes=9, metrics=WorkerMetrics()); spool.keep(b'dead')"
    )
    living = Spool(tmp_path, memory_bytes=0, disk_bytes=9, metrics=metrics)
    kept = living.keep(b"living")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert {file.read_bytes() for file in files(tmp_path)} == {b"living", b"dead"}
    Spool(tmp_path, memory_bytes=0, disk_bytes=9, metrics=WorkerMetrics())
    assert {file.read_bytes() for file in files(tmp_path)} == {b"living"}
    assert kept.read() == b"living"


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path, metrics):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"SAFELIGHT_DATA: cannot write .*writable folder"):
        Spool(tmp_path / "file" / "spool", memory_bytes=0, disk_bytes=0, metrics=metrics)


def test_closed_it_leaves_nothing(spool, tmp_path):
    spool.keep(b"x" * 500)
    spool.close()
    assert list(tmp_path.iterdir()) == []
