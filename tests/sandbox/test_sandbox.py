"""Whatever runs in the sandbox, the caller gets a value or an error of Tether's, in time, and no process stays."""

import asyncio
import os
import signal
import socket
import time

import psutil
import pytest

from tether.errors import BadModelError, ChunkMissingError
from tether.sandbox import Limits, arun, run
from tether.sandbox.confinement import missing

MIB = 1 << 20
SHORT = Limits(seconds=1.0, memory_nbytes=1 << 30)
ROOMY = Limits(seconds=30.0, memory_nbytes=256 * MIB)


def call(name, argument=None, limits=ROOMY):
    return run(f"mischief:{name}", argument, limits=limits)


def gone(pid):
    """Whether it is, or is a zombie that its new parent has yet to reap."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_value_goes_in_and_another_comes_out():
    assert call("double", 21) == 42


@pytest.mark.parametrize("function", ["sleep_forever", "spin_without_the_interpreter"])
def test_what_never_ends_is_ended_at_the_limit(function):
    started = time.monotonic()
    with pytest.raises(BadModelError, match="took longer than 1 s"):
        call(function, limits=SHORT)
    assert time.monotonic() - started < 5


def test_processor_time_may_have_a_limit_of_its_own():
    with pytest.raises(BadModelError, match="used up its processor time"):
        call("spin", limits=Limits(seconds=60, cpu_seconds=0.5))


@pytest.mark.parametrize(("function", "nbytes"), [("eat", 2 << 30), ("eat_shared", 2 << 30), ("eat_in_children", 128 * MIB)])
def test_what_eats_memory_is_told_how_much_there_was(function, nbytes):
    with pytest.raises(BadModelError, match="needs more than 256 MiB of memory"):
        call(function, nbytes)


@pytest.mark.parametrize(
    ("function", "argument", "words"),
    [
        ("crash", None, r"crashed \(signal 11, SIGSEGV\)"),
        ("kill_itself", signal.SIGABRT, r"crashed \(signal 6, SIGABRT\)"),
        ("kill_itself", signal.SIGKILL, "was killed"),
        ("leave", 3, "exit status 3"),
        ("leave", 0, "exit status 0"),
    ],
)
def test_a_process_that_dies_says_how(function, argument, words):
    with pytest.raises(BadModelError, match=words):
        call(function, argument)


def test_a_flood_of_output_neither_blocks_nor_fills_us_and_its_end_is_shown():
    before = psutil.Process().memory_info().rss
    with pytest.raises(BadModelError, match=r"SystemExit: enough; its last words: .*the very last line"):
        call("flood", 64 * MIB)
    assert psutil.Process().memory_info().rss - before < 16 * MIB


def test_a_child_that_left_the_session_does_not_outlive_the_call(tmp_path):
    file = tmp_path / "pid"
    assert call("leave_a_child_behind", str(file)) == "done"
    assert gone(int(file.read_text()))


def test_nor_does_it_outlive_a_call_that_took_too_long(tmp_path):
    file = tmp_path / "pid"
    with pytest.raises(BadModelError, match="took longer"):
        call("leave_a_child_behind_and_hang", str(file), SHORT)
    assert gone(int(file.read_text()))


def test_a_file_that_grows_without_end_is_stopped(tmp_path):
    with pytest.raises(BadModelError, match=r"OSError|SIGXFSZ"):
        call("write_much", str(tmp_path / "large"), Limits(30, 1 << 30, file_nbytes=2 * MIB))
    assert (tmp_path / "large").stat().st_size <= 2 * MIB


def test_an_error_of_ours_comes_back_as_itself_with_what_it_knows():
    with pytest.raises(ChunkMissingError) as caught:
        call("raise_ours", "weights/0")
    assert caught.value.args == ("blob is gone", "ab" * 32, "weights/0")


def test_an_error_of_others_becomes_one_of_ours():
    with pytest.raises(BadModelError, match="ZeroDivisionError: by"):
        call("raise_theirs")


@pytest.mark.parametrize("function", ["answer_no_json", "answer_nan", "scribble_on_the_answer", "no_such_function"])
def test_an_answer_that_is_none_is_an_error(function):
    with pytest.raises(BadModelError):
        call(function)


def test_secrets_of_the_environment_and_the_users_home_stay_out(monkeypatch):
    monkeypatch.setenv("TETHER_API_KEY", "tk_secret")
    environment, folder = call("environment")
    assert "TETHER_API_KEY" not in environment
    assert environment["HOME"] == environment["TMPDIR"] == folder
    assert not os.path.exists(folder)  # noqa: PTH110 (a string from another process)


@pytest.mark.skipif("network" in missing(), reason="needs Linux on x86-64 or arm64")
def test_it_calls_nobody_unless_it_may():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(BadModelError, match="PermissionError"):
            call("call_out", port)
        call("call_out", port, Limits(seconds=30.0, network=True))


@pytest.mark.skipif("signals" in missing(), reason="needs Linux 6.12 with Landlock")
def test_it_sends_no_signals_to_who_called_it():
    with pytest.raises(BadModelError, match="PermissionError"):
        call("kill_the_caller", os.getpid())


async def test_the_loop_goes_on_while_one_runs():
    running = asyncio.create_task(arun("mischief:sleep_forever", None, limits=SHORT))
    ticks = 0
    while not running.done():
        await asyncio.sleep(0.05)
        ticks += 1
    assert ticks > 5
    with pytest.raises(BadModelError, match="took longer"):
        await running


async def test_cancelling_ends_the_process(tmp_path):
    file = tmp_path / "pid"
    running = asyncio.create_task(arun("mischief:leave_a_child_behind_and_hang", str(file), limits=ROOMY))
    async with asyncio.timeout(20):
        while not (file.exists() and file.read_text()):  # noqa: ASYNC110 (it is another process that writes it)
            await asyncio.sleep(0.02)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert gone(int(file.read_text()))


def test_nothing_of_a_run_stays_open():
    call("double", 1)
    descriptors, children = psutil.Process().num_fds(), set(psutil.Process().children(recursive=True))
    for _ in range(5):
        call("double", 1)
    assert psutil.Process().num_fds() <= descriptors  # connections of earlier tests may close meanwhile
    assert set(psutil.Process().children(recursive=True)) <= children
