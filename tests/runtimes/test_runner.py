"""A code model in a process of its own: it may die, hang, leak and shout; the worker lives on."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest

from tether.errors import (
    BadModelError,
    InternalError,
    LoadFailedError,
    MissingDependencyError,
    ModelFailedError,
    NoModelFileError,
    WorkerLostError,
)
from tether.runtimes import inspect
from tether.runtimes.arena import Arena
from tether.runtimes.arrivals import Coming
from tether.worker.runner import RunnerModel, RunnerPool, load_model
from tether.worker.runner_limits import RunnerLimits
from tether.worker.runner_process import RunnerProcess

SOURCE = """
import ctypes, os, subprocess, sys, time
from tether.errors import ModelDiedError, PoisonInputError, WorkerLostError

class Model:
    inputs = [("x", "INT64", (-1,))]
    outputs = [("y", "INT64", (-1,))]

    def load(self, path):
        self.kept = []
        if (path / "die").exists():
            os._exit(7)

    def predict(self, x):
        match int(x[0]) if x.size else 0:
            case 1: ctypes.string_at(0)
            case 2: raise ValueError("not two")
            case 3: time.sleep(3600)
            case 4: print("said on stdout"); print("said on stderr", file=sys.stderr)
            case 5: return x * 0 + os.getpid()
            case 6: return x * 0 + subprocess.Popen(["sleep", "3600"]).pid
            case 7: self.kept.append(x)
            case 8: return self.kept[0]
            case 9: return x * 0 + int(os.environ["OMP_NUM_THREADS"])
            case 10: print("the last words"); sys.stdout.flush(); os._exit(3)
            case 11: self.insist()
            case 12 | 13 | 14 as number: raise (ModelDiedError, WorkerLostError, PoisonInputError)[number - 12]("of another model")
        return x + 1

    def insist(self):
        while True:
            try:
                time.sleep(3600)
            except KeyboardInterrupt:
                pass
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.py").write_text(SOURCE)
    return tmp_path


@pytest.fixture(scope="module")
def pool():
    pool = RunnerPool()
    yield pool
    pool.close()


@pytest.fixture
def model(folder, pool):
    model = RunnerModel(folder, inspect(folder), 3, pool)
    yield model
    model.close()


