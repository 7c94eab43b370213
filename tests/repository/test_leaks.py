"""What `tests/leaks.py` takes for lost, and what it does not: each test of the suite is judged by it."""

import asyncio
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import leaks
import pytest


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    monkeypatch.setattr(leaks, "PATIENCE", 0.05)
    monkeypatch.setattr(leaks, "SPARES", "none, though a test before this one in its process may have left one")


def test_a_socket_a_pipe_a_file_and_a_thread_are_told(tmp_path):
    before, end = leaks.Held.now(), threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten", daemon=True)
    thread.start()
    pipe, opened = os.pipe(), (tmp_path / "file").open("w")
    with opened, socket.socket() as kept:
        lost = before.lost_since(alone=True)
        shared = before.lost_since(alone=False)
        assert shared == [each for each in lost if each.endswith(f"(descriptor {kept.fileno()})")]
    end.set()
    thread.join()
    for each in pipe:
        os.close(each)
    assert sorted(each.partition(":")[0].split("/")[0].split(" (")[0] for each in lost) == [
        "",
        "pipe",
        "pipe",
        "socket",
        "thread forgotten",
    ]
    assert before.lost_since(alone=True) == []


def test_a_loop_that_runs_keeps_its_connections_and_a_pool_its_threads():
    before, loop = leaks.Held.now(), asyncio.new_event_loop()
    with ThreadPoolExecutor() as pool:
        pool.submit(int).result()
        thread = threading.Thread(target=loop.run_forever, name="zarr_io")
        thread.start()

        async def listen():
            return await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)

        server = asyncio.run_coroutine_threadsafe(listen(), loop).result()
        assert before.lost_since(alone=True) == []
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
    lost = before.lost_since(alone=True)
    loop.close()
    assert len(lost) == 2, "its own pair, now that it runs no more"


async def test_a_task_is_told_unless_it_ends():
    ends, forgotten = asyncio.create_task(asyncio.sleep(0)), asyncio.create_task(asyncio.Event().wait())
    (left,) = await leaks.unfinished()
    assert "Event.wait" in left
    assert ends.done()
    forgotten.cancel()
