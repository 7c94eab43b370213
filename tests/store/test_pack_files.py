"""Packs stay open, few of them, and what became of them on disk is noticed; work in threads keeps its order and its errors."""

import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tether.store.packing.pack_files import PackFiles
from tether.store.packing.parallel import buffer, in_order


@pytest.fixture
def files(tmp_path):
    for number in range(100):
        (tmp_path / str(number)).write_bytes(f"pack {number:02}".encode())
    found = PackFiles(tmp_path)
    yield found
    found.close()


def read(files, pack):
    view = memoryview(bytearray(7))
    return bytes(view[: files.read_into(pack, 0, view)])


def descriptors():
    return sum(1 for _ in Path("/dev/fd").iterdir())


def test_no_more_than_64_stay_open_and_all_are_closed_in_the_end(files):
    before = descriptors()
    for number in range(100):
        assert read(files, str(number)) == f"pack {number:02}".encode()
    assert descriptors() == before + 64
    files.close()
    assert descriptors() == before


def test_a_deleted_and_a_replaced_pack_are_noticed(files, tmp_path):
    assert read(files, "1") == b"pack 01"
    with files.opened("1") as descriptor:
        (tmp_path / "new").write_bytes(b"renewed")
        (tmp_path / "new").rename(tmp_path / "1")
        assert read(files, "1") == b"renewed"
        assert os.pread(descriptor, 7, 0) == b"pack 01"
    (tmp_path / "1").unlink()
    with pytest.raises(FileNotFoundError):
        read(files, "1")


def test_what_was_deleted_does_not_keep_its_space(files, tmp_path):
    before = descriptors()
    with files.opened("1"):
        read(files, "2")
        for name in ("1", "2"):
            (tmp_path / name).unlink()
        files.let_go_of_deleted()
        assert descriptors() == before + 1
    assert descriptors() == before


def test_many_threads_may_read_while_descriptors_come_and_go(files):
    def job(number):
        return read(files, str(number % 100)) == f"pack {number % 100:02}".encode()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(job, range(4000)))


def test_a_forked_child_reads_although_a_thread_of_the_parent_held_the_lock(files):
    read(files, "3")
    files._lock.acquire()
    child = os.fork()
    if child == 0:
        os._exit(0 if read(files, "3") == b"pack 03" else 1)
    files._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_out_of_descriptors_the_idle_ones_are_given_up(files):
    for number in range(40):
        read(files, str(number))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/dev/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, before[1]))
    try:
        for number in range(40, 60):
            assert read(files, str(number)) == f"pack {number:02}".encode()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- threads


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_answers_come_in_the_order_of_the_jobs(threads):
    barrier = threading.Semaphore(0)

    def work(number):
        if threads > 1 and number == 0:
            barrier.acquire(timeout=10)
        elif number == 1:
            barrier.release()
        return number * 2

    assert list(in_order(work, range(50), threads)) == list(range(0, 100, 2))


def test_the_first_error_ends_the_work_and_no_thread_stays():
    begun = []

    def work(number):
        begun.append(number)
        if number >= 5:
            raise ValueError(number)
        return number

    found = in_order(work, range(1000), 3)
    seen = []
    with pytest.raises(ValueError, match=r"^5$"):
        seen.extend(found)
    assert len(begun) < 30
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("store")]


def test_a_buffer_is_used_again_and_never_by_two_at_once():
    with buffer() as one, buffer() as two:
        one[0], two[0] = 1, 2
        assert one[0] == 1
    with buffer() as again:
        assert len(again) == 4 * 1024 * 1024


def test_what_is_read_after_the_end_stays_open_for_nobody(tmp_path):
    (tmp_path / "a").write_bytes(b"hello")
    files, buffer = PackFiles(tmp_path), bytearray(5)
    files.end()
    with files.opened("a") as descriptor:
        assert os.pread(descriptor, 5, 0) == b"hello"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert files.read_into("a", 0, memoryview(buffer)) == 5
    assert buffer == b"hello"