def ask(model, number, rows=1):
    return model.run({"x": np.full(rows, number, np.int64)})["y"]


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def eventually(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_it_runs_in_another_process_with_the_thread_limit(model):
    assert ask(model, 5)[0] == model.pid != os.getpid()
    assert ask(model, 9)[0] == 3


def test_a_crash_is_told_and_the_next_run_starts_it_anew(model):
    before = model.pid
    with pytest.raises(WorkerLostError, match=r"the model's process died \(signal 11\)"):
        ask(model, 1)
    assert gone(before)
    assert ask(model, 41)[0] == 42
    assert model.pid != before


def test_its_last_words_are_in_the_error(model):
    with pytest.raises(WorkerLostError, match=r"exit status 3; its last words: .*the last words"):
        ask(model, 10)


def test_an_exception_costs_no_process(model):
    before = model.pid
    with pytest.raises(ModelFailedError, match="ValueError: not two"):
        ask(model, 2)
    assert (ask(model, 41)[0], model.pid) == (42, before)


@pytest.mark.parametrize("number", [12, 13, 14])
def test_nor_is_a_process_lost_or_an_input_poison_because_the_model_says_so(model, number):
    """One that asks another model may have such an error of that."""
    before = model.pid
    with pytest.raises(ModelFailedError, match=r"the model raised .*: of another model"):
        ask(model, number)
    assert model.pid == before


@contextmanager
def interrupted_every(seconds, model):
    over = threading.Event()

    def interrupt():
        while not over.wait(seconds):
            model.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_run_that_hangs_can_be_interrupted_and_costs_no_process(model):
    before = ask(model, 5)[0]
    with interrupted_every(1.0, model), pytest.raises(ModelFailedError, match="interrupted"):
        ask(model, 3)
    assert ask(model, 5)[0] == before


def test_a_run_that_does_not_heed_the_interrupt_costs_its_process(model):
    before = ask(model, 5)[0]
    with interrupted_every(0.2, model), pytest.raises(WorkerLostError, match="signal 9"):
        ask(model, 11)
    assert ask(model, 5)[0] != before


def test_an_interrupt_between_two_runs_does_nothing(model):
    for number in (40, 41):
        assert ask(model, number)[0] == number + 1
        model.interrupt()


def test_what_it_prints_goes_to_the_log(model, caplog):
    with caplog.at_level(logging.INFO, "tether.worker.runner"):
        ask(model, 4)
        eventually(lambda: "said on stdout" in caplog.text and "said on stderr" in caplog.text)


def test_closing_ends_it_and_what_it_started(model):
    child, pid = int(ask(model, 6)[0]), model.pid
    assert not gone(child)
    model.close()
    eventually(lambda: gone(child) and gone(pid))
    with pytest.raises(InternalError, match="closed"):
        ask(model, 0)


def test_closing_during_a_run_ends_the_run(model):
    errors = []

    def run():
        try:
            ask(model, 3)
        except WorkerLostError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    model.close()
    thread.join(10)
    assert not thread.is_alive()


def test_two_threads_that_close_a_process_at_once_close_no_descriptor_twice(monkeypatch):
    process, closed = RunnerProcess.start(RunnerLimits.default()), []
    close, both = Arena.close, threading.Barrier(2)

    def slow_close(arena):
        closed.append(arena.fd)
        time.sleep(0.05)  # whoever looked before the other was done would close it again
        close(arena)

    monkeypatch.setattr(Arena, "close", slow_close)
    threads = [threading.Thread(target=lambda: (both.wait(), process.close())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    given = [descriptor for descriptor in closed if descriptor >= 0]
    assert len(given) == len(set(given)) == 2


def test_shared_memory_grows_with_the_tensors_and_shrinking_ones_are_right_too(model):
    for rows in (1, 3_000_000, 5, 0, 200_000, 1):
        assert np.array_equal(ask(model, 0, rows), np.ones(rows, np.int64))


def test_a_model_that_keeps_its_input_keeps_it_unchanged(model):
    ask(model, 7, 2)
    ask(model, 100, 2)
    assert ask(model, 8, 2).tolist() == [7, 7]


def test_a_process_that_dies_while_loading_is_a_failed_load(folder, pool):
    info = inspect(folder)
    (folder / "die").touch()
    with pytest.raises(LoadFailedError, match="exit status 7"):
        RunnerModel(folder, info, 1, pool)


def test_errors_of_loading_come_through_with_what_they_know(folder, pool):
    import msgspec

    info = inspect(folder)
    with pytest.raises(MissingDependencyError, match="pip install 'nowhere==1'") as caught:
        RunnerModel(folder, msgspec.structs.replace(info, requirements=("nowhere==1",)), 1, pool)
    assert caught.value.args[1] == ["nowhere==1"]
    (folder / "model.py").write_text("oh no")
    with pytest.raises(BadModelError, match="SyntaxError"):
        RunnerModel(folder, info, 1, pool)


def test_one_spare_is_kept_and_used(folder):
    pool = RunnerPool()
    info = inspect(folder)
    first = RunnerModel(folder, info, 1, pool)
    (spare,) = pool.pids
    second = RunnerModel(folder, info, 1, pool)
    assert second.pid == spare
    assert len(pool.pids) == 1
    os.kill(pool.pids[0], signal.SIGKILL)
    eventually(lambda: gone(pool.pids[0]))
    third = RunnerModel(folder, info, 1, pool)  # the dead spare is no loss
    assert ask(third, 41)[0] == 42
    spares = pool.pids
    pool.close()
    assert all(map(gone, spares))
    for model in (first, second, third):
        assert ask(model, 41)[0] == 42
        model.close()


def test_a_runner_outlives_the_thread_that_loaded_it_but_not_its_worker(folder):
    script = (
        "import sys, threading, numpy as np, os, time\nfrom pathlib import Path\n"
        "from tether.runtimes import inspect\nfrom tether.worker.runner import load_model, RunnerPool\npool = RunnerPool()\n"
        "path, models = Path(sys.argv[1]), []\n"
        "thread = threading.Thread(target=lambda: models.append(load_model(path, inspect(path), 1, pool)))\nthread.start(); thread.join()\n"
        "assert models[0].run({'x': np.full(1, 41)})['y'][0] == 42\n"
        "print(models[0].pid, *pool.pids, flush=True)\ntime.sleep(3600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True) as worker:
        pids = [int(pid) for pid in worker.stdout.readline().split()]
        assert len(pids) == 2
        worker.kill()
    eventually(lambda: all(map(gone, pids)))


def test_nothing_stays_open_after_it_is_closed(folder, pool):
    info = inspect(folder)

    def grown():
        """Descriptors and threads more after a model than before it."""
        descriptors, threads = psutil.Process().num_fds(), threading.active_count()
        model = RunnerModel(folder, info, 1, pool)
        ask(model, 0)
        model.close()
        return psutil.Process().num_fds() - descriptors, threading.active_count() - threads

    # the pool's spare, and what earlier tests left, may begin and end meanwhile; what stays open of a model is there each time
    more = [grown() for _ in range(4)]
    assert min(descriptors for descriptors, _ in more) <= 0
    assert min(threads for _, threads in more) <= 0


# --- files that are fetched while its process starts


def coming(folder, arrive):
    """A folder that is written beside its place, and moved there; `arrive` is called in between."""
    partial = folder.with_name("partial")
    info = inspect(folder)
    folder.rename(partial)

    def fetch(arrivals):
        arrivals.begun(partial)
        arrivals.grew("model.py", (partial / "model.py").stat().st_size)
        arrive()
        partial.rename(folder)

    return Coming(folder, fetch), info


@pytest.fixture
def distant(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.py").write_text(SOURCE)
    return folder


def test_a_process_is_there_before_the_files_and_found_again_after_its_death(distant):
    before = set(psutil.Process().children())
    files, info = coming(distant, lambda: eventually(lambda: set(psutil.Process().children()) - before))
    model = RunnerModel(files, info, 1, RunnerPool(patience=60.0))
    assert ask(model, 41)[0] == 42
    with pytest.raises(WorkerLostError):
        ask(model, 1)
    assert ask(model, 41)[0] == 42
    model.close()


def test_files_that_do_not_come_are_their_own_error_and_leave_no_process(distant):
    def fails():
        raise MissingDependencyError("no bytes today", [])

    files, info = coming(distant, fails)
    before = set(psutil.Process().children())
    with pytest.raises(MissingDependencyError, match="no bytes today"):
        RunnerModel(files, info, 1, RunnerPool(patience=60.0))
    eventually(lambda: all(child in before or gone(child.pid) for child in psutil.Process().children()))


def test_a_process_that_dies_while_files_come_is_a_failed_load_when_they_came(distant):
    pool, before = RunnerPool(patience=60.0), set(psutil.Process().children())

    def kills():
        eventually(lambda: set(psutil.Process().children()) - before)
        for child in set(psutil.Process().children()) - before:
            child.kill()
            eventually(lambda child=child: gone(child.pid))

    files, info = coming(distant, kills)
    with pytest.raises(LoadFailedError, match="signal 9"):
        RunnerModel(files, info, 1, pool)
    assert (distant / "model.py").exists()


def test_an_error_of_loading_comes_through_after_the_files(distant, pool):
    files, info = coming(distant, lambda: (distant.with_name("partial") / "model.py").write_text("oh no"))
    with pytest.raises(BadModelError, match="SyntaxError"):
        RunnerModel(files, info, 1, pool)


def test_data_formats_are_fetched_first_and_stay_in_this_process(tmp_path):
    pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
    import runtime_models as models

    path = models.onnx_rows(tmp_path)
    info, hidden = inspect(path), tmp_path / "not yet"
    path.rename(hidden)
    model = load_model(Coming(path, lambda _: hidden.rename(path)), info)
    assert not isinstance(model, RunnerModel)
    model.close()


def test_data_formats_stay_in_this_process(tmp_path):
    pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
    import runtime_models as models

    path = models.onnx_rows(tmp_path)
    model = load_model(path, inspect(path))
    assert not isinstance(model, RunnerModel)
    model.close()


def test_a_data_format_moves_into_a_process_of_its_own_when_it_is_told_to(tmp_path, pool):
    pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
    import runtime_models as models

    path, given = models.onnx_rows(tmp_path), {"x": np.ones((2, 4), np.float32)}
    model = load_model(path, inspect(path), pool=pool)
    here = model.run(given)["y"]
    assert model.pid is None
    model.isolate()
    pid = model.pid
    np.testing.assert_array_equal(model.run(given)["y"], here)
    model.isolate()
    assert (model.pid, gone(pid)) == (pid, False)
    model.close()
    assert gone(pid)


def test_a_data_format_that_can_not_move_stays_where_it_is(tmp_path, pool):
    pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
    import runtime_models as models

    path, given = models.onnx_rows(tmp_path), {"x": np.ones((2, 4), np.float32)}
    model = load_model(path, inspect(path), pool=pool)
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(NoModelFileError):
        model.isolate()
    assert model.pid is None
    assert model.run(given)["y"].shape == (2, 2)
    model.close()


def test_how_long_a_small_run_takes(model, measured):
    given = {"x": np.zeros(4, np.int64)}
    times = []
    for _ in range(1000):
        started = time.perf_counter()
        model.run(given)
        times.append(time.perf_counter() - started)
    measured(f"runner, one small tensor: median {np.median(times) * 1e6:.0f} µs, aim 150 µs")
    assert np.median(times) < 0.005  # a busy machine must not fail a test; a lost wake-up must
