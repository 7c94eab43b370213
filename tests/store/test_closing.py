"""Closing a store while others use it: nothing is written to a file that took a closed one's number, and the lock is given up."""

import errno
import os
import signal
import threading

import pytest
from collecting import Clock, content, opened
from store_models import publish

from tether import store
from tether.errors import StoreError
from tether.store.packing import disk


def test_closing_waits_for_a_blob_that_is_half_written(tmp_path, monkeypatch):
    inside, go = threading.Event(), threading.Event()

    def reach(point):
        if point == "stage":
            inside.set()
            assert go.wait(10)

    repository = opened(tmp_path / "store", Clock())
    blob, closed = content("half", 100_000), threading.Event()
    repository.put_blob(store.digest_of(b"first"), b"first")
    monkeypatch.setattr(disk, "reach", reach)
    writer = threading.Thread(target=repository.put_blob, args=(store.digest_of(blob), blob))
    closer = threading.Thread(target=lambda: (repository.close(), closed.set()))
    writer.start()
    assert inside.wait(10)
    closer.start()
    was_closed = closed.wait(0.2)  # it must not be: there is nothing to poll for
    go.set()
    writer.join()
    closer.join()

    assert not was_closed
    with opened(tmp_path / "store", Clock()) as again:
        assert again.staged_blob(store.digest_of(blob)) == blob


def test_what_comes_after_closing_is_refused_and_written_nowhere(tmp_path):
    repository = opened(tmp_path / "store", Clock())
    repository.put_blob(store.digest_of(b"first"), b"first")
    repository.close()
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    numbers = [os.open(other, os.O_RDWR) for _ in range(8)]
    try:
        with pytest.raises(StoreError):
            repository.put_blob(store.digest_of(b"second"), b"second")
    finally:
        for number in numbers:
            os.close(number)
    assert other.read_bytes() == b"precious"


def test_a_part_that_fails_to_close_keeps_neither_the_lock_nor_the_catalog(tmp_path, monkeypatch):
    def refuse():
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    repository = opened(tmp_path / "store", Clock())
    monkeypatch.setattr(repository._keeper, "close", refuse)
    with pytest.raises(OSError, match="busy"):
        repository.close()
    opened(tmp_path / "store", Clock()).close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_was_forked_does_not_keep_the_lock(tmp_path):
    repository = opened(tmp_path / "store", Clock())
    publish(repository)
    child = os.fork()
    if child == 0:  # pragma: no cover (another process)
        signal.pause()
        os._exit(0)
    try:
        repository.close()
        opened(tmp_path / "store", Clock()).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
