"""What the process of a model may not do: eat all memory, write elsewhere, call out, multiply, end its worker, live on after its end."""

import errno
import os
import re
import time

import numpy as np
import psutil
import pytest

from tether.errors import ConfigError, ModelDiedError, ModelFailedError
from tether.runtimes import inspect
from tether.sandbox.confinement import missing
from tether.sandbox.tree import Tree
from tether.worker import runner_process
from tether.worker.runner import RunnerModel, RunnerPool
from tether.worker.runner_limits import RunnerLimits
from tether.worker.runner_process import RunnerProcess

MIB = 1 << 20
SOURCE = """
import ctypes, mmap, os, signal, socket, subprocess, sys, time
from pathlib import Path
import numpy as np

def shared(nbytes):
    held = mmap.mmap(-1, nbytes)
    held[::4096] = b"x" * len(held[::4096])
    return held

def multiply():
    for _ in range(40):
        if os.fork() == 0:
            time.sleep(3600)
    time.sleep(3600)

def stray():
    child = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    return child.pid

def write_in_each_thread(file):
    # how many of them did: a handler of C's signals runs in the thread that gets one, Python's own waits for the main thread
    wrote, libc = [], ctypes.CDLL(None)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def write(_):
        try:
            file.write_text("x")
        except OSError:
            wrote.append(0)
        else:
            wrote.append(1)

    libc.signal(signal.SIGUSR1, write)
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    for thread in threads:
        libc.tgkill(os.getpid(), thread, signal.SIGUSR1)
    end = time.monotonic() + 10
    while len(wrote) < len(threads) and time.monotonic() < end:
        time.sleep(0.01)
    libc.signal(signal.SIGUSR1, None)
    return sum(wrote)

class Model:
    inputs = outputs = [("x", "INT64", (-1,))]
    pure = True

    def load(self, path):
        self.path = path

    def predict(self, x):
        match int(x[0]):
            case 1: np.ones(1 << 30, np.uint8)
            case 2: held = shared(1 << 30); time.sleep(3600)
            case 3: (self.path / "new").write_text("x")
            case 4: Path(os.environ["TMPDIR"], "new").write_text("x")
            case 5: socket.create_connection(("127.0.0.1", 9), 1)
            case 6: os.kill(os.getppid(), signal.SIGKILL)
            case 7: multiply()
            case 8: return x * 0 + stray()
            case 9: return x * 0 + int(Path("/proc/self/oom_score_adj").read_text())
            case 10: print(stray(), flush=True); os._exit(3)
            case 11: return x * 0 + write_in_each_thread(self.path / "new")
            case 12: os.closerange(3, 256); time.sleep(3600)
        return x + 1
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "model.py").write_text(SOURCE)
    return folder


@pytest.fixture(scope="module")
def model(files):
    """It starts again after each death."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        pool = RunnerPool(limits=RunnerLimits(512 * MIB, processes=16))
        made = RunnerModel(files, inspect(files), 1, pool)
        yield made
        made.close()
        pool.close()


@pytest.fixture
def own(model, files):
    """Another one, which is closed."""
    return RunnerModel(files, model.info, 1, model._pool)


def ask(model, number):
    return int(model.run({"x": np.array([number], np.int64)})["x"][0])


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def refuses(model, number, text):
    with pytest.raises(ModelFailedError, match=text):
        ask(model, number)
    assert ask(model, 100) == 101


def test_more_private_memory_than_it_may_have_is_an_error_and_costs_no_process(model):
    before = model.pid
    refuses(model, 1, "MemoryError")
    assert model.pid == before


def test_memory_that_is_shared_is_seen_and_costs_the_process(model):
    with pytest.raises(ModelDiedError, match="needed more than 512 MiB of memory") as caught:
        ask(model, 2)
    assert caught.value.args[1]
    assert ask(model, 100) == 101


def test_a_look_that_fails_is_not_the_last_one(model, monkeypatch):
    looks, of = [], Tree.of

    def look(pid):
        looks.append(pid)
        if len(looks) == 1:
            raise OSError(errno.EMFILE, "too many open files")
        return of(pid)

    monkeypatch.setattr(Tree, "of", look)
    with pytest.raises(ModelDiedError, match="needed more than 512 MiB of memory"):
        ask(model, 2)


def test_who_hangs_up_and_lives_on_ended_its_process_by_itself(model):
    with pytest.raises(ModelDiedError, match="it hung up and did not end") as caught:
        ask(model, 12)
    assert caught.value.args[1]
    assert ask(model, 100) == 101


def test_a_process_that_can_not_be_started_leaves_nothing_open(monkeypatch):
    def refuse(*_):
        raise BlockingIOError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(runner_process, "_spawn", refuse)
    before = psutil.Process().num_fds()
    for _ in range(5):
        with pytest.raises(BlockingIOError):
            RunnerProcess.start(RunnerLimits.default())
    assert psutil.Process().num_fds() <= before


@pytest.mark.skipif("files" in missing(), reason="needs Linux 5.13 with Landlock")
def test_it_writes_in_a_folder_of_its_own_only(model, files):
    refuses(model, 3, "PermissionError")
    assert not (files / "new").exists()
    assert ask(model, 4) == 5


@pytest.mark.skipif("files" in missing(), reason="needs Linux 5.13 with Landlock")
def test_nor_does_a_thread_write_there_that_a_library_started_with_its_import(model, files):
    assert ask(model, 11) == 0
    assert not (files / "new").exists()


@pytest.mark.skipif("network" in missing(), reason="needs Linux on x86-64 or arm64")
def test_it_calls_nobody(model):
    refuses(model, 5, "PermissionError")


@pytest.mark.skipif("signals" in missing(), reason="needs Linux 6.12 with Landlock")
def test_it_can_not_end_its_worker(model):
    refuses(model, 6, "PermissionError")


def test_processes_without_end_are_ended_with_it(model):
    with pytest.raises(ModelDiedError, match="started more than 16 processes"):
        ask(model, 7)
    assert Tree.of(os.getpid()).processes < 40
    assert ask(model, 100) == 101


def test_what_left_its_session_ends_with_it(own):
    child = ask(own, 8)
    assert not gone(child)
    own.close()
    assert gone(child)


def test_what_left_its_session_ends_when_it_dies_too(model):
    with pytest.raises(ModelDiedError, match=r"its last words: \d+") as caught:
        ask(model, 10)
    assert gone(int(re.search(r"words: (\d+)", str(caught.value))[1]))


def test_the_kernel_ends_it_before_its_worker_and_its_folder_goes_with_it(own):
    assert ask(own, 9) == 500
    scratch = own._process._scratch.path
    assert os.path.isdir(scratch)  # noqa: PTH112 (a string)
    own.close()
    assert not os.path.exists(scratch)  # noqa: PTH110


def test_what_is_configured_is_checked():
    assert RunnerLimits.configured({}, 1000) == RunnerLimits(800)
    assert RunnerLimits.configured({"memory": "1MiB", "processes": 9, "network": True, "writable": ["/x"]}, 0) == RunnerLimits(
        MIB, 9, network=True, writable=("/x",)
    )
    for wrong in ({"memory": "much"}, {"processes": 0}, {"network": "yes"}, {"writable": "/x"}, {"most": 1}):
        with pytest.raises(ConfigError, match=r"tether\.runner"):
            RunnerLimits.configured(wrong, 1000)


def test_a_short_run_is_not_looked_at(model, monkeypatch):
    looks = []
    monkeypatch.setattr(Tree, "of", lambda pid: looks.append(pid) or Tree(0, 0))
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        ask(model, 100)
    assert looks == []
