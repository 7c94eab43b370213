"""A large ONNX model answers at once, over its mapped file; the session for good is made meanwhile, and takes over between two runs."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from onnx_layers import layers, with_endless_loop

from tether.errors import BadModelError, ModelFailedError
from tether.runtimes import inspect, load, onnx_sessions
from tether.security.volatile import VolatileFolder
from tether.testing.requirements import needs

pytestmark = [needs("onnx"), needs("onnxruntime")]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
PATIENCE = 20.0
ROWS = np.random.default_rng(1).standard_normal((5, 512), dtype=np.float32)


@pytest.fixture(autouse=True)
def from_two_mib_on(monkeypatch):
    """So that models of the tests are large ones."""
    monkeypatch.setattr(onnx_sessions, "LARGE", 2 << 20)


@pytest.fixture
def opened():
    """Loads a model, and closes it at the end."""
    with contextlib.ExitStack() as stack:

        def open_(path, threads=1):
            model = load(path, inspect(path), threads)
            stack.callback(model.close)
            return model

        yield open_
    until(lambda: not prepacking())


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def prepacking():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prepack-")]


def is_mapped(path):
    return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")


def settle(model):
    """Run it until the prepacked session has taken over."""
    model.run({"x": ROWS})
    model.run({"x": ROWS})
    until(lambda: not prepacking())
    return model.run({"x": ROWS})["y"]


@LINUX
def test_it_answers_from_the_mapped_file_and_then_from_prepacked_memory(tmp_path, opened):
    path = layers(tmp_path / "model.onnx", 4)
    model = opened(path)
    assert is_mapped(path)
    first = model.run({"x": ROWS})["y"]
    assert is_mapped(path)
    assert not prepacking()
    np.testing.assert_allclose(settle(model), first, rtol=1e-3, atol=1e-5)
    assert not is_mapped(path)


@LINUX
def test_weights_in_files_of_their_own_are_mapped_and_prepacked_alike(tmp_path, opened):
    layers(tmp_path / "model.onnx", 4, external="weights.bin")
    model = opened(tmp_path)
    first = model.run({"x": ROWS})["y"]
    assert is_mapped(tmp_path / "weights.bin")
    np.testing.assert_allclose(settle(model), first, rtol=1e-3, atol=1e-5)
    assert not is_mapped(tmp_path / "weights.bin")


@LINUX
def test_it_answers_as_the_same_model_loaded_as_a_small_one(tmp_path, opened, monkeypatch):
    path = layers(tmp_path / "model.onnx", 4)
    monkeypatch.setattr(onnx_sessions, "LARGE", 1 << 40)
    small = opened(path)
    assert not is_mapped(path)
    expected = small.run({"x": ROWS})["y"]
    monkeypatch.undo()
    monkeypatch.setattr(onnx_sessions, "LARGE", 1 << 20)
    large = opened(path)
    np.testing.assert_allclose(large.run({"x": ROWS})["y"], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(settle(large), expected)  # the same kernels on the same weights


def test_a_model_that_is_run_once_is_never_prepacked(tmp_path):
    path = layers(tmp_path / "model.onnx", 4)
    model = load(path, inspect(path))
    model.run({"x": ROWS})
    assert not prepacking()
    model.close()


def test_runs_go_on_while_it_is_prepacked_and_each_is_right(tmp_path, opened):
    model = opened(layers(tmp_path / "model.onnx", 64))
    expected = model.run({"x": ROWS})["y"]
    model.run({"x": ROWS})
    during = 0
    while prepacking():
        np.testing.assert_allclose(model.run({"x": ROWS})["y"], expected, rtol=1e-3, atol=1e-5)
        during += 1
    np.testing.assert_allclose(model.run({"x": ROWS})["y"], expected, rtol=1e-3, atol=1e-5)
    assert during


@LINUX
def test_closing_it_meanwhile_ends_that_and_leaves_nothing(tmp_path):
    path = layers(tmp_path / "model.onnx", 128)
    model = load(path, inspect(path))
    model.run({"x": ROWS})
    model.run({"x": ROWS})
    assert prepacking()
    model.close()
    model.close()
    until(lambda: not prepacking())
    gc.collect()
    assert not is_mapped(path)
    with pytest.raises(ModelFailedError):
        model.run({"x": ROWS})


def test_one_that_waits_for_its_turn_is_closed_without_waiting(tmp_path, opened):
    model = opened(layers(tmp_path / "model.onnx", 4))
    with onnx_sessions._one_at_a_time:  # as while another model is prepacked
        model.run({"x": ROWS})
        model.run({"x": ROWS})
        model.close()
        assert [thread.name for thread in prepacking()] == ["prepack-model.onnx"]


@LINUX
def test_a_run_on_either_session_can_be_interrupted(tmp_path, opened):
    model = opened(with_endless_loop(tmp_path / "model.onnx"))
    ends, endless = ({"x": ROWS[:1, :4], "trips": np.array(trips)} for trips in (1, 1 << 62))
    assert is_mapped(tmp_path / "model.onnx")
    for _ in range(2):
        stop = threading.Event()

        def interrupt(stop=stop):
            while not stop.wait(0.02):
                model.interrupt()

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with pytest.raises(ModelFailedError, match="terminate"):
                model.run(endless)
        finally:
            stop.set()
            thread.join()
        model.run(ends)
        until(lambda: not prepacking())
        model.run(ends)
        assert not is_mapped(tmp_path / "model.onnx")


@LINUX
def test_where_prepacking_fails_it_answers_on_and_the_log_says_so(tmp_path, opened, capsys):
    path = layers(tmp_path / "model.onnx", 4)
    model = opened(path)
    first = model.run({"x": ROWS})["y"]
    path.unlink()  # as an evicted checkout would be; what is mapped stays
    np.testing.assert_array_equal(settle(model), first)
    assert is_mapped(path)
    assert "prepacking failed" in capsys.readouterr().out


LEFT_OPEN = """
import sys
import numpy as np
from pathlib import Path
from tether.runtimes import inspect, load
path = Path(sys.argv[1])
model = load(path, inspect(path))
for _ in range(2):
    model.run({"x": np.ones((3, 512), np.float32)})
"""


def test_a_process_that_ends_meanwhile_ends_well(tmp_path):
    path = layers(tmp_path / "model.onnx", 128)
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN, path], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


OUT_OF_MEMORY = """
import resource, sys, threading
from pathlib import Path
import numpy as np
from tether.runtimes import inspect, load
path = Path(sys.argv[1])
model = load(path, inspect(path))
x = {"x": np.ones((3, 512), np.float32)}
first = model.run(x)["y"]
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20), -1))
model.run(x)
for thread in threading.enumerate():
    if thread.name.startswith("prepack-"):
        thread.join()
assert np.array_equal(model.run(x)["y"], first)
assert str(path) in Path("/proc/self/maps").read_text()
print("answered")
"""


@LINUX
def test_without_the_memory_for_it_the_model_answers_on(tmp_path):
    path = layers(tmp_path / "model.onnx", 128)
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, path], capture_output=True, text=True, timeout=60, check=True)
    assert "prepacking failed" in done.stdout
    assert done.stdout.rstrip().endswith("answered")


@LINUX
def test_an_encrypted_models_folder_in_memory_may_be_wiped_under_it(opened):
    with VolatileFolder.create("test") as folder:
        path = layers(folder.path / "model.onnx", 4)
        model = opened(path)
        first = model.run({"x": ROWS})["y"]
        assert is_mapped(path)
    np.testing.assert_array_equal(model.run({"x": ROWS})["y"], first)
    until(lambda: not prepacking())
    model.close()
    assert not is_mapped(path)


@LINUX
def test_threads_that_answer_have_the_priority_of_the_process(tmp_path, opened):
    model = opened(layers(tmp_path / "model.onnx", 4), threads=3)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    settle(model)
    assert {os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in Path("/proc/self/task").iterdir()} == {before}


def test_a_file_whose_name_is_no_text_is_refused_with_a_clear_error(tmp_path):
    """ONNX Runtime takes no such path, large or small."""
    path = layers(tmp_path / "model.onnx", 4)
    odd = path.rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.onnx")))
    with pytest.raises(BadModelError, match="can't be loaded by ONNX Runtime"):
        inspect(odd)


def test_damage_is_refused_as_in_a_small_model(tmp_path):
    good = layers(tmp_path / "model.onnx", 4).read_bytes()
    for name, data in {"half": good[: len(good) // 2], "short weight": good.replace(b"\x08\x80\x04", b"\x08\x81\x04", 1)}.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(data)
        with pytest.raises(BadModelError) as caught:
            inspect(path)
        assert "\n" not in str(caught.value)


@LINUX
def test_unloading_while_it_is_prepacked_gives_the_memory_back(tmp_path):
    path = layers(tmp_path / "model.onnx", 128)
    info = inspect(path)

    def cycle():
        model = load(path, info)
        model.run({"x": ROWS})
        model.run({"x": ROWS})
        model.close()
        until(lambda: not prepacking())
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    first, *_, last = (cycle() for _ in range(5))
    assert last < first + (40 << 20)


def test_a_copy_of_the_folder_elsewhere_is_another_model(tmp_path, opened):
    """The outline names no path, so nothing is read from where the first one lay."""
    one = layers(tmp_path / "one" / "model.onnx", 4, seed=1)
    two = layers(tmp_path / "two" / "model.onnx", 4, seed=2)
    answers = [settle(opened(path)) for path in (one, two)]
    assert not np.allclose(*answers)
    shutil.rmtree(tmp_path / "one")
    np.testing.assert_array_equal(settle(opened(two)), answers[1])
